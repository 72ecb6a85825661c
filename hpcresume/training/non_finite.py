"""What follows a logged metric that is not finite: nothing behind it is committed, and the run
stops or goes back. Asked by the session before each commit.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from hpcresume.errors import NonFinite
from hpcresume.training.berth import Berth
from hpcresume.training.record import BadStep, MetricLog
from hpcresume.training.roll_back import RollBack, asked_for
from hpcresume.training.saving import Saver


class Guard:
    """Looks at what all ranks have logged; `back` is the roll-back that this link has made."""

    def __init__(
        self, berth: Berth, metrics: MetricLog, saver: Saver, back: RollBack | None
    ) -> None:
        self._berth = berth
        self._metrics = metrics
        self._saver = saver
        self._back = back

    def verdict(self, step: int) -> NonFinite | RollBack | None:
        """The same on all ranks, which must all ask: None where everything is finite.

        A roll-back is journalled already: the link has to end without a save, behind `step`.
        """
        self._metrics.flush()
        ranks = self._berth.ranks
        found = [BadStep(*bad) for bad in ranks.gather(self._metrics.bad) if bad]
        first = min(found, key=lambda bad: bad.step, default=None)
        told = ranks.broadcast(None if first is None else self._answer(first, step))
        if told is None:
            return None
        return RollBack(**told["back"]) if "back" in told else NonFinite(**told)

    def _answer(self, bad: BadStep, step: int) -> dict[str, Any]:
        """On rank 0, as JSON: where to go back to, or what the error says."""
        self._saver.wait()
        last, number = self._saver.committed, self._berth.link.number
        settings = self._berth.config.checkpoint
        again = self._back is not None and (last is None or last.manifest.link < number)
        if settings.on_non_finite == "roll_back" and not again:
            steps = self._saver.steps()
            back = asked_for(bad, link=number, steps=steps, back=settings.roll_back)
            if back is not None and self._berth.journal is not None:
                asked = {"step": step, "reason": back.reason, **back.to_json()}
                self._berth.journal.write("stop_asked", **asked)
                return {"back": dataclasses.asdict(back)}
        kept = "no state is kept" if last is None else f"no state after step {last.step} is kept"
        words = f"{bad.metric} was {bad.value} in step {bad.step} of epoch {bad.epoch + 1}: {kept}"
        advice = "Mend the cause"
        if again:
            words += ", and the data behind which it came first were left out already"
        elif settings.on_non_finite == "stop":
            advice += ", or set checkpoint.on_non_finite: roll_back"
        message = f"{words}. {advice}, and go on by `hpcresume resume`."
        return {"message": message, "metric": bad.metric, "step": bad.step}
