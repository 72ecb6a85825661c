"""`hpcresume verify`: whether cutting a training changes a bit of it.

A few steps are trained without a cut, twice, and then once more in three links, one of them of no
step; each link in fresh processes, in run directories of their own below a temporary folder.

**Compared** are, at the last step: every tensor of every safetensors file of the checkpoint, byte
by byte; every other value of every registered object; the random state of every rank and
generator; the position in the data, the counters and the best metric; all files that a tokenizer
wrote; and every number that was logged at any step, to its last bit. Left out is what tells
one link from another: durations, the lineage, the machine.

**Not saved, and looked at all the same**: what the training function, its callers and the user's
modules hold in variables. An optimizer, a module, a scheduler, a generator or anything else with a
`state_dict` that was never registered, is not in the third link what it was when the first left,
and ends differently, is a divergence: the cut has lost it. Of plain numbers, arrays and lists the
same is a note.

**The verdicts**

    bit-identical      exit code 0
    diverged           7   the first component by name, its step, what is likely to be the reason
    not reproducible   7   the two uncut trainings differ already: no link is to blame

If the training itself fails, its exit code and the place of its traceback are given, and the run
directories stay. A logged number that differs between the two uncut trainings, while nothing that
is saved does (samples per second, say), is left out and named.

What holds for K steps need not hold for an epoch's end, or for an evaluation at step 1000: `steps`
chooses another K. It holds for this machine, this number of ranks and these library versions.

    links      runs one link in fresh processes
    watch      a rank that looks at what its training holds; search finds it, digest sums it up
    looks      what ranks saw, and what of it a cut has lost; needs no torch
    scratch    the folder that the runs lie in
    compare    two runs, as differences; needs no torch
    verdict    the outcome in words
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hpcresume.config import RunConfig
from hpcresume.errors import HpcResumeError, UsageError
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.verify import compare, looks
from hpcresume.verify.compare import Difference
from hpcresume.verify.links import LinkEnd, make_run, run_link
from hpcresume.verify.looks import Lost
from hpcresume.verify.scratch import scratch_folder
from hpcresume.verify.verdict import Outcome, Verdict, outcome_of

__all__ = ["DEFAULT_STEPS", "LEAST_STEPS", "Verdict", "verify"]

DEFAULT_STEPS = 12
LEAST_STEPS = 3


def verify(
    config: RunConfig,
    *,
    project: Path,
    steps: int | None = None,
    ranks: int = 1,
    keep: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Verdict:
    """Train a configuration uncut, uncut again, and cut; compare.

    `project` is the folder of the code; `keep` a folder for the runs, which are removed otherwise;
    `say` gets a line for each phase. Raises LinkFailed where the training fails, UsageError where
    it is too short to be cut, or where `keep` is in use.
    """
    if config.command:
        raise UsageError(
            "verify compares what a training function registers, which a command has not: "
            "`hpcresume rehearse -- COMMAND` tries whether it survives a chain."
        )
    with scratch_folder(keep, "verify") as folder:
        return _Verification(config, project, folder, ranks, say).verify(
            steps or min(DEFAULT_STEPS, max(config.max_steps or DEFAULT_STEPS, LEAST_STEPS)),
            kept=None if keep is None else folder,
        )


class _Verification:
    """One verification; the methods follow each other in the order of the module's text."""

    def __init__(
        self,
        config: RunConfig,
        project: Path,
        folder: Path,
        ranks: int,
        say: Callable[[str], None],
    ) -> None:
        self._config = config
        self._ranks = ranks
        self._say = say
        self._began = time.monotonic()
        self._uncut, self._again, self._cut = (
            make_run(folder / name, config, project) for name in ("uncut", "uncut-again", "cut")
        )

    def verify(self, steps: int, *, kept: Path | None) -> Verdict:
        """The verdict on so many steps, or on as many as the training has."""
        say = self._say
        word = "rank" if self._ranks == 1 else "ranks"
        sure = str(self._config.deterministic).lower()
        say(f"{self._config.train}: {steps} steps, {self._ranks} {word}, deterministic: {sure}")
        first = self._link(self._uncut, steps, "without a cut")
        reached = first.step
        if reached < 2:
            raise UsageError(
                f"The training is complete after {reached} step{'' if reached == 1 else 's'}: "
                f"there is no place for a cut. Give it more data, or more steps by --set."
            )
        second = self._link(self._again, steps, "without a cut, again")
        logged = compare.logged(self._uncut, self._again)
        chance = self._differences(first, second, self._again)
        if chance:
            return self._verdict(
                "not reproducible",
                reached,
                kept=kept,
                differences=(*logged, *chance),
                moved=self._moved(),
            )
        # Without any difference in what is saved, these tell of time and not of the training.
        unsteady = tuple(difference.name for difference in logged)

        cut_at = reached // 2
        self._link(self._cut, cut_at, "first link", expected=cut_at)
        self._link(self._cut, cut_at, "second link, of no step", expected=cut_at)
        last = self._link(self._cut, steps, "third link")
        logged = [d for d in compare.logged(self._uncut, self._cut) if d.name not in unsteady]
        differences = (*logged, *self._differences(first, last, self._cut))
        begun_anew = self._lost()
        lost = tuple(item for item in begun_anew if item.stateful)
        return self._verdict(
            outcome_of(differences, lost, cut_at),
            reached,
            cut_at=cut_at,
            kept=kept,
            differences=differences,
            lost=lost,
            variables=tuple(item for item in begun_anew if not item.stateful),
            unsteady=unsteady,
        )

    def _link(self, run: RunDir, stop_at: int, word: str, expected: int | None = None) -> LinkEnd:
        end = run_link(run, ranks=self._ranks, stop_at=stop_at)
        self._say(f"  {word:<24} at step {end.step:<5} {end.seconds:5.1f} s")
        if expected is not None and end.step != expected:
            raise HpcResumeError(
                f"The {word} was to leave after step {expected} and left after step {end.step}: "
                f"the training's length changes from one time to the next."
            )
        return end

    def _differences(self, one: LinkEnd, other: LinkEnd, run: RunDir) -> list[Difference]:
        """What the last checkpoint of a run does not have in common with the uncut one's."""
        if one.step != other.step:
            return [Difference("progress", "the last step", str(one.step), str(other.step))]
        pair = self._uncut.checkpoint(one.step), run.checkpoint(other.step)
        return list(compare.saved(*pair))

    # ---- what is in no checkpoint ----------------------------------------------------------

    def _moved(self) -> tuple[Lost, ...]:
        """What two trainings hold differently before their first step."""
        return self._of_all_ranks(looks.moved, self._uncut.link(1), self._again.link(1))

    def _lost(self) -> tuple[Lost, ...]:
        """What the third link began anew."""
        whole = self._uncut.link(1), self._again.link(1)
        return self._of_all_ranks(looks.lost, *whole, self._cut.link(1), self._cut.link(3))

    def _of_all_ranks(
        self, find: Callable[..., Iterable[Lost]], *links: LinkDir
    ) -> tuple[Lost, ...]:
        """What `find` makes of each rank's looks; what it finds in several is told once."""
        found: dict[str, Lost] = {}
        for rank in range(self._ranks):
            for lost in find(rank, *(looks.read_looks(link, rank) for link in links)):
                found.setdefault(lost.name, lost)
        return tuple(found.values())

    # ---- the end ---------------------------------------------------------------------------

    def _verdict(self, outcome: Outcome, steps: int, **found: Any) -> Verdict:
        last = self._uncut.checkpoint(steps)
        return Verdict(
            outcome=outcome,
            train=self._config.train,
            steps=steps,
            ranks=self._ranks,
            deterministic=self._config.deterministic,
            tensors=compare.tensor_count(last),
            logged_steps=compare.logged_steps(self._uncut),
            seconds=round(time.monotonic() - self._began, 1),
            **{"cut_at": 0, **found},
        )
