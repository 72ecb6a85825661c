"""The kind of node that a run is pinned to: what it is, and how a job asks Slurm for it.

`slurm` learns it from the first link's nodes, `link` freezes it into the run, `script` has every
later job ask for it. Pure, but for the one file of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from hpcresume import files
from hpcresume.run_dir import RunDir

#: Options whose value is a number of GPUs, or "type:number".
_GPU_OPTIONS = frozenset({"gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task"})


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A kind of node; an empty one is any."""

    features: tuple[str, ...] = ()
    """Features that all of its nodes have."""
    gpu_type: str = ""

    def words(self) -> str:
        """For people: "features a100&ib, GPUs of type a100"."""
        features = [f"features {'&'.join(self.features)}"] if self.features else []
        gpus = [f"GPUs of type {self.gpu_type}"] if self.gpu_type else []
        return ", ".join(features + gpus)


def freeze(run: RunDir, hardware: Hardware) -> None:
    """Pin a run to a kind of node."""
    files.write_json(run.hardware, asdict(hardware))


def frozen(run: RunDir) -> Hardware | None:
    """What a run is pinned to; None where that is not known yet, or its file is damaged."""
    content = files.read_json_or_none(run.hardware)
    if not isinstance(content, dict):
        return None
    features, gpu_type = content.get("features"), content.get("gpu_type")
    if not isinstance(features, list) or not isinstance(gpu_type, str):
        return None
    return Hardware(features=tuple(map(str, features)), gpu_type=gpu_type)


def common(nodes: Sequence[Mapping[str, str]]) -> Hardware:
    """What nodes have in common, as `slurm_text.parse_nodes` gives them."""
    features = [features_of(node) for node in nodes]
    types = {_gpu_type(node.get("Gres", "")) for node in nodes}
    return Hardware(
        features=tuple(name for name in features[0] if all(name in f for f in features)),
        gpu_type=types.pop() if len(types) == 1 else "",
    )


def features_of(node: Mapping[str, str]) -> list[str]:
    """The features that a node has now."""
    names = node.get("ActiveFeatures", "")
    return [] if names == "(null)" else [name for name in names.split(",") if name]


def having(nodes: Sequence[Mapping[str, str]], wanted: str) -> list[Mapping[str, str]]:
    """The nodes with all features of a constraint; all nodes where it is more than a list."""
    if re.search(r"[|()\[\]*]", wanted):
        return list(nodes)
    names = set(re.split("[&,]", wanted))
    return [node for node in nodes if names <= set(features_of(node))]


def _gpu_type(gres: str) -> str:
    """The type of a node's GPUs, "gpu:a100:4(S:0-1)"; empty where it has none, or several."""
    types: set[str] = set(re.findall(r"(?:^|,)gpu(?::([^:,(]+))?:\d", gres))
    return types.pop() if len(types) == 1 else ""


def pinned(options: Mapping[str, str | None], hardware: Hardware) -> dict[str, str | None]:
    """sbatch's options, by their long names, that ask for a kind of node as well.

    A type of GPU that stands there already stays.
    """
    asked = dict(options)
    if hardware.features:
        asked["constraint"] = constraint(options.get("constraint"), hardware.features)
    if hardware.gpu_type:
        for name in asked.keys() & _GPU_OPTIONS:
            asked[name] = _typed(asked[name], hardware.gpu_type)
        if asked.get("gres"):
            items = str(asked["gres"]).split(",")
            asked["gres"] = ",".join(_typed_gres(item, hardware.gpu_type) for item in items)
    return asked


def constraint(own: str | None, features: Sequence[str]) -> str:
    """What --constraint asks for: features, besides what the user asked for."""
    if not own:
        return "&".join(features)
    if "*" in own:
        # Numbers of nodes for single features. Slurm lets nothing be added to that.
        return own
    there = [] if re.search(r"[|()\[\]]", own) else re.split("[&,]", own)
    # Slurm reads from left to right: what stands behind goes for all alternatives before it.
    return "&".join([own, *(name for name in features if name not in there)])


def _typed(number: str | None, gpu_type: str) -> str | None:
    return f"{gpu_type}:{number}" if number and number.isdigit() and int(number) else number


def _typed_gres(item: str, gpu_type: str) -> str:
    name, _, number = item.partition(":")
    if name != "gpu" or not (number or "1").isdigit():
        return item
    return f"gpu:{_typed(number or '1', gpu_type)}"
