"""What a verification found, and its words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpcresume.errors import CheckpointError
from hpcresume.verify.compare import Difference
from hpcresume.verify.looks import Lost

Outcome = Literal["bit-identical", "diverged", "not reproducible"]
_MANY = 6
#: Names that nothing can be registered under, see `checkpoint.contents`.
_TAKEN = frozenset({"state", "rng", "manifest", "trainer_state", "training_args"})


def outcome_of(differences: Sequence[Difference], lost: Sequence[Lost], cut_at: int) -> Outcome:
    """The outcome where the two uncut trainings were the same.

    What differs before the links were cut is chance that those two have only not shown.
    """
    steps = [difference.step for difference in differences if difference.step is not None]
    if steps and min(steps) <= cut_at:
        return "not reproducible"
    return "diverged" if differences or lost else "bit-identical"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of `verify`, with all that it rests on."""

    outcome: Outcome
    train: str
    steps: int
    """How many were trained, in one link and in three."""
    cut_at: int
    """The step after which the second and the third link began; 0 where none was cut."""
    ranks: int
    deterministic: bool
    tensors: int
    """How many were compared, byte by byte."""
    logged_steps: int
    """How many steps have logged numbers, compared as well."""
    seconds: float
    differences: tuple[Difference, ...] = ()
    lost: tuple[Lost, ...] = ()
    """Objects with a state that were never registered."""
    variables: tuple[Lost, ...] = ()
    """Numbers, arrays and lists that a cut begins anew."""
    moved: tuple[Lost, ...] = ()
    """What two trainings hold differently before their first step."""
    unsteady: tuple[str, ...] = ()
    """Logged names that were left out, because no two trainings have them in common."""
    kept: Path | None = field(default=None)
    """Where the run directories are; None where they are removed."""

    @property
    def exit_code(self) -> int:
        """0 where all is bit-identical, 7 otherwise."""
        return 0 if self.outcome == "bit-identical" else CheckpointError.exit_code

    def to_json(self) -> dict[str, Any]:
        """Everything as one JSON value, the sentences included."""
        plain = asdict(self)
        return {
            **plain,
            "kept": None if self.kept is None else str(self.kept),
            "exit_code": self.exit_code,
            "first": self.first(),
            "hints": list(self.hints()),
            "text": "\n".join(self.lines()),
        }

    # ---- in words ------------------------------------------------------------------------

    def first(self) -> str | None:
        """The component that diverges first, by name; None where none does.

        A logged number has a step, and so comes before what only the last step shows.
        """
        if self.differences:
            return str(self.differences[0])
        if self.outcome == "diverged":
            return f"{self.lost[0]}, which is in no checkpoint"
        return None

    def lines(self) -> Iterator[str]:
        """The verdict for people."""
        if self.outcome == "bit-identical":
            yield from self._summary()
        elif self.outcome == "diverged":
            yield f"diverged: {self.first()}, where the links are cut after step {self.cut_at}"
            yield from self._all_differences("without a cut", "in three links")
        else:
            early = " up to the first cut" if self.cut_at else ""
            yield (
                f"your training is not reproducible by itself, and no link is to blame: two "
                f"trainings differ{early} in {self.first()}"
            )
            yield from self._all_differences("the first time", "the second time")
        yield from (f"  hint: {hint}" for hint in self.hints())
        yield from (f"  note: {note}" for note in self._notes())
        if self.kept is not None:
            yield f"  the runs are kept in {self.kept}"

    def _summary(self) -> Iterator[str]:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        yield (
            f"bit-identical: {self.steps} steps in one link, and in three that are cut after step "
            f"{self.cut_at}; {ranks}, {self.seconds:.0f} s"
        )
        yield (
            f"  compared: {self.tensors} tensors, the random state, the progress, and the numbers "
            f"of {self.logged_steps} logged steps"
        )

    def _all_differences(self, one: str, other: str) -> Iterator[str]:
        """The values of the first difference, then the names of all by component."""
        first = self.differences[:1]
        for difference in first:
            if difference.one != difference.other:
                yield f"  it is {_short(difference.one)} {one}, {_short(difference.other)} {other}"
        for part in dict.fromkeys(difference.component for difference in self.differences):
            named = [d for d in self.differences if d.component == part]
            words = [d.name if d.step is None else f"{d.name} (step {d.step})" for d in named]
            yield f"  {part}: {_list(words)}"

    def hints(self) -> Iterator[str]:
        """What is likely to be the reason, the likeliest first."""
        if self.outcome == "bit-identical":
            return
        if self.moved:
            yield (
                f"before the first step already, these are not the same: {_list(self.moved)}. "
                f"Make them from the seed of the run, not from time, process id or os.urandom."
            )
        if self.lost and self.outcome == "diverged":
            words = ", ".join(f"{_word(lost.name)}={lost.name}" for lost in self.lost[:_MANY])
            yield (
                f"never registered: {_list(self.lost)}. Register what training needs: "
                f"session.register({words})."
            )
        if self.variables and self.outcome == "diverged":
            yield (
                f"each link begins these variables anew: {_list(self.variables)}. Register what "
                f"training needs of them in a dict (session.register(counters=...)), or compute it "
                f"from session.global_step."
            )
        if self.moved or (self.outcome == "diverged" and (self.lost or self.variables)):
            return
        if not self.deterministic:
            yield (
                "the configuration does not say `deterministic: true`, so that torch may choose "
                "operations that give other bits each time."
            )
        if self.outcome == "diverged":
            yield (
                "what differs follows from how often the training function begins: files that it "
                "writes and reads again, state inside DataLoader workers, or a library's."
            )
        else:
            yield (
                "look for time.time(), os.urandom, process ids, an unseeded generator of your own, "
                "the order of a set or of a directory, or threads."
            )

    def _notes(self) -> Iterator[str]:
        if self.outcome != "bit-identical":
            return
        if self.variables:
            yield (
                f"each link begins these variables anew, which changed nothing that is saved or "
                f"logged: {_list(self.variables)}"
            )
        if self.unsteady:
            yield (
                f"not compared: the logged {_list(self.unsteady)}, which differs between any two "
                f"trainings while everything else is the same"
            )
        if not self.deterministic:
            yield (
                "the configuration does not say `deterministic: true`: other hardware, and GPUs "
                "above all, may give other bits each time"
            )


def _word(name: str) -> str:
    """Under what an object can be registered: "dataset.rng" as dataset_rng."""
    word = re.sub(r"\W+", "_", name.removeprefix("self.")).strip("_")
    return f"own_{word}" if word in _TAKEN else word


def _list(items: Sequence[object]) -> str:
    words = [str(item) for item in items[:_MANY]]
    more = len(items) - len(words)
    return ", ".join(words) + (f" and {more} more" if more else "")


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
