"""MLflow: one run over all links, at MLFLOW_TRACKING_URI.

MLflow keeps all that it is told: replayed steps are not told again. It gives ids itself; a run that
was made by a process which died before it could remember the id is found by its tag.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from hpcresume.trackers.tracker import Line, Subject

_TAG = "hpcresume.run"
#: What the server takes at once, of each kind.
_MOST_METRICS, _MOST_PARAMS, _LONGEST_PARAM = 1000, 100, 500
_STATES = {"completed": "FINISHED", "failed": "FAILED", "stopped": "SCHEDULED"}


class MLflow:
    """The run with the id that this run has remembered."""

    def __init__(self, subject: Subject) -> None:
        self._memory = subject.memory
        self._client = MlflowClient()
        self._id = self._memory.id or self._memory.keep_id(self._found(subject))
        self._client.update_run(self._id, status="RUNNING")

    def _found(self, subject: Subject) -> str:
        """The id of the run with our tag, which is made if it is not there."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or subject.project
        known = self._client.get_experiment_by_name(name)
        place = self._client.create_experiment(name) if known is None else known.experiment_id
        for run in self._client.search_runs([place], f"tags.`{_TAG}` = '{subject.id}'"):
            return str(run.info.run_id)
        tags = {_TAG: subject.id}
        made = self._client.create_run(place, run_name=subject.run.name, tags=tags)
        params = [Param(key, str(v)[:_LONGEST_PARAM]) for key, v in subject.args.items()]
        self._client.log_batch(made.info.run_id, params=params[:_MOST_PARAMS])
        return str(made.info.run_id)

    def begin(self, restored: int) -> int:
        """Behind the last step that was told, whatever is replayed."""
        return self._memory.told

    def tell(self, lines: Sequence[Line]) -> None:
        """Send them; the server has them on return."""
        metrics = [
            Metric(name, value, int(line.t * 1000), line.step)
            for line in lines
            for name, value in line.values.items()
        ]
        for begin in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[begin : begin + _MOST_METRICS])
        self._memory.reached(lines[-1].step)

    def close(self, how: str) -> None:
        """Say how the run stands."""
        if how == "stopped":
            self._client.update_run(self._id, status=_STATES[how])
        else:
            self._client.set_terminated(self._id, status=_STATES[how])
