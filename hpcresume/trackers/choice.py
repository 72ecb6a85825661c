"""The trackers by the names that the configuration gives them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator

from hpcresume.errors import ConfigError
from hpcresume.trackers.tracker import Subject, Tracker

#: Name -> class in the module of that name, the package that it needs.
_TRACKERS = {
    "tensorboard": ("TensorBoard", "tensorboardX"),
    "wandb": ("WandB", "wandb"),
    "mlflow": ("MLflow", "mlflow"),
    "trackio": ("Trackio", "trackio"),
}


def open_tracker(name: str, subject: Subject) -> Tracker:
    """A tracker, ready to begin. May raise anything that its package raises."""
    check_installed([name])
    with _without_torch():
        module = importlib.import_module(f"hpcresume.trackers.{name}")
    tracker: Tracker = getattr(module, _TRACKERS[name][0])(subject)
    return tracker


def check_installed(names: Iterable[str]) -> None:
    """Raise ConfigError where the package of a tracker is not installed."""
    for name in names:
        package = _TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"log.trackers: {name} needs the package {package}, which is not installed here: "
                f"pip install 'hpcresume[{name}]', or take it out of the configuration."
            )


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Packages that look for torch (tensorboardX) do not find it: here it would be of no use.

    It would take seconds, and hundreds of megabytes, beside a training that starts.
    """
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
