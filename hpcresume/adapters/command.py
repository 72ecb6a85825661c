"""A command as the rank of a link: its thin parent, which `hpcresume rank` becomes for it.

Slurm's signals reach only the direct child of slurmstepd, which this process is. It starts the
command, keeps what it prints, watches the clock and the requests, tells the command when it is
time to leave, and judges how it ended. No torch; the supervisor treats it as any other rank.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpcresume import files
from hpcresume.adapters.child import Child
from hpcresume.adapters.ending import (
    COMPLETED,
    FAILED,
    HANDED_OVER,
    STOPPED,
    Attempt,
    Verdict,
    judge,
    may_have_been_told,
)
from hpcresume.adapters.notes import Notes
from hpcresume.adapters.output import Output
from hpcresume.adapters.sight import Sight
from hpcresume.adapters.variables import command_environment, launcher_patience
from hpcresume.chain import COMMAND
from hpcresume.config import RunConfig, read_frozen
from hpcresume.display.logging import logging_to
from hpcresume.errors import ConfigError
from hpcresume.run_dir import LinkDir, RunDir
from hpcresume.scheduler.environment import RankPlace, rank_place
from hpcresume.signals import SignalFlags, listen
from hpcresume.training.clock import Clock
from hpcresume.training.pace import UNKNOWN_S
from hpcresume.training.requests import requested

log = logging.getLogger("hpcresume.command")

_POLL_S = 0.1
#: Between two looks at clock and requests, and between two at what the command has saved.
_REQUESTS_S = 0.5
_PROGRESS_S = 10.0
_SIGN_S = 2.0
#: After this part of the time that it has to leave, all that is left of it gets SIGTERM.
_PRESSED = 0.75
#: How long before a job's end what is left of a command is killed, in seconds.
_BEFORE_END_S = 1.0
#: How long processes may take that a command left behind, and a signal that is on its way.
_LEFT_BEHIND_S = 5.0
_ON_ITS_WAY_S = 1.0
_LAST_LINES = 40


def run_command(run: RunDir, number: int, environ: Mapping[str, str]) -> int:
    """A command under a supervisor; returns the rank's exit code."""
    run.check_private()
    config = read_frozen(run.config)
    place = rank_place(environ)
    train_log = (run.train_log,) if place.rank == 0 else ()
    # What a supervisor sends for stacks would end this process, which has none to show. A handler
    # and not SIG_IGN, which the command would inherit.
    signal.signal(signal.SIGQUIT, lambda *_: None)
    with listen() as flags, logging_to(*train_log, level=config.log.level):
        parent = _Parent(run, run.link(number), config, place, environ, flags)
        try:
            return parent.serve()
        except ConfigError as error:
            log.error("%s", error)
            parent.record_failure("ConfigError", str(error), error.exit_code, ())
            return error.exit_code


@dataclass
class _Told:
    """The command was told to leave."""

    reason: str
    at: float
    patience_s: float
    gone: bool = False
    """It had left before: what it needs to leave is not measured then."""
    pressed: bool = False
    killed: bool = False


