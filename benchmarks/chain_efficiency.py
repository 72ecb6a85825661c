"""How much of the time that a chain holds its jobs it trains, beside submitit's requeue.

Two figures, for links of two hours, one hour and ten minutes:

- of a link: committed training seconds over (limit - start-up - one save - one step), which is
  the most that a link could train. The bars are 0.99, 0.98 and 0.93.
- of wall: the share of the time from the first start to completion, on an idle queue, that was
  training. To be ahead of submitit's at every length.

They come from a model in simulated time (`chain_model`: the production code decides). With
--cluster both tools also train in links of one minute on a real Slurm of this benchmark's own
(tests/slurm_cluster.py; needs root and Debian's packages), beside what the model says of the same
start-up, save, step and gap; the table of long links is then told for those as well. It takes
about half an hour, most of it Slurm's hold of requeued jobs.

    python benchmarks/chain_efficiency.py [--cluster] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from chain_model import ChainPlayed, Inputs, hpcresume_chain, submitit_chain, with_gap

from hpcresume.checkpoint.cadence import Cadence, cadence_of
from hpcresume.config import RunConfig

#: Limits of a link in seconds, and what of the time in it must be committed training.
BARS = {7200.0: 0.99, 3600.0: 0.98, 600.0: 0.93}
#: How long a chain trains, in limits of a link.
LINKS = 8
#: What holds a job that was requeued: Slurm's credential lives for 120 s, and one second more.
HOLD_S = 121.0
_GIB_COPY_S = 0.161
_GIB = 2**30
GB = 10**9

#: 10 GB at 1 GB/s, steps of 2 s, 20 s to start. Training waits for a save 1.15 times as long as one
#: copy in memory takes, and 3.85 times in a link's first one (docs/performance.md). A link leaves
#: within a second of its last commit, and its successor starts 0.4 to 0.6 s after that.
FIXED = Inputs(
    start_up_s=20.0,
    step_s=2.0,
    save_s=10.0,
    first_stall_s=3.85 * _GIB_COPY_S * 10 * GB / _GIB,
    stall_s=1.15 * _GIB_COPY_S * 10 * GB / _GIB,
    gap_s=2.0,
    payload_bytes=10 * GB,
)


@dataclass(frozen=True)
class Row:
    """One tool's chain of one length."""

    tool: str
    limit_s: float
    efficiency: float
    first: float
    of_wall: float
    num_links: int
    late: int
    bar: float | None = None

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return "met" if self.efficiency >= self.bar else "missed"


def row_of(tool: str, played: ChainPlayed, bar: float | None = None) -> Row:
    return Row(
        tool=tool,
        limit_s=played.limit_s,
        efficiency=played.efficiency,
        first=played.first,
        of_wall=played.of_wall,
        num_links=len(played.links),
        late=played.late,
        bar=bar,
    )


def rows(own: Inputs, submitit: Inputs) -> Iterator[Row]:
    """The table: each tool by what it takes itself."""
    for limit_s, bar in BARS.items():
        work_s = LINKS * limit_s
        saving = {
            "": cadence_of(RunConfig().checkpoint),
            ", minutes: auto": Cadence(minutes="auto"),
        }
        for name, cadence in saving.items():
            played = hpcresume_chain(own, limit_s=limit_s, work_s=work_s, cadence=cadence)
            yield row_of(f"hpcresume{name}", played, bar)
        yield row_of("submitit", submitit_chain(submitit, limit_s=limit_s, work_s=work_s))


def as_table(title: str, table: list[Row]) -> str:
    head = ["links of", "chain", "of a link", "bar", "", "its first link", "of wall", "late saves"]
    cells = [
        [
            _words(row.limit_s),
            row.tool,
            f"{row.efficiency:.4f}",
            "" if row.bar is None else f"{row.bar:.2f}",
            row.verdict,
            f"{row.first:.4f}",
            f"{row.of_wall:.4f}",
            f"{row.late} of {row.num_links}",
        ]
        for row in table
    ]
    widths = [max(3, *map(len, column)) for column in zip(head, *cells, strict=True)]
    lines = [head, ["-" * width for width in widths], *cells]
    text = "\n".join(
        f"| {' | '.join(c.ljust(w) for c, w in zip(line, widths, strict=True))} |" for line in lines
    )
    return f"{title}\n\n{text}\n"


def _words(seconds: float) -> str:
    return f"{seconds / 3600:.0f} h" if seconds >= 3600 else f"{seconds / 60:.0f} min"


def _inputs_words(tool: str, inputs: Inputs) -> str:
    return (
        f"{tool}: {inputs.start_up_s:.1f} s to start, steps of {inputs.step_s:.2f} s, saves of "
        f"{inputs.save_s:.2f} s that stall for {inputs.stall_s:.2f} s, {inputs.gap_s:.1f} s between"
        f" a link's last commit and the next job"
    )


def of_cluster(options: argparse.Namespace) -> tuple[dict[str, Inputs], dict[str, list[Row]]]:
    """What both tools take on the test cluster, and the tables that follow from it."""
    from chain_cluster import LIMIT_S, Task, measure

    task = Task(
        num_steps=options.steps,
        payload_bytes=int(options.payload_mb * 1e6),
        signal_s=options.signal,
        hold_s=options.hold,
    )
    own, submitit = measure(task)
    work_s = sum(link.committed_s for link in own.played.links)
    default = cadence_of(RunConfig().checkpoint)
    modelled = hpcresume_chain(own.inputs, limit_s=LIMIT_S, work_s=work_s, cadence=default)
    # A long one: when in a job Slurm looks whether to warn it is chance, and half of such a link.
    other = submitit_chain(
        submitit.inputs, limit_s=LIMIT_S, work_s=20 * work_s, signal_s=options.signal
    )
    one_minute = [
        row_of("hpcresume, measured", own.played),
        row_of("hpcresume, the model", modelled),
        row_of("submitit, measured", submitit.played),
        row_of("submitit, the model", other),
    ]
    held = submitit.inputs if options.hold >= HOLD_S - 1 else with_gap(submitit.inputs, HOLD_S)
    return (
        {"hpcresume": own.inputs, "submitit": submitit.inputs},
        {
            f"{options.payload_mb} MB, links of one minute on the test cluster": one_minute,
            "As measured on the test cluster": list(rows(own.inputs, held)),
        },
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cluster", action="store_true", help="measure on a real Slurm as well")
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")
    parser.add_argument("--steps", type=int, default=800, help="of 0.25 s, in both real chains")
    parser.add_argument("--payload-mb", type=int, default=300, help="state of the real training")
    parser.add_argument(
        "--signal", type=int, default=10, help="submitit's signal in real links, in seconds"
    )
    parser.add_argument(
        "--hold", type=int, default=120, help="life of Slurm's credentials, in seconds"
    )
    return parser.parse_args()


def main() -> None:
    options = arguments()
    tables = {
        "10 GB at 1 GB/s, steps of 2 s, 20 s to start": list(rows(FIXED, with_gap(FIXED, HOLD_S)))
    }
    measured: dict[str, Inputs] = {}
    if options.cluster:
        measured, more = of_cluster(options)
        tables |= more
    if options.json:
        told = {
            title: [{**asdict(row), "verdict": row.verdict} for row in table]
            for title, table in tables.items()
        }
        inputs = {tool: asdict(one) for tool, one in measured.items()}
        print(json.dumps({"measured": inputs, "tables": told}, indent=1))
        return
    for tool, one in measured.items():
        print(_inputs_words(tool, one))
    for title, table in tables.items():
        print(as_table(title, table))


if __name__ == "__main__":
    main()
