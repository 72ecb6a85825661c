"""Tells a webhook that a run is finished, has stopped, or is stalled. Used by the supervisor, at
its very end, and by `drive`, which alone is there to see that a run is stalled.

What is decided is recorded by then: an address that is wrong, slow or down costs a few seconds and
one line of the log, and changes nothing.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping
from urllib.parse import urlsplit

from hpcresume.chain import Decision
from hpcresume.config import NotifyConfig
from hpcresume.run_dir import RunDir

log = logging.getLogger(__name__)

#: How long a link waits for the address, in seconds, whatever holds it up.
_PATIENCE_S = 10.0
#: The row of `chain.decide` that says that a run gets no further.
_NO_PROGRESS = "no_progress_links"
_KINDS = {"finished": "finished", "stop": "stopped"}
_WORDS = {
    "finished": "is finished",
    "stopped": "stops",
    "no_progress": "gets no further, and stops",
    "stalled": "is stalled",
}


def event_of(decision: Decision | None) -> str | None:
    """finished, stopped or no_progress; None where the chain goes on, or was over before."""
    if decision is None:
        return None
    return "no_progress" if decision.rule == _NO_PROGRESS else _KINDS.get(decision.kind)


def tell(
    run: RunDir,
    config: NotifyConfig,
    decision: Decision | None,
    *,
    step: int,
    patience_s: float = _PATIENCE_S,
) -> None:
    """Post the event of a decision to the webhook, if it is one of those that are asked for."""
    event = event_of(decision)
    if decision is not None and event is not None:
        reason, cause = decision.reason, decision.cause.value
        _tell(run, config, event, step=step, cause=cause, reason=reason, patience_s=patience_s)


def tell_stalled(run: RunDir, config: NotifyConfig, reason: str, *, step: int) -> None:
    """Post that a run has neither a job nor a recorded reason for having none."""
    _tell(run, config, "stalled", step=step, cause=None, reason=reason, patience_s=_PATIENCE_S)


def _tell(
    run: RunDir,
    config: NotifyConfig,
    event: str,
    *,
    step: int,
    cause: str | None,
    reason: str,
    patience_s: float,
) -> None:
    if config.url is None or event not in config.events:
        return
    content = {
        "event": event,
        "run": run.name,
        "step": step,
        "cause": cause,
        "reason": reason,
        # What chat programs show of a webhook's message.
        "text": f"{run.name} {_WORDS[event]}: {reason}",
    }
    complaints: list[str] = ["no answer in time"]
    posting = threading.Thread(target=_post, args=(config.url, content, complaints, patience_s))
    # The time limit of a socket is one for each of its answers: only a thread can be left alone.
    posting.daemon = True
    posting.start()
    posting.join(patience_s)
    # The address itself is a secret with most services.
    where = urlsplit(config.url).hostname
    if complaints:
        log.warning("%s was not told that %s %s: %s", where, run.name, event, complaints[-1])
    else:
        log.debug("%s was told that %s %s", where, run.name, event)


def _post(url: str, content: Mapping[str, object], complaints: list[str], limit_s: float) -> None:
    """Post as JSON; `complaints` is empty afterwards where it was taken."""
    data = json.dumps(content).encode()
    try:
        # Here, because it takes its time, and most runs tell nobody.
        import urllib.request

        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=limit_s):
            complaints.clear()
    except Exception as error:
        # Nobody can say what an address of somebody else's makes of a request.
        complaints.append(" ".join(str(error).split())[:200] or type(error).__name__)