class _Parent:
    """One rank's command in one link."""

    def __init__(
        self,
        run: RunDir,
        link: LinkDir,
        config: RunConfig,
        place: RankPlace,
        environ: Mapping[str, str],
        flags: SignalFlags,
    ) -> None:
        self._run = run
        self._link = link
        self._config = config
        self._place = place
        self._environ = environ
        # A callback of ours hears of it by itself.
        self._signal = config.chain.signal_command or ("none" if config.framework else "TERM")
        self._flags = flags
        self._root = Path(run.identify()["project"])
        self._sight = Sight(config.progress, self._root)
        self._notes: Notes | None = None
        if place.rank == 0:
            job = environ.get("HPCRESUME_JOB_ID")
            self._notes = Notes(run, link, self._sight, self._root, job=job)
        lead_s = float(environ.get("HPCRESUME_LEAD_S", "0"))
        self._clock = Clock(end_time=None, file=link.deadline, lead_s=lead_s, guess_s=0.0)
        self._supervisor = int(environ.get("HPCRESUME_SUPERVISOR", "0"))
        self._signs = 0
        self._signed_at = 0.0

    # ---- the whole -------------------------------------------------------------------------

    def serve(self) -> int:
        """Run the command, again where it may be, until its link is over; the exit code."""
        crashes = int(self._environ.get("HPCRESUME_CRASHES", "0"))
        while True:
            attempt = self._attempt()
            further = self._notes.ended(attempt) if self._notes is not None else False
            # What says that it is done is rank 0's to find; of the others the exit code counts.
            done, missing = self._done() if self._notes is not None else ("", "")
            verdict = judge(attempt, done=done, missing=missing)
            self._say(attempt, verdict)
            crashes = 0 if further else crashes
            crashes += verdict.how == FAILED
            if not self._goes_on(verdict, further, crashes):
                break
        return self._settle(attempt, verdict, bool(done))

    def _goes_on(self, verdict: Verdict, further: bool, crashes: int) -> bool:
        """Start the command again in this job: only where no other rank waits for it."""
        if self._place.world_size > 1 or self._why() is not None:
            return False
        if verdict.how == HANDED_OVER:
            return further
        delay_s = self._config.chain.retry_s
        if verdict.how != FAILED or delay_s is None or crashes > self._config.chain.max_crashes:
            return False
        left = self._clock.remaining_s()
        if left is not None and left - self._clock.lead_s() <= delay_s:
            return False
        assert self._notes is not None
        self._notes.retried(crashes, verdict.reason, delay_s)
        most = self._config.chain.max_crashes + 1
        log.warning("attempt %d of %d follows in %g s", crashes + 1, most, delay_s)
        until = time.monotonic() + delay_s
        while time.monotonic() < until and self._why() is None:
            time.sleep(_POLL_S)
        return self._why() is None

    def _done(self) -> tuple[str, str]:
        """Why the command counts as done, and what it lacks to be done; see `judge`."""
        assert self._notes is not None
        if self._config.progress.done_when:
            return self._sight.done(), self._sight.missing()
        heard = self._notes.heard
        return heard.completed, heard.missing()

    def _settle(self, attempt: Attempt, verdict: Verdict, done: bool) -> int:
        if verdict.how == FAILED and attempt.code > 0:
            self.record_failure(COMMAND, verdict.reason, attempt.exit_code, attempt.lines)
        if self._place.world_size > 1:
            with contextlib.suppress(OSError):
                end = {"how": verdict.how, "reason": verdict.reason, "code": attempt.exit_code}
                files.write_json(self._link.rank_end(self._place.rank), end)
        if self._notes is not None:
            self._notes.settle(self._of_all(verdict, done))
        return attempt.exit_code if verdict.how == FAILED else 0

    def record_failure(self, kind: str, message: str, code: int, lines: tuple[str, ...]) -> None:
        """Tell the supervisor why this rank failed."""
        record = {
            "t": time.time(),
            "type": kind,
            "message": message,
            "step": self._notes.step if self._notes is not None else 0,
            "rank": self._place.rank,
            "traceback": "\n".join(lines),
            "exit_code": code,
        }
        with contextlib.suppress(OSError):
            files.write_json(self._link.rank_failure(self._place.rank), record)

    def _of_all(self, own: Verdict, done: bool) -> Verdict:
        """The verdict over all ranks, for which this one waits; one that fails ends the step.

        Where something says that the command is `done`, they need only leave with 0.
        """
        if own.how != COMPLETED:
            return own
        waiting = set(range(1, self._place.world_size))
        while waiting:
            for rank in sorted(waiting):
                end = files.read_json_or_none(self._link.rank_end(rank))
                if not isinstance(end, dict):
                    continue
                waiting.discard(rank)
                if end.get("how") != COMPLETED and not (done and end.get("code") == 0):
                    reason = str(end.get("reason", ""))
                    return Verdict(how=str(end.get("how")), reason=f"rank {rank}: {reason}")
            if waiting and self._flags.stop_asked() is not None:
                return Verdict(how=STOPPED, reason=self._why() or "")
            time.sleep(_POLL_S if waiting else 0)
        return own

    def _say(self, attempt: Attempt, verdict: Verdict) -> None:
        took = f" {attempt.took_s:.1f} s after it was told" if attempt.told else ""
        killed = ", killed because it did not leave by itself" if attempt.killed else ""
        log.info("the command ended%s: %s%s", took, attempt.words, killed)
        if self._config.framework and self._notes is not None and not self._notes.heard.any:
            log.warning(
                "framework: %s had no effect: no trainer of it was run by the command's Python",
                self._config.framework,
            )
        if verdict.how in (HANDED_OVER, FAILED):
            log.warning("%s: %s", verdict.how, verdict.reason)

    # ---- one attempt -----------------------------------------------------------------------

    def _attempt(self) -> Attempt:
        self._sight.start_anew()
        if self._notes is not None:
            self._notes.started()
        began = time.monotonic()
        child = Child(self._config.command, self._variables(), self._root)
        log.debug("started: %s", " ".join(self._config.command))
        told: _Told | None = None
        with self._kept() as write:
            output = Output(write, self._sight.look_at)
            try:
                told = self._watch(child, output)
            finally:
                child.kill()
                output.feed(child.rest(), time.monotonic())
                output.close()
                code = child.poll()
                child.close()
        now = time.monotonic()
        if self._notes is not None:
            self._notes.hear()
        left = self._notes.heard.left if self._notes is not None else ""
        return Attempt(
            code=-signal.SIGKILL if code is None else code,
            told=told.reason if told else left,
            killed=told.killed if told else False,
            took_s=now - told.at if told and not told.gone else 0.0,
            ran_s=now - began,
            lines=tuple(output.last_lines(_LAST_LINES)),
        )

    def _variables(self) -> dict[str, str]:
        notes, left = self._notes, self._clock.remaining_s()
        newest = notes.newest if notes is not None else self._sight.newest()
        left_s = None if left is None else left - self._clock.lead_s()
        given = command_environment(
            self._environ,
            self._place,
            deadline=None if left_s is None else time.time() + left_s,
            left_s=left_s,
            restarts=notes.restarts - 1 if notes is not None else self._link.number - 1,
            resume=None if newest is None else newest.path,
            framework=self._config.framework,
        )
        return given | launcher_patience(given, self._signal, self._clock.lead_s())

    @contextlib.contextmanager
    def _kept(self) -> Iterator[Callable[[bytes], None]]:
        """Where the output goes: this rank's log, and of rank 0 the log of all links as well."""
        logs = [os.dup(1)]
        if self._place.rank == 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            with contextlib.suppress(OSError):
                logs.append(os.open(self._run.train_log, flags, 0o600))

        def write(data: bytes) -> None:
            for fd in logs:
                # A full disk is no reason to stop.
                with contextlib.suppress(OSError):
                    files.write_all(fd, data)

        try:
            yield write
        finally:
            for fd in logs:
                os.close(fd)

    def _watch(self, child: Child, output: Output) -> _Told | None:
        """Until nothing is left of the command, or had to be killed; whether it was told."""
        told: _Told | None = None
        asked_at = looked_at = 0.0
        gone_at: float | None = None
        while True:
            data = child.read(_POLL_S)
            now = time.monotonic()
            if data:
                self._signs += 1
                output.feed(data, now)
            if gone_at is None and child.poll() is not None:
                gone_at = now
            if now - asked_at >= _REQUESTS_S or gone_at == now:
                asked_at = now
                told = told or self._tell(child, now, gone_at)
                if self._notes is not None:
                    self._signs += self._notes.hear()
                self._sign(told, now)
            if told is not None:
                self._press(child, told, now)
            if now - looked_at >= _PROGRESS_S and self._notes is not None:
                looked_at = now
                self._signs += self._notes.look()
            if gone_at is not None and self._is_over(child, told, now, gone_at):
                return told

    def _tell(self, child: Child, now: float, gone_at: float | None) -> _Told | None:
        """Tell the command to leave, if it is time."""
        reason = self._why()
        code = child.poll()
        # What watches the STOP file may have left before this process looked at it.
        if gone_at is not None and gone_at != now and not may_have_been_told(code or 0):
            return None
        if reason is None and code is not None and may_have_been_told(code):
            # A signal to every process ends the command before this one has seen it.
            until = now + _ON_ITS_WAY_S
            while reason is None and time.monotonic() < until:
                time.sleep(_POLL_S)
                reason = self._why()
        if reason is None:
            return None
        left = self._clock.remaining_s()
        patience = self._clock.lead_s()
        if left is not None:
            patience = min(patience, left - _BEFORE_END_S)
        told = _Told(reason, now, max(_BEFORE_END_S, patience), gone=code is not None)
        if code is None:
            log.info("%s: the command is told to leave, within %.0f s", reason, told.patience_s)
        if self._notes is not None:
            self._notes.told(reason)
        if not self._link.stop.exists():
            with contextlib.suppress(OSError):
                files.write_durably(self._link.stop, f"{reason}\n".encode(), sync=False)
        if self._signal != "none":
            everyone, _, name = self._signal.rpartition(":")
            child.tell(signal.Signals[f"SIG{name}"], everyone=bool(everyone))
        return told

    def _press(self, child: Child, told: _Told, now: float) -> None:
        """What does not leave by itself is told as a whole, and killed in the end."""
        gone = (now - told.at) / told.patience_s
        if gone >= _PRESSED and not told.pressed:
            told.pressed = True
            child.tell(signal.SIGTERM, everyone=True)
        if gone >= 1 and not told.killed:
            told.killed = True
            child.kill()

    def _is_over(self, child: Child, told: _Told | None, now: float, gone_at: float) -> bool:
        """Whether nothing is left of the command; what is, is told to leave as well."""
        left = child.processes()
        if not left or (told is not None and told.killed):
            return True
        if told is not None:
            if not told.pressed:
                told.pressed = True
                child.tell(signal.SIGTERM, everyone=True)
            return False
        if now == gone_at:
            child.tell(signal.SIGTERM, everyone=True)
        return now - gone_at >= _LEFT_BEHIND_S

    def _why(self) -> str | None:
        """Why the command must leave now, or None."""
        asked = self._flags.stop_asked()
        if asked is not None:
            return asked
        if self._clock.due():
            return f"deadline: {self._clock.remaining_s() or 0:.0f} s left"
        if self._supervisor and os.getppid() != self._supervisor:
            return "the supervisor is gone"
        return requested(self._run, self._link)

    def _sign(self, told: _Told | None, now: float) -> None:
        """A sign of life, where somebody looks for it: another one when the command gave one."""
        hang_s = self._config.chain.hang_s
        pause_s = min(_SIGN_S, hang_s / 4) if hang_s else _SIGN_S
        if (self._notes is None and not hang_s) or now - self._signed_at < pause_s:
            return
        self._signed_at = now
        step = 0
        if self._notes is not None:
            # Where silence counts, the passing of time is no sign of life.
            step = self._notes.known if hang_s else self._notes.step
        sign = {
            "n": self._signs,
            "kind": "stop" if told is not None else "command",
            "step": step,
            "limit_s": hang_s or UNKNOWN_S,
        }
        with contextlib.suppress(OSError):
            files.write_json(self._link.beat(self._place.rank), sign, sync=False, indent=None)
