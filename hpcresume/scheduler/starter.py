"""The two files that a project begins with: hpcresume.yaml and slurm/train.sbatch.

Used by `hpcresume init`. Each says in comments what else may stand there.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What is known of a project; None and empty leave a thing to Slurm, or out."""

    name: str
    train: str
    """file.py:function."""
    time: str
    """Time limit of each job, as sbatch writes it."""
    partition: str | None = None
    account: str | None = None
    gpus: int = 0
    """On each node; as many ranks share it."""
    setup: Sequence[str] = ()
    """Shell lines that make the environment of every job."""

    @property
    def ranks(self) -> int:
        """Ranks on a node: one for each GPU."""
        return max(1, self.gpus)


def run_name(folder: str) -> str:
    """A name for runs of a project in a folder of this name."""
    return _NOT_IN_NAMES.sub("-", folder).strip("-.")[:100] or "train"


def venv_line(folder: str) -> str:
    """How a shell enters a virtual environment."""
    return f"source {shlex.quote(f'{folder}/bin/activate')}"


def conda_line(name: str) -> str:
    """How a batch script, which reads no .bashrc, enters a conda environment."""
    base = '"$(conda info --base)/etc/profile.d/conda.sh"'
    return f"source {base} && conda activate {shlex.quote(name)}"


def yaml_text(answers: Answers) -> str:
    """hpcresume.yaml."""
    return f"""\
# One training as a chain of jobs: `hpcresume submit`, once. What is not said here is left to Slurm,
# or has its default. `hpcresume doctor` holds it against the cluster.
name: {_quoted(answers.name)}
train: {_quoted(answers.train)}
# command: [python, main.py]    # instead of `train`: any command that resumes by itself
epochs: 1                       # complete after so many passes over the data
# max_steps: 10000              # or after so many optimizer steps, whichever comes first
# seed: 0
# deterministic: true           # the same bits every time; may be slower

# args:                         # what the training function finds in session.args
#   lr: 0.001

checkpoint:
  minutes: 30                   # save when so long has passed; auto: what costs least
  # steps: 1000                 # and every so many steps
  keep_last: 5

# chain:
#   max_links: 50               # stop after so many jobs
#   max_hours: 500              # or when they have run so long

scheduler:
  time: {_quoted(answers.time)}
  nodes: 1
  tasks_per_node: {answers.ranks}             # ranks: one for each GPU
{_yaml_resources(answers)}\
  # mem: 64G
  # sbatch:                     # any other option of sbatch, by its long name
  #   mail-type: END,FAIL
{_yaml_setup(answers.setup)}"""


def _yaml_resources(answers: Answers) -> str:
    lines = [
        f"  gpus_per_node: {answers.gpus}" if answers.gpus else "  # gpus_per_node: 1",
        _yaml_word("partition", answers.partition, "gpu"),
        _yaml_word("account", answers.account, "project"),
    ]
    return "".join(f"{line}\n" for line in lines)


def _yaml_word(key: str, value: str | None, example: str) -> str:
    return f"  # {key}: {example}" if value is None else f"  {key}: {_quoted(value)}"


def _yaml_setup(lines: Sequence[str]) -> str:
    """What runs before each job."""
    if not lines:
        return "  # setup:                      # shell lines before the training starts\n" + (
            "  #   - module load cuda\n"
        )
    return "  setup:\n" + "".join(f"    - {_quoted(line)}\n" for line in lines)


def _quoted(text: str) -> str:
    """A text that YAML reads as this text, whatever it is: JSON is YAML."""
    return json.dumps(text, ensure_ascii=False)


def sbatch_text(answers: Answers, config: str) -> str:
    """slurm/train.sbatch, which runs the configuration of that name."""
    options = [
        f"--job-name={answers.name}",
        f"--time={answers.time}",
        "--nodes=1",
        f"--ntasks-per-node={answers.ranks}",
        *([f"--gpus-per-node={answers.gpus}"] if answers.gpus else []),
        *([f"--partition={answers.partition}"] if answers.partition is not None else []),
        *([f"--account={answers.account}"] if answers.account is not None else []),
    ]
    setup = answers.setup or ["# module load cuda"]
    return f"""\
#!/bin/bash
# One training as a chain of jobs, for who likes sbatch better than `hpcresume submit`:
# `sbatch slurm/train.sbatch` in the project's folder, once. This script and the job's real
# options hold for every job of the chain; options on sbatch's command line win.

{"".join(f"#SBATCH {option}{chr(10)}" for option in options)}\
#SBATCH --signal=B:USR2@120     # a hint to look at the clock; the clock itself decides
#SBATCH --no-requeue            # a waiting job of the chain takes over, sooner than a requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log

{"".join(f"{line}{chr(10)}" for line in setup)}
CONFIG={shlex.quote(config)}

trap '' USR2                   # it may come early; hpcresume listens once it has started

exec hpcresume link "$CONFIG" "$@"
"""
