"""What follows from the findings: for the chain, and for the exit code. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcresume.errors import ConfigError
from hpcresume.scheduler.doctor.facts import Finding, Wishes, failure, good, warning
from hpcresume.scheduler.doctor.way import Way
from hpcresume.scheduler.doctor.words import counted


def judge_way(way: Way, wishes: Wishes) -> Iterator[Finding]:
    """What follows for the chain: the way, the signal, the lead time."""
    ahead = f", {counted(way.ahead, 'job')} ahead" if way.ahead else ""
    what = f"{way.mode}{ahead}: {'; '.join(way.reasons)}"
    if way.mode == "drive":
        remedy = "submit with --set chain.mode=drive, and let `hpcresume drive NAME` run there"
        yield failure("way", what, f"{remedy} (or after each job: hpcresume resume NAME)")
    elif wishes.mode == "auto" and way.mode != "prequeue":
        yield warning("way", what, f"submit with --set chain.mode={way.mode}")
    elif wishes.mode == "auto" and way.ahead != wishes.ahead:
        yield warning("way", what, f"submit with --set chain.ahead={way.ahead}")
    else:
        yield good("way", what)
    if wishes.cluster == "slurm":
        yield good(
            "signal",
            f"{wishes.signal}, a hint to the supervisor alone; the clock decides",
        )
    if wishes.lead_s is None:
        yield good("lead time", "learned from the run: a save, the longest step, a margin")
    else:
        yield good("lead time", f"saves {wishes.lead_s:g} s before a job's end, as configured")


@dataclass(frozen=True, kw_only=True)
class Tally:
    """How many findings there are of each grade."""

    failures: int = 0
    warnings: int = 0
    goods: int = 0

    def words(self) -> str:
        """As in: 1 failure, 2 warnings, 20 good."""
        kinds = [(self.failures, "failure"), (self.warnings, "warning")]
        parts = [counted(number, word) for number, word in kinds if number]
        return ", ".join([*parts, f"{'all ' if not parts else ''}{self.goods} good"]) + "."

    def exit_code(self, *, strict: bool) -> int:
        """4 for failures, 1 for warnings where they count, else 0."""
        if self.failures:
            return ConfigError.exit_code
        return 1 if strict and self.warnings else 0


def tally(findings: Sequence[Finding]) -> Tally:
    """The count of each grade."""
    grades = [finding.grade for finding in findings]
    return Tally(
        failures=grades.count("failure"),
        warnings=grades.count("warning"),
        goods=grades.count("good"),
    )
