"""The living jobs of runs, with one question to Slurm for all of them.

Used by every view that shows several runs, or one again and again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping

from hpcresume.errors import Unavailable
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.choice import asking_scheduler
from hpcresume.scheduler.job import JobInfo
from hpcresume.scheduler.slurm_clients import SlurmClients
from hpcresume.story import TOKEN, token_prefix


class LivingJobs:
    """What the scheduler knows of runs. Threads may share it."""

    def __init__(
        self, environ: Mapping[str, str], *, max_age_s: float = math.inf, patience_s: float = 10.0
    ) -> None:
        """Slurm is asked again when its answer is older than `max_age_s`: by default, never.

        Nobody waits for an answer longer than `patience_s`, or where there is an older one: that
        stands meanwhile, for as long.
        """
        self._environ = environ
        self._max_age_s = max_age_s
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._asking: threading.Thread | None = None
        self._answer: dict[str, list[JobInfo]] | str | None = None
        self._asked_at = -math.inf

    def of(self, run: RunDir) -> tuple[list[JobInfo] | None, str]:
        """The living jobs of a run; None where nobody can tell, and why. Raises NotFound."""
        try:
            identity = run.identify()
            prefix = token_prefix(identity["id"])
            if identity["cluster"] != "slurm":
                scheduler = asking_scheduler(run, self._environ)
                return ([] if scheduler is None else scheduler.find(prefix)), ""
            answer = self._of_all()
        except Unavailable as error:
            return None, str(error)
        if isinstance(answer, str):
            return None, answer
        return answer.get(prefix, []), ""

    def _of_all(self) -> dict[str, list[JobInfo]] | str:
        """Our jobs in Slurm by their runs' prefixes; a sentence where no answer came in time."""
        with self._lock:
            old = time.monotonic() - self._asked_at > self._max_age_s
            if self._asking is None and (self._answer is None or old):
                # A thread of its own: a Slurm that is stuck must not hold up who asks.
                self._asked_at = time.monotonic()
                self._asking = threading.Thread(target=self._ask, daemon=True)
                self._asking.start()
            asking, until = self._asking, self._asked_at + self._patience_s
            known = self._answer
        if asking is not None and known is None:
            asking.join(max(0.0, until - time.monotonic()))
        with self._lock:
            late = self._asking is not None and time.monotonic() >= until
            if late or self._answer is None:
                return f"squeue gave no answer in {self._patience_s:g} s"
            return self._answer

    def _ask(self) -> None:
        answer: dict[str, list[JobInfo]] | str | None = None
        try:
            found: dict[str, list[JobInfo]] = {}
            for job in SlurmClients(self._environ).living(TOKEN + ":"):
                run_id, colon, _ = job.token[len(TOKEN) + 1 :].partition(":")
                found.setdefault(token_prefix(run_id) if colon else "", []).append(job)
            answer = found
        except Unavailable as error:
            answer = str(error)
        finally:
            with self._lock:
                self._answer, self._asking = answer, None
