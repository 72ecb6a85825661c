"""Why a link ended, and what follows: the tables of causes and of decisions, row by row."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcresume.chain import (
    PLANNED,
    Budgets,
    Cause,
    Decision,
    Evidence,
    Failure,
    PastLink,
    cause_of,
    decide,
)
from hpcresume.scheduler.job import JobInfo, JobState

quick = settings(database=None, deadline=None, max_examples=150)

#: Budgets that stand in no row's way.
AMPLE = Budgets(no_progress_links=10_000, max_crashes=10_000)


def failure(message: str = "boom", **fields: object) -> Failure:
    return Failure(**{"type": "ValueError", "message": message, "step": 7, **fields})  # type: ignore[arg-type]


def links(*causes: Cause, progress: bool = False, **fields: object) -> list[PastLink]:
    """A chain of such ends, each link beginning where the one before had committed."""
    step = 100
    made = []
    for number, cause in enumerate(causes, start=1):
        after = step + 10 * progress
        made.append(
            PastLink(
                number=number,
                cause=cause,
                first_step=step,
                committed_step=after,
                **fields,  # type: ignore[arg-type]
            )
        )
        step = after
    return made


def crash(
    message: str = "boom", step: int = 7, *, committed: int = 100, first: int = 100
) -> PastLink:
    """A link that an exception ended."""
    return PastLink(
        number=1,
        cause=Cause.EXCEPTION,
        first_step=first,
        committed_step=committed,
        failure=failure(message, step=step),
        detail=f"ValueError: {message} (step {step})",
    )


def last_of(history: Sequence[PastLink], budgets: Budgets = AMPLE) -> Decision:
    return decide(history, budgets)


# Causes


BY_STATE = {
    JobState.PENDING: Cause.UNKNOWN,
    JobState.RUNNING: Cause.UNKNOWN,
    JobState.SUSPENDED: Cause.UNKNOWN,
    JobState.COMPLETING: Cause.UNKNOWN,
    JobState.COMPLETED: Cause.UNKNOWN,
    JobState.FAILED: Cause.KILLED,
    JobState.TIMEOUT: Cause.TIME_LIMIT,
    JobState.CANCELLED: Cause.CANCELLED,
    JobState.PREEMPTED: Cause.PREEMPTED,
    JobState.NODE_FAIL: Cause.NODE_FAILURE,
    JobState.BOOT_FAIL: Cause.NODE_FAILURE,
    JobState.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
    JobState.DEADLINE: Cause.TIME_LIMIT,
    JobState.REQUEUED: Cause.PREEMPTED,
    JobState.UNKNOWN: Cause.UNKNOWN,
}


def ended(state: JobState, **fields: object) -> JobInfo:
    return JobInfo(id="4711", state=state, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("state", JobState)
def test_every_state_of_a_job_has_its_cause(state: JobState) -> None:
    assert cause_of(Evidence(job=ended(state)))[0] is BY_STATE[state]


@pytest.mark.parametrize("state", JobState)
def test_every_cause_by_state_comes_with_a_sentence(state: JobState) -> None:
    assert cause_of(Evidence(job=ended(state)))[1].strip()


def test_nothing_known_is_unknown() -> None:
    assert cause_of(Evidence())[0] is Cause.UNKNOWN


@pytest.mark.parametrize("state", JobState)
def test_completed_record_wins_over_every_state(state: JobState) -> None:
    evidence = Evidence(job=ended(state), completed=True, failure=failure(), user_stop="ann")
    assert cause_of(evidence)[0] is Cause.COMPLETED


@pytest.mark.parametrize("state", JobState)
def test_cancel_request_wins_over_every_state(state: JobState) -> None:
    assert cause_of(Evidence(job=ended(state), user_stop="ann", exit_code=1))[0] is Cause.CANCELLED


@pytest.mark.parametrize(
    "state", [s for s, c in BY_STATE.items() if c not in (Cause.UNKNOWN, Cause.KILLED)]
)
def test_scheduler_is_believed_before_the_exception_that_its_kill_caused(state: JobState) -> None:
    evidence = Evidence(job=ended(state), failure=failure(), how="failed", exit_code=143)
    assert cause_of(evidence)[0] is BY_STATE[state]


@pytest.mark.parametrize("state", [s for s, c in BY_STATE.items() if c is not Cause.CANCELLED])
def test_job_that_the_scheduler_did_not_cancel_is_not_cancelled(state: JobState) -> None:
    assert cause_of(Evidence(job=ended(state)))[0] is not Cause.CANCELLED


@pytest.mark.parametrize("asked", ["STOP", "STOP: enough for today"])
def test_link_that_left_on_a_stop_request_is_stopped(asked: str) -> None:
    assert cause_of(Evidence(how="stopped", asked=asked)) == (Cause.STOPPED, asked)


@pytest.mark.parametrize("asked", ["deadline: 9 s left", "SIGTERM", "SIGINT", ""])
def test_link_that_left_in_time_met_its_deadline(asked: str) -> None:
    assert cause_of(Evidence(how="stopped", asked=asked, exit_code=0)) == (Cause.DEADLINE, asked)


def test_link_that_left_in_time_met_its_deadline_although_a_rank_was_killed_after() -> None:
    evidence = Evidence(how="stopped", asked="deadline: 9 s left", exit_code=137)
    assert cause_of(evidence)[0] is Cause.DEADLINE


@pytest.mark.parametrize(
    ("found", "cause"),
    [
        (failure(), Cause.EXCEPTION),
        (failure(type="OutOfMemoryError", message="CUDA out of memory"), Cause.OUT_OF_MEMORY),
        (failure(type="MemoryError", message=""), Cause.OUT_OF_MEMORY),
        (failure(type="UsageError", exit_code=2), Cause.CONFIGURATION),
        (failure(type="ConfigError", exit_code=4), Cause.CONFIGURATION),
        (failure(type="CheckpointError", exit_code=7), Cause.CONFIGURATION),
        (failure(type="Fenced", exit_code=9), Cause.FENCED),
        (failure(type="SystemExit", message="1"), Cause.EXCEPTION),
        (failure(type="FileNotFoundError", message="[Errno 2] No such file"), Cause.EXCEPTION),
        (failure(type="KeyError", message="No space left"), Cause.EXCEPTION),
        (failure(type="OSError", message="[Errno 24] Too many open files"), Cause.EXCEPTION),
    ],
)
def test_exception_has_its_cause(found: Failure, cause: Cause) -> None:
    assert cause_of(Evidence(failure=found, how="failed", exit_code=found.exit_code))[0] is cause


@pytest.mark.parametrize(
    "code",
    [
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ESTALE,
        errno.EIO,
        errno.EROFS,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ETIMEDOUT,
        errno.EREMOTEIO,
    ],
    ids=errno.errorcode.__getitem__,
)
def test_error_of_a_file_system_is_a_storage_failure(code: int) -> None:
    error = OSError(code, os.strerror(code), "/runs/a/metrics.jsonl")
    found = failure(type=type(error).__name__, message=str(error))
    assert cause_of(Evidence(failure=found, exit_code=1))[0] is Cause.STORAGE


def test_storage_error_of_a_rust_library_is_a_storage_failure() -> None:
    message = "Error while serializing: I/O error: No space left on device (os error 28)"
    found = failure(type="SafetensorError", message=message)
    assert cause_of(Evidence(failure=found))[0] is Cause.STORAGE


def test_unavailable_storage_is_a_storage_failure() -> None:
    found = failure(type="Unavailable", message="the last step could not be saved", exit_code=5)
    assert cause_of(Evidence(failure=found))[0] is Cause.STORAGE


def test_exception_is_told_with_its_step_and_rank() -> None:
    detail = cause_of(Evidence(failure=failure(step=12, rank=3)))[1]
    assert detail == "ValueError: boom (rank 3, step 12)"


def test_exception_is_believed_before_the_state_failed() -> None:
    evidence = Evidence(job=ended(JobState.FAILED, exit_code=1), failure=failure())
    assert cause_of(evidence)[0] is Cause.EXCEPTION


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (1, "a rank left with exit code 1"),
        (128, "a rank left with exit code 128"),
        (137, "a rank was ended by signal 9"),
        (143, "a rank was ended by signal 15"),
    ],
)
def test_exit_code_without_an_exception_is_a_kill(code: int, words: str) -> None:
    assert cause_of(Evidence(exit_code=code)) == (Cause.KILLED, words)


def test_exit_code_zero_alone_says_nothing() -> None:
    assert cause_of(Evidence(exit_code=0))[0] is Cause.UNKNOWN


def test_failed_job_tells_its_signal() -> None:
    detail = cause_of(Evidence(job=ended(JobState.FAILED, exit_code=0, exit_signal=9)))[1]
    assert detail == "job 4711 failed (exit code 0, signal 9)"


# Decisions that end a chain


def test_complete_run_is_finished() -> None:
    assert last_of(links(Cause.COMPLETED, progress=True)).kind == "finished"


def test_complete_run_is_finished_although_every_budget_is_spent() -> None:
    spent = Budgets(max_links=1, max_hours=0.0, no_progress_links=1, max_crashes=0)
    history = [*links(Cause.EXCEPTION, Cause.EXCEPTION, seconds=9e9), *links(Cause.COMPLETED)]
    assert last_of(history, spent).kind == "finished"


def test_cancelled_run_stops_and_names_who_did_it() -> None:
    decision = last_of(links(Cause.CANCELLED, who="ann", detail="job 12"))
    assert (decision.kind, decision.reason) == ("stop", "cancelled by ann (job 12)")


@pytest.mark.parametrize("who", ["", "unknown"])
def test_cancelled_run_without_a_name_says_so(who: str) -> None:
    decision = last_of(links(Cause.CANCELLED, who=who))
    assert (decision.kind, decision.reason) == ("stop", "cancelled by user unknown")


def test_stop_request_stops_with_its_own_words() -> None:
    decision = last_of(links(Cause.STOPPED, detail="STOP: enough", progress=True))
    assert (decision.kind, decision.reason) == ("stop", "STOP: enough")


@pytest.mark.parametrize("cause", Cause)
@pytest.mark.parametrize("detail", ["", " ", "\n"], ids=repr)
def test_end_that_nobody_described_has_a_reason_all_the_same(cause: Cause, detail: str) -> None:
    assert last_of(links(cause, detail=detail)).reason.strip()


def test_configuration_error_stops_with_its_own_words() -> None:
    found = failure("checkpoint: last is 0, and must be 1 or more.", exit_code=4)
    decision = last_of(links(Cause.CONFIGURATION, failure=found, progress=True))
    assert (decision.kind, decision.reason) == ("stop", found.message)


@pytest.mark.parametrize("message", ["", " "])
def test_configuration_error_without_words_still_has_a_reason(message: str) -> None:
    found = failure(message, type="UsageError", exit_code=2)
    assert last_of(links(Cause.CONFIGURATION, failure=found)).reason.strip()


# Decisions that cost nothing


@pytest.mark.parametrize("cause", sorted(PLANNED, key=lambda c: c.value))
def test_planned_end_with_progress_goes_on(cause: Cause) -> None:
    assert last_of(links(cause, progress=True), Budgets()).kind == "continue"


def test_planned_ends_with_progress_are_free_for_ten_thousand_links() -> None:
    causes = [sorted(PLANNED, key=lambda c: c.value)[n % 3] for n in range(10_000)]
    history = links(*causes, progress=True, seconds=3600.0)
    frugal = Budgets(no_progress_links=1, max_crashes=0)
    lengths = [*range(1, 50), *range(50, 10_000, 997), 10_000]
    assert {last_of(history[:n], frugal).kind for n in lengths} == {"continue"}


@pytest.mark.parametrize("cause", sorted(PLANNED, key=lambda c: c.value))
def test_planned_end_tells_the_step_that_stands(cause: Cause) -> None:
    # A save may have failed just then: nothing more than this is known.
    assert "step 100 is committed" in last_of(links(cause)).reason


def test_planned_end_is_due_at_once() -> None:
    assert last_of(links(Cause.TIME_LIMIT, progress=True)).delay_s == 0


def test_node_failure_goes_on_elsewhere() -> None:
    decision = last_of(links(Cause.NODE_FAILURE, nodes=("n1", "n2"), progress=True))
    assert (decision.kind, decision.exclude_nodes) == ("continue", ("n1", "n2"))


def test_only_a_node_failure_excludes_nodes() -> None:
    others = [c for c in Cause if c is not Cause.NODE_FAILURE]
    assert not any(last_of(links(c, nodes=("n1",))).exclude_nodes for c in others)


# Storage


def test_delay_after_storage_failures_doubles_up_to_an_hour() -> None:
    history = links(*[Cause.STORAGE] * 10, detail="OSError: No space left on device")
    delays = [last_of(history[:n]).delay_s for n in range(1, 11)]
    assert delays == [30, 60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_delay_after_storage_failures_begins_anew_after_another_end() -> None:
    history = links(Cause.STORAGE, Cause.STORAGE, Cause.PREEMPTED, Cause.STORAGE)
    assert last_of(history).delay_s == 30


def test_delay_after_storage_failures_begins_anew_on_progress() -> None:
    history = links(*[Cause.STORAGE] * 6, progress=True)
    assert last_of(history).delay_s == 30


def test_delay_grows_again_after_a_storage_failure_with_progress() -> None:
    history = [*links(Cause.STORAGE, progress=True), *links(Cause.STORAGE, Cause.STORAGE)]
    assert last_of(history).delay_s == 60


def test_full_disk_twice_at_one_step_is_not_blamed_on_the_code() -> None:
    found = failure("[Errno 28] No space left on device", type="OSError")
    assert last_of(links(Cause.STORAGE, Cause.STORAGE, failure=found)).kind == "continue"


def test_storage_that_never_recovers_ends_with_the_no_progress_budget() -> None:
    history = links(*[Cause.STORAGE] * 3)
    assert last_of(history, Budgets(no_progress_links=3)).kind == "stop"


def test_only_storage_waits() -> None:
    others = [c for c in Cause if c is not Cause.STORAGE]
    assert not any(last_of(links(c, c)).delay_s for c in others)


# The same failure twice


def test_same_exception_at_the_same_step_twice_without_progress_stops() -> None:
    decision = last_of([crash(), crash()])
    assert decision.kind == "stop" and "ValueError: boom in step 7" in decision.reason


def test_same_exception_once_goes_on() -> None:
    assert last_of([crash()]).kind == "continue"


def test_same_exception_with_progress_between_goes_on() -> None:
    assert last_of([crash(), crash(committed=104)]).kind == "continue"


@pytest.mark.parametrize("other", [crash("bang"), crash(step=8)], ids=["message", "step"])
def test_another_exception_or_step_goes_on(other: PastLink) -> None:
    assert last_of([crash(), other]).kind == "continue"


def test_same_exception_stops_although_another_end_without_progress_lies_between() -> None:
    assert last_of([crash(), *links(Cause.PREEMPTED), crash()]).kind == "stop"


def test_progress_of_a_link_between_forgives_the_same_exception() -> None:
    history = [crash(), *links(Cause.PREEMPTED, progress=True), crash()]
    assert last_of(history).kind == "continue"


def test_out_of_memory_at_the_same_step_twice_stops_whatever_was_free() -> None:
    found = [failure(f"CUDA: {free} MiB free", type="OutOfMemoryError") for free in (3, 4)]
    history = [links(Cause.OUT_OF_MEMORY, failure=one)[0] for one in found]
    assert last_of(history).kind == "stop"


def test_another_type_of_exception_goes_on() -> None:
    other = dataclasses.replace(crash(), failure=failure(type="KeyError"))
    assert last_of([crash(), other]).kind == "continue"


@pytest.mark.parametrize("cause", [Cause.NODE_FAILURE, Cause.PREEMPTED, Cause.TIME_LIMIT])
def test_exception_that_an_outside_end_caused_is_not_blamed_on_the_code(cause: Cause) -> None:
    history = links(cause, cause, failure=failure("Connection reset by peer"))
    assert last_of(history).kind == "continue"


def test_exception_that_a_preemption_caused_before_does_not_count_as_the_first() -> None:
    history = [*links(Cause.PREEMPTED, failure=crash().failure), crash()]
    assert last_of(history).kind == "continue"


# The crash budget


def crashes(count: int) -> list[PastLink]:
    return [crash(f"boom {n}") for n in range(count)]


def test_crashes_within_their_budget_go_on() -> None:
    assert last_of(crashes(3), Budgets(no_progress_links=99, max_crashes=3)).kind == "continue"


def test_crashes_beyond_their_budget_stop_with_the_numbers() -> None:
    decision = last_of(crashes(4), Budgets(no_progress_links=99, max_crashes=3))
    assert decision.kind == "stop"
    assert "4 links failed" in decision.reason and "allowed: 3" in decision.reason


def test_crash_budget_begins_anew_on_progress() -> None:
    history = [*crashes(3), crash("with progress", committed=110), *crashes(3)]
    assert last_of(history, Budgets(no_progress_links=99, max_crashes=3)).kind == "continue"


def test_crashes_with_progress_each_are_free() -> None:
    history = [crash(f"boom {n}", first=n, committed=n + 1) for n in range(1000)]
    assert last_of(history, Budgets(no_progress_links=1, max_crashes=0)).kind == "continue"


@pytest.mark.parametrize("cause", [Cause.KILLED, Cause.EXCEPTION, Cause.OUT_OF_MEMORY])
def test_crash_without_a_record_counts_as_a_crash(cause: Cause) -> None:
    history = links(cause, cause)
    assert last_of(history, Budgets(no_progress_links=99, max_crashes=1)).kind == "stop"


@pytest.mark.parametrize("cause", [Cause.UNKNOWN, Cause.NODE_FAILURE, Cause.STORAGE])
def test_end_that_is_no_crash_spends_no_crash_budget(cause: Cause) -> None:
    history = [*links(cause, cause, cause), crash()]
    assert last_of(history, Budgets(no_progress_links=99, max_crashes=1)).kind == "continue"


def test_planned_end_between_crashes_does_not_refill_their_budget() -> None:
    history = [crash("one"), *links(Cause.PREEMPTED), crash("two")]
    assert last_of(history, Budgets(no_progress_links=99, max_crashes=1)).kind == "stop"


# The no-progress budget


@pytest.mark.parametrize(
    "cause",
    [*sorted(PLANNED, key=lambda c: c.value), Cause.UNKNOWN, Cause.NODE_FAILURE, Cause.KILLED],
)
def test_links_without_a_new_step_spend_the_no_progress_budget(cause: Cause) -> None:
    history = links(cause, cause, cause)
    kinds = [last_of(history[:n], Budgets(no_progress_links=3)).kind for n in (1, 2, 3)]
    assert kinds == ["continue", "continue", "stop"]


def test_no_progress_stop_tells_number_limit_step_and_last_end() -> None:
    history = links(Cause.UNKNOWN, Cause.TIME_LIMIT, Cause.PREEMPTED, detail="job 5: PREEMPTED")
    reason = last_of(history, Budgets()).reason
    assert "3 links" in reason and "no_progress_links: 3" in reason
    assert "step 100" in reason and "preempted: job 5: PREEMPTED" in reason


def test_no_progress_budget_begins_anew_on_progress() -> None:
    idle = links(Cause.DEADLINE, Cause.DEADLINE)
    history = [*idle, *links(Cause.DEADLINE, progress=True), *idle]
    assert last_of(history, Budgets(no_progress_links=3)).kind == "continue"


def test_unknown_end_with_progress_is_free() -> None:
    history = links(*[Cause.UNKNOWN] * 50, progress=True)
    assert last_of(history, Budgets(no_progress_links=1, max_crashes=0)).kind == "continue"


# Links and hours


def test_links_within_max_links_go_on() -> None:
    history = links(Cause.TIME_LIMIT, progress=True)
    assert last_of(history, Budgets(max_links=2)).kind == "continue"


def test_max_links_stops_with_the_numbers() -> None:
    history = links(Cause.TIME_LIMIT, Cause.TIME_LIMIT, progress=True)
    decision = last_of(history, Budgets(max_links=2))
    assert decision.kind == "stop" and decision.reason == "2 links are used up (max_links: 2)"


def test_hours_within_max_hours_go_on() -> None:
    history = links(Cause.TIME_LIMIT, progress=True, seconds=3599.0)
    assert last_of(history, Budgets(max_hours=1.0)).kind == "continue"


def test_max_hours_stops_with_the_numbers() -> None:
    history = links(Cause.TIME_LIMIT, Cause.TIME_LIMIT, progress=True, seconds=4500.0)
    decision = last_of(history, Budgets(max_hours=2.5))
    assert decision.kind == "stop" and decision.reason == "2.5 hours are used up (max_hours: 2.5)"


# Of any history


texts = st.text(max_size=8)
steps = st.integers(0, 5)
failures = st.builds(
    Failure, type=texts, message=texts, step=steps, exit_code=st.sampled_from([1, 2, 4, 7, 9, 143])
)
past_links = st.builds(
    PastLink,
    number=st.integers(1, 9),
    cause=st.sampled_from(Cause),
    first_step=steps,
    committed_step=steps,
    failure=st.none() | failures,
    who=texts,
    detail=texts,
    seconds=st.floats(0, allow_nan=False),
    nodes=st.lists(texts, max_size=2).map(tuple),
)
budgets = st.builds(
    Budgets,
    max_links=st.none() | st.integers(1, 9),
    max_hours=st.none() | st.floats(0, allow_nan=False),
    no_progress_links=st.integers(1, 9),
    max_crashes=st.integers(0, 9),
)
evidences = st.builds(
    Evidence,
    job=st.none() | st.builds(ended, st.sampled_from(JobState), raw_state=texts),
    completed=st.booleans(),
    how=st.sampled_from(["", "completed", "stopped", "failed", "odd"]),
    asked=texts | st.just("STOP"),
    failure=st.none() | failures,
    exit_code=st.none() | st.integers(-15, 255),
    user_stop=texts,
)


@quick
@given(st.lists(past_links, min_size=1, max_size=12), budgets)
def test_every_history_gets_a_decision_of_a_known_kind(
    history: list[PastLink], limits: Budgets
) -> None:
    assert decide(history, limits).kind in ("finished", "stop", "continue")


@quick
@given(st.lists(past_links, min_size=1, max_size=12), budgets)
def test_every_decision_has_a_reason(history: list[PastLink], limits: Budgets) -> None:
    assert decide(history, limits).reason.strip()


@quick
@given(st.lists(past_links, min_size=1, max_size=12), budgets)
def test_decision_depends_on_nothing_but_its_arguments(
    history: list[PastLink], limits: Budgets
) -> None:
    assert decide(history, limits) == decide(list(history), dataclasses.replace(limits))


@quick
@given(st.lists(past_links, min_size=1, max_size=12), budgets)
def test_chain_that_goes_on_has_progressed_within_its_no_progress_budget(
    history: list[PastLink], limits: Budgets
) -> None:
    if decide(history, limits).kind == "continue":
        recent = history[-limits.no_progress_links :]
        assert len(recent) < limits.no_progress_links or any(link.progressed for link in recent)


@quick
@given(evidences)
def test_every_evidence_has_a_cause(evidence: Evidence) -> None:
    assert isinstance(cause_of(evidence)[0], Cause)


@quick
@given(evidences)
def test_only_a_completed_record_completes_a_run(evidence: Evidence) -> None:
    assert (cause_of(evidence)[0] is Cause.COMPLETED) == evidence.completed
