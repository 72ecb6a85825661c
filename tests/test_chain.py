"""Why a link ended, and what follows: the tables of causes and of decisions, row by row."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_run import add_link, end_link, make_run, training
from slurm_cluster import wait_until

from hpcresume import files
from hpcresume.chain import (
    CRASHES,
    MEMORY,
    MOST_EXCLUDED,
    NODE_CAUSES,
    PLANNED,
    Budgets,
    Cause,
    Decision,
    Evidence,
    Failure,
    PastLink,
    bad_nodes,
    cause_named,
    cause_of,
    decide,
)
from hpcresume.history import last_lines, past_link, past_links
from hpcresume.run_dir import RunDir
from hpcresume.scheduler.job import JobInfo, JobState
from hpcresume.story import read_story
from hpcresume.training.heartbeat import Heartbeat

quick = settings(
    database=None,
    deadline=None,
    max_examples=150,
    # By the clock, and so by what else the machine does.
    suppress_health_check=[HealthCheck.too_slow],
)

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
        cause=Cause.USER_CODE,
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
    JobState.BOOT_FAIL: Cause.BOOT_FAILURE,
    JobState.OUT_OF_MEMORY: Cause.HOST_MEMORY,
    JobState.DEADLINE: Cause.EXPIRED,
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


#: What the ranks left behind, and the cause where the scheduler's word does not win.
LEFT: dict[str, tuple[dict[str, object], Cause]] = {
    "nothing": ({}, Cause.UNKNOWN),
    "deadline": ({"how": "stopped", "asked": "deadline: 9 s left"}, Cause.DEADLINE),
    "stop": ({"how": "stopped", "asked": "STOP"}, Cause.STOPPED),
    "exception": ({"how": "failed", "failure": failure(), "exit_code": 1}, Cause.USER_CODE),
    "non-finite": ({"failure": failure(type="NonFinite"), "exit_code": 8}, Cause.NON_FINITE),
    "hung": ({"how": "hung", "exit_code": 137}, Cause.HANG),
    "memory": ({"failure": failure(type="MemoryError"), "exit_code": 1}, Cause.HOST_MEMORY),
    "kill": ({"exit_code": 137}, Cause.KILLED),
    "srun's memory": ({"exit_code": 253}, Cause.HOST_MEMORY),
}
#: States that say of themselves why a job ended.
TELLING = [s for s, c in BY_STATE.items() if c not in (Cause.UNKNOWN, Cause.KILLED)]


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("state", JobState)
def test_state_that_tells_a_cause_wins_over_what_the_ranks_left(state: JobState, left: str) -> None:
    fields, cause = LEFT[left]
    evidence = Evidence(job=ended(state), **fields)  # type: ignore[arg-type]
    fallen = Cause.KILLED if left == "nothing" and state is JobState.FAILED else cause
    # Nothing that befalls a job makes a loss not finite; only who cancels it wants no more of it.
    own = cause is Cause.NON_FINITE and state is not JobState.CANCELLED
    assert cause_of(evidence)[0] is (BY_STATE[state] if state in TELLING and not own else fallen)


@pytest.mark.parametrize("left", LEFT)
def test_every_cause_of_what_the_ranks_left_comes_with_a_sentence(left: str) -> None:
    assert cause_of(Evidence(**LEFT[left][0]))[1].strip()  # type: ignore[arg-type]


def test_step_over_the_memory_limit_is_told_by_the_job_that_failed_with_its_signal() -> None:
    job = ended(JobState.FAILED, exit_code=0, exit_signal=125)
    assert cause_of(Evidence(job=job))[0] is Cause.HOST_MEMORY


LAST_WORDS = {
    "slurmstepd: error: Detected 1 oom_kill event in StepId=27.0.": Cause.HOST_MEMORY,
    "slurmstepd: error: Detected 1 oom-kill event(s) in step 9.0 cgroup.": Cause.HOST_MEMORY,
    "slurmstepd: error: Exceeded job memory limit": Cause.HOST_MEMORY,
    "srun: error: k1: task 3: Out Of Memory": Cause.HOST_MEMORY,
    "srun: error: k1: tasks 0,2-3: Out Of Memory": Cause.HOST_MEMORY,
    "terminate called: CUDA error: out of memory": Cause.GPU_MEMORY,
    "[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)": Cause.HANG,
    "cp: error writing 'x': No space left on device": Cause.STORAGE,
    "loss 2.1, no word about its end": Cause.KILLED,
}


@pytest.mark.parametrize("line", LAST_WORDS)
def test_rank_that_was_killed_is_told_by_its_last_words(line: str) -> None:
    evidence = Evidence(exit_code=137, last_words=f"step 1\n{line}\nstep 2")
    cause, detail = cause_of(evidence)
    assert cause is LAST_WORDS[line]
    assert (line in detail) == (cause is not Cause.KILLED)


LOST = failure("[gloo/pair.cc:534] Connection closed by peer [127.0.0.1]:4", type="RuntimeError")


@pytest.mark.parametrize("line", LAST_WORDS)
def test_rank_that_lost_another_leaves_it_to_the_last_words(line: str) -> None:
    cause, detail = cause_of(Evidence(exit_code=1, failure=LOST, last_words=line))
    assert cause is LAST_WORDS[line]
    assert (line if cause is not Cause.KILLED else "closed by peer") in detail


def test_last_words_are_no_evidence_where_an_exception_tells_more() -> None:
    words = "slurmstepd: error: Detected 1 oom_kill event in StepId=27.0."
    assert cause_of(Evidence(failure=failure(), last_words=words))[0] is Cause.USER_CODE


def test_last_words_are_no_evidence_where_the_link_left_in_time() -> None:
    words = "CUDA error: out of memory"
    evidence = Evidence(how="stopped", asked="deadline: 9 s left", last_words=words, exit_code=0)
    assert cause_of(evidence)[0] is Cause.DEADLINE


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
        (failure(), Cause.USER_CODE),
        (failure(type="OutOfMemoryError", message="CUDA out of memory"), Cause.GPU_MEMORY),
        (failure(type="MemoryError", message=""), Cause.HOST_MEMORY),
        (failure(type="UsageError", exit_code=2), Cause.CONFIGURATION),
        (failure(type="ConfigError", exit_code=4), Cause.CONFIGURATION),
        (failure(type="CheckpointError", exit_code=7), Cause.CONFIGURATION),
        (failure(type="Fenced", exit_code=9), Cause.FENCED),
        (failure(type="SystemExit", message="1"), Cause.USER_CODE),
        (failure(type="NonFinite", message="loss is nan", exit_code=8), Cause.NON_FINITE),
        (failure(type="Hang", message="no step for 600 s"), Cause.HANG),
        (
            failure(
                type="DistBackendError", message="Watchdog caught collective operation timeout"
            ),
            Cause.HANG,
        ),
        (failure(type="RuntimeError", message="CUDA out of memory. Tried"), Cause.GPU_MEMORY),
        (
            failure(type="RuntimeError", message="CUDA error: CUBLAS_STATUS_ALLOC_FAILED when"),
            Cause.GPU_MEMORY,
        ),
        (
            failure(
                type="RuntimeError",
                message="[enforce fail at alloc_cpu.cpp:1] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 9 bytes.",
            ),
            Cause.HOST_MEMORY,
        ),
        (
            failure(
                type="RuntimeError",
                message="DataLoader worker (pid 9) is killed by signal: Killed. ",
            ),
            Cause.HOST_MEMORY,
        ),
        (failure(type="OSError", message="[Errno 12] Cannot allocate memory"), Cause.HOST_MEMORY),
        (failure(type="FileNotFoundError", message="[Errno 2] No such file"), Cause.USER_CODE),
        (failure(type="KeyError", message="No space left"), Cause.USER_CODE),
        (failure(type="OSError", message="[Errno 24] Too many open files"), Cause.USER_CODE),
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
    assert cause_of(evidence)[0] is Cause.USER_CODE


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


@pytest.mark.parametrize("cause", Cause)
def test_word_of_every_cause_is_read_back(cause: Cause) -> None:
    assert cause_named(cause.value, None) is cause


@pytest.mark.parametrize(
    ("word", "found", "cause"),
    [
        ("exception", failure(), Cause.USER_CODE),
        ("out of memory", failure(type="OutOfMemoryError"), Cause.GPU_MEMORY),
        ("out of memory", failure(type="MemoryError"), Cause.HOST_MEMORY),
        ("out of memory", None, Cause.HOST_MEMORY),
        ("a word of later", None, Cause.UNKNOWN),
        (["x"], None, Cause.UNKNOWN),
    ],
)
def test_words_of_other_versions_are_understood(
    word: object, found: Failure | None, cause: Cause
) -> None:
    assert cause_named(word, found) is cause


# The table of decisions


#: What follows one link that ended so, and by which row.
AFTER_ONE = {
    Cause.COMPLETED: ("finished", "completed"),
    Cause.CANCELLED: ("stop", "cancelled"),
    Cause.STOPPED: ("stop", "stopped"),
    Cause.CONFIGURATION: ("stop", "configuration"),
    Cause.EXPIRED: ("stop", "expired"),
    Cause.NON_FINITE: ("stop", "non_finite"),
}
#: What follows two that ended so and committed nothing.
AFTER_TWO = {
    **AFTER_ONE,
    Cause.USER_CODE: ("stop", "same_exception"),
    Cause.KILLED: ("stop", "same_exception"),
    Cause.HANG: ("stop", "same_exception"),
    Cause.HOST_MEMORY: ("stop", "same_memory"),
    Cause.GPU_MEMORY: ("stop", "same_memory"),
}
GOES_ON = ("continue", "")


@pytest.mark.parametrize("cause", Cause)
def test_one_link_of_every_cause_has_its_decision(cause: Cause) -> None:
    decision = last_of(links(cause, failure=failure()))
    assert (decision.kind, decision.rule) == AFTER_ONE.get(cause, GOES_ON)


@pytest.mark.parametrize("cause", Cause)
def test_two_links_of_every_cause_without_progress_have_their_decision(cause: Cause) -> None:
    decision = last_of(links(cause, cause, failure=failure()))
    assert (decision.kind, decision.rule) == AFTER_TWO.get(cause, GOES_ON)


@pytest.mark.parametrize("cause", [c for c in Cause if c not in AFTER_ONE])
def test_progress_makes_two_links_of_every_such_cause_go_on(cause: Cause) -> None:
    decision = last_of(links(cause, cause, failure=failure(), progress=True), Budgets())
    assert (decision.kind, decision.rule) == GOES_ON


@pytest.mark.parametrize("cause", [c for c in Cause if c not in AFTER_ONE])
def test_third_link_of_every_cause_without_progress_is_the_last(cause: Cause) -> None:
    decision = last_of(links(cause, cause, cause), Budgets())
    assert (decision.kind, decision.rule) == ("stop", "no_progress_links")


@pytest.mark.parametrize("first", Cause)
@pytest.mark.parametrize("second", [c for c in Cause if c not in AFTER_ONE])
def test_another_cause_without_an_exception_goes_on(first: Cause, second: Cause) -> None:
    if first is not second or first not in MEMORY:
        assert last_of(links(first, second)).kind == "continue"


def test_decision_carries_the_numbers_that_it_was_made_from() -> None:
    history = [
        *links(Cause.DEADLINE, progress=True, seconds=3600.0, num_nodes=4),
        *links(Cause.USER_CODE, seconds=1800.0, num_nodes=2),
        *links(Cause.PREEMPTED, seconds=1800.0),
    ]
    numbers = {"links": 3, "hours": 2.0, "node_hours": 5.5, "idle_links": 2, "crashes": 1}
    assert last_of(history).numbers == numbers


# Decisions that end a chain


def test_complete_run_is_finished() -> None:
    assert last_of(links(Cause.COMPLETED, progress=True)).kind == "finished"


def test_complete_run_is_finished_although_every_budget_is_spent() -> None:
    spent = Budgets(max_links=1, max_hours=0.0, no_progress_links=1, max_crashes=0)
    history = [*links(Cause.USER_CODE, Cause.USER_CODE, seconds=9e9), *links(Cause.COMPLETED)]
    assert last_of(history, spent).kind == "finished"


def test_cancelled_run_stops_and_names_who_did_it() -> None:
    decision = last_of(links(Cause.CANCELLED, who="ann", detail="job 12"))
    assert (decision.kind, decision.reason) == (
        "stop",
        "cancelled by ann (job 12), saved at step 100",
    )


def test_cancelled_run_that_has_saved_nothing_names_no_step() -> None:
    (link,) = links(Cause.CANCELLED, who="ann")
    never = dataclasses.replace(link, first_step=0, committed_step=0)
    assert last_of([never]).reason == "cancelled by ann"


@pytest.mark.parametrize("who", ["", "unknown"])
def test_cancelled_run_without_a_name_says_so(who: str) -> None:
    decision = last_of(links(Cause.CANCELLED, who=who))
    assert (decision.kind, decision.reason) == (
        "stop",
        "cancelled by user unknown, saved at step 100",
    )


def test_chain_that_rolls_back_goes_on_and_says_from_where() -> None:
    words = "roll back to step 5: loss was not finite in step 9"
    decision = last_of(links(Cause.DEADLINE, detail=words))
    assert (decision.kind, decision.reason) == ("continue", f"{words}; its data are left out")


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
    for cause in sorted(NODE_CAUSES, key=lambda c: c.value):
        decision = last_of(links(cause, nodes=("n1", "n2"), progress=True))
        assert (decision.kind, decision.exclude_nodes) == ("continue", ("n1", "n2"))


def test_only_an_end_by_a_node_excludes_nodes() -> None:
    others = [c for c in Cause if c not in NODE_CAUSES]
    assert not any(last_of(links(c, nodes=("n1",))).exclude_nodes for c in others)


# Nodes that failed


WEEK_S = 7 * 86400.0
NOW = 1_800_000_000.0


def node_ends(*nodes: str, at: float = NOW, cause: Cause = Cause.NODE_FAILURE) -> list[PastLink]:
    """Links that a node ended, one each, at about the same time."""
    return [links(cause, progress=True, nodes=(node,), ended_at=at)[0] for node in nodes]


def test_node_that_failed_once_is_not_remembered() -> None:
    assert bad_nodes(node_ends("n1", "n2"), NOW) == ()


def test_node_that_failed_twice_is_excluded_from_links_that_end_otherwise() -> None:
    history = [*node_ends("n1", "n2", "n1"), *links(Cause.DEADLINE, progress=True)]
    assert decide(history, AMPLE, now=NOW).exclude_nodes == ("n1",)


def test_failing_to_boot_counts_like_failing() -> None:
    history = [*node_ends("n1", cause=Cause.BOOT_FAILURE), *node_ends("n1")]
    assert bad_nodes(history, NOW) == ("n1",)


def test_node_is_excluded_for_a_week() -> None:
    history = node_ends("n1", "n1")
    assert bad_nodes(history, NOW + WEEK_S - 1) == ("n1",)
    assert bad_nodes(history, NOW + WEEK_S) == ()


def test_failures_more_than_a_week_apart_do_not_add_up() -> None:
    history = [*node_ends("n1", at=NOW - WEEK_S), *node_ends("n1")]
    assert bad_nodes(history, NOW) == ()


def test_node_of_another_end_is_not_blamed() -> None:
    history = links(Cause.USER_CODE, Cause.KILLED, nodes=("n1",), ended_at=NOW)
    assert bad_nodes(history, NOW) == ()


def test_list_of_excluded_nodes_is_capped_and_keeps_the_newest() -> None:
    names = [f"n{number}" for number in range(MOST_EXCLUDED + 5)]
    history = node_ends(*[name for name in names for _ in range(2)])
    excluded = decide(history, AMPLE, now=NOW).exclude_nodes
    assert excluded == bad_nodes(history, NOW) == tuple(reversed(names))[:MOST_EXCLUDED]


def test_chain_that_ends_excludes_nothing() -> None:
    history = [*node_ends("n1", "n1"), *links(Cause.COMPLETED)]
    assert decide(history, AMPLE, now=NOW).exclude_nodes == ()


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


@pytest.mark.parametrize(("chance", "delay_s"), [(0.0, 60), (0.5, 68), (1.0, 75)])
def test_chance_spreads_the_delay_after_a_storage_failure(chance: float, delay_s: int) -> None:
    history = links(Cause.STORAGE, Cause.STORAGE)
    assert decide(history, AMPLE, chance=chance).delay_s == delay_s


def test_delay_stays_finite_after_ever_so_many_storage_failures() -> None:
    assert decide(links(*[Cause.STORAGE] * 500), AMPLE, chance=1.0).delay_s == 4500


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


def test_same_exception_where_the_link_that_progressed_ended_by_it_stops() -> None:
    history = [crash(committed=104), crash(first=104, committed=104)]
    assert last_of(history).rule == "same_exception"


def test_same_exception_once_goes_on() -> None:
    assert last_of([crash()]).kind == "continue"


def test_same_exception_with_progress_between_goes_on() -> None:
    assert last_of([crash(), crash(committed=104)]).kind == "continue"


def test_commits_below_the_step_are_no_progress_past_the_same_exception() -> None:
    history = [crash(step=110, committed=104), crash(step=110, first=104, committed=109)]
    assert last_of(history).rule == "same_exception"


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
    history = [links(Cause.GPU_MEMORY, failure=one)[0] for one in found]
    assert last_of(history).kind == "stop"


def test_addresses_in_a_message_make_no_other_exception() -> None:
    twice = [crash(f"bad object <X at 0x7f{n}0>") for n in (1, 2)]
    assert last_of(twice).rule == "same_exception"


def test_hang_at_the_same_step_twice_is_the_code_however_long_it_lasted() -> None:
    found = [failure(f"no step for {n} s", type="Hang") for n in (600, 601)]
    history = [links(Cause.HANG, failure=one)[0] for one in found]
    assert last_of(history).rule == "same_exception"


@pytest.mark.parametrize(
    ("cause", "words"),
    [(Cause.HOST_MEMORY, "scheduler.mem"), (Cause.GPU_MEMORY, "smaller batch")],
)
def test_memory_that_ran_out_twice_is_named_with_what_to_change(cause: Cause, words: str) -> None:
    reason = last_of(links(cause, cause, failure=failure(step=7))).reason
    assert cause.value in reason and "in step 7 twice" in reason and words in reason


def test_memory_that_ran_out_at_another_step_goes_on() -> None:
    history = [links(Cause.GPU_MEMORY, failure=failure(step=step))[0] for step in (7, 8)]
    assert last_of(history).kind == "continue"


def test_other_memory_goes_on() -> None:
    assert last_of(links(Cause.HOST_MEMORY, Cause.GPU_MEMORY, failure=failure())).kind == "continue"


def test_memory_that_killed_without_a_word_counts_only_without_progress() -> None:
    after_progress = [*links(Cause.HOST_MEMORY, progress=True), *links(Cause.HOST_MEMORY)]
    assert last_of(after_progress).kind == "continue"
    assert last_of([*after_progress, *links(Cause.HOST_MEMORY)]).rule == "same_memory"


@pytest.mark.parametrize(
    ("first", "second", "rule"),
    [(20, 20, "same_memory"), (20, 19, ""), (20, None, ""), (None, 20, ""), (None, None, "")],
)
def test_memory_that_killed_at_one_step_by_the_last_signs_of_life_is_the_same(
    first: int | None, second: int | None, rule: str
) -> None:
    (progressed,) = links(Cause.HOST_MEMORY, progress=True, at_step=first)
    (idle,) = links(Cause.HOST_MEMORY, at_step=second)
    decision = last_of([progressed, idle])
    assert decision.rule == rule
    assert ("in step 20 twice" in decision.reason) == bool(rule)


def test_memory_that_killed_at_other_steps_by_the_last_signs_still_counts_without_progress() -> (
    None
):
    killed = [links(Cause.HOST_MEMORY, at_step=step)[0] for step in (20, 19)]
    assert "without a new step twice" in last_of(killed).reason


def test_step_of_an_exception_is_compared_with_the_one_of_a_last_sign_of_life() -> None:
    (told,) = links(Cause.HOST_MEMORY, progress=True, failure=failure(step=20))
    (killed,) = links(Cause.HOST_MEMORY, at_step=20)
    assert last_of([told, killed]).rule == "same_memory"


def test_non_finite_value_stops_at_once_and_says_where_and_what_is_kept() -> None:
    found = failure("loss is nan", type="NonFinite", metric="loss", step=107, exit_code=8)
    decision = last_of(links(Cause.NON_FINITE, failure=found, progress=True), Budgets())
    assert decision.kind == "stop"
    assert decision.reason == (
        "loss not finite in step 107 (loss is nan); step 110 is committed, and kept"
    )


def test_non_finite_value_without_a_record_stops_all_the_same() -> None:
    assert "loss or gradients not finite" in last_of(links(Cause.NON_FINITE)).reason


def test_job_that_cannot_meet_its_own_deadline_stops_and_names_the_option() -> None:
    decision = last_of(links(Cause.EXPIRED, detail="job 12: DEADLINE", progress=True), Budgets())
    assert decision.kind == "stop"
    assert "--deadline" in decision.reason and "job 12" in decision.reason


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
    assert "4 links failed" in decision.reason and "max_crashes: 3" in decision.reason


def test_crash_budget_begins_anew_on_progress() -> None:
    history = [*crashes(3), crash("with progress", committed=110), *crashes(3)]
    assert last_of(history, Budgets(no_progress_links=99, max_crashes=3)).kind == "continue"


def test_crashes_with_progress_each_are_free() -> None:
    history = [crash(f"boom {n}", first=n, committed=n + 1) for n in range(1000)]
    assert last_of(history, Budgets(no_progress_links=1, max_crashes=0)).kind == "continue"


@pytest.mark.parametrize(
    "cause", [Cause.KILLED, Cause.USER_CODE, Cause.HOST_MEMORY, Cause.GPU_MEMORY, Cause.HANG]
)
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


def test_spent_budget_is_told_before_the_exception_that_spent_it() -> None:
    decision = last_of([crash(), crash()], Budgets(no_progress_links=2))
    assert decision.rule == "no_progress_links" and "ValueError: boom" in decision.reason


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


def test_node_hours_within_their_budget_go_on() -> None:
    history = links(Cause.TIME_LIMIT, progress=True, seconds=3600.0, num_nodes=4)
    assert last_of(history, Budgets(max_node_hours=4.1)).kind == "continue"


def test_max_node_hours_stops_with_the_numbers() -> None:
    history = links(Cause.TIME_LIMIT, Cause.TIME_LIMIT, progress=True, seconds=3600.0, num_nodes=4)
    decision = last_of(history, Budgets(max_node_hours=8.0))
    assert decision.rule == "max_node_hours"
    assert decision.reason == "8.0 node-hours are used up (max_node_hours: 8)"


# Evidence from files


def write_failure(run_link: object, **fields: object) -> None:
    content = {"t": 1.0, "type": "ValueError", "message": "boom", "step": 7, **fields}
    rank = int(str(content.get("rank", 0)))
    files.write_json(run_link.rank_failure(rank), content)  # type: ignore[attr-defined]


def test_failure_of_a_later_version_is_read_without_what_is_not_known(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_failure(add_link(run), type="NonFinite", metric="loss", step=12, colour="red")
    (past,) = past_links(read_story(run), {})
    assert past.cause is Cause.NON_FINITE
    assert past.failure is not None
    assert (past.failure.metric, past.failure.step) == ("loss", 12)


@pytest.mark.parametrize("broken", [{"step": "x"}, {"message": 3}, {"rank": None}], ids=str)
def test_failure_that_was_damaged_is_none(tmp_path: Path, broken: dict[str, object]) -> None:
    run = make_run(tmp_path)
    link = add_link(run)
    content = {"t": 1.0, "type": "ValueError", "message": "boom", "step": 7, **broken}
    files.write_json(link.rank_failure(0), content)
    assert past_links(read_story(run), {})[0].failure is None


def test_hang_is_read_from_the_journal_with_its_step(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with training(add_link(run, step=3)) as journal:
        journal.write("ended", how="hung", reason="no step for 600 s", step=4, rank=2)
    (past,) = past_links(read_story(run), {})
    assert past.cause is Cause.HANG and past.failure is not None
    assert (past.failure.step, past.failure.rank) == (4, 2)


def test_end_recorded_in_the_foreground_finds_the_failure_of_its_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    link = add_link(run, foreground=True)
    write_failure(link)
    with training(link) as journal:
        journal.write("ended", cause="exception", detail="boom", seconds=1.0)
    (past,) = past_links(read_story(run), {})
    assert past.cause is Cause.USER_CODE and past.failure == failure(message="boom")


def test_words_of_slurm_in_the_log_of_the_job_tell_of_a_killed_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_link(run, job="27")
    log = run.jobs / "27.log"
    log.write_text("slurmstepd: error: Detected 1 oom_kill event in StepId=27.0.\n")
    story = read_story(run)
    job = JobInfo(id="27", state=JobState.FAILED, exit_code=1)
    assert past_link(story, story.links[0], job).cause is Cause.HOST_MEMORY


@pytest.mark.parametrize(
    ("kind", "step", "at_step"),
    [("step", 20, 21), ("first step", 0, 19), ("save", 27, 27), ("start", 0, None)],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_rank_that_ran_out_of_memory_was_where_its_last_sign_of_life_says(
    tmp_path: Path, kind: str, step: int, at_step: int | None, recorded: bool
) -> None:
    run = make_run(tmp_path)
    link = add_link(run, step=18, job="27")
    beat = Heartbeat(link.beat(0))
    beat.step(step)
    beat.enter(kind)
    # As a rank that is killed leaves it: without a last word.
    wait_until("the sign", lambda: f'"{kind}", "step": {step},' in link.beat(0).read_text(), 30)
    sign = link.beat(0).read_bytes()
    beat.close()
    link.beat(0).write_bytes(sign)
    if recorded:
        end_link(link, "continue", "out of host memory", "killed")
    story = read_story(run)
    past = past_link(story, story.links[0], JobInfo(id="27", state=JobState.OUT_OF_MEMORY))
    assert (past.cause, past.at_step) == (Cause.HOST_MEMORY, at_step)


@pytest.mark.parametrize("sign", ["", "[1]", '{"kind": [], "step": "x"}', '{"kind": "step"}'])
def test_torn_sign_of_life_tells_no_step(tmp_path: Path, sign: str) -> None:
    link = add_link(make_run(tmp_path), job="27")
    link.beat(0).write_text(sign)
    story = read_story(RunDir(link.path.parents[1]))
    past = past_link(story, story.links[0], JobInfo(id="27", state=JobState.OUT_OF_MEMORY))
    assert past.at_step is None


def test_nodes_of_a_link_are_counted_from_its_claim(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    add_link(run, num_nodes=4)
    add_link(run, num_nodes="many")
    assert [past.num_nodes for past in past_links(read_story(run), {})] == [4, 1]


def test_last_lines_are_those_that_a_terminal_would_show(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_bytes(b"one\n 10%|#\r 50%|###\r100%|#####\n\n\x1b[31mtwo\x1b[0m\r\n\xff\n")
    assert last_lines(log, 9) == ["one", "100%|#####", "two", "\ufffd"]


def test_last_lines_of_a_bar_that_never_ends_its_line_are_its_last_state(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("begin\n" + "".join(f"\r{n}%" for n in range(100_000)))
    assert last_lines(log, 3)[-1] == "99999%"


def test_last_lines_begin_with_a_whole_line(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("".join(f"line {n:06d}\n" for n in range(100_000)))
    lines = last_lines(log, 1 << 20)
    assert all(len(line) == len("line 000000") for line in lines)
    assert lines[-1] == "line 099999"


def test_log_that_is_not_there_has_no_last_lines(tmp_path: Path) -> None:
    assert last_lines(tmp_path / "none.log", 3) == []


# Of any history


texts = st.text(max_size=8)
steps = st.integers(0, 5)
failures = st.builds(
    Failure,
    type=texts | st.sampled_from(["NonFinite", "Hang", "MemoryError", "OutOfMemoryError"]),
    message=texts,
    step=steps,
    exit_code=st.sampled_from([1, 2, 4, 7, 9, 143]),
)
past_links_of_any_kind = st.builds(
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
    num_nodes=st.integers(1, 9),
    ended_at=st.floats(0, 2e9),
)
budgets = st.builds(
    Budgets,
    max_links=st.none() | st.integers(1, 9),
    max_hours=st.none() | st.floats(0, allow_nan=False),
    max_node_hours=st.none() | st.floats(0, allow_nan=False),
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
    last_words=texts | st.sampled_from(sorted(LAST_WORDS)),
)


@quick
@given(st.lists(past_links_of_any_kind, min_size=1, max_size=12), budgets)
def test_every_history_gets_a_decision_of_a_known_kind(
    history: list[PastLink], limits: Budgets
) -> None:
    assert decide(history, limits).kind in ("finished", "stop", "continue")


@quick
@given(st.lists(past_links_of_any_kind, min_size=1, max_size=12), budgets)
def test_every_decision_has_a_reason(history: list[PastLink], limits: Budgets) -> None:
    assert decide(history, limits).reason.strip()


@quick
@given(st.lists(past_links_of_any_kind, min_size=1, max_size=12), budgets)
def test_decision_depends_on_nothing_but_its_arguments(
    history: list[PastLink], limits: Budgets
) -> None:
    assert decide(history, limits) == decide(list(history), dataclasses.replace(limits))


@quick
@given(st.lists(past_links_of_any_kind, min_size=1, max_size=12), budgets)
def test_chain_that_goes_on_has_progressed_within_its_no_progress_budget(
    history: list[PastLink], limits: Budgets
) -> None:
    if decide(history, limits).kind == "continue":
        recent = history[-limits.no_progress_links :]
        assert len(recent) < limits.no_progress_links or any(link.progressed for link in recent)


@quick
@given(st.lists(past_links_of_any_kind, min_size=1, max_size=12), budgets)
def test_only_a_crash_without_progress_is_blamed_on_the_code(
    history: list[PastLink], limits: Budgets
) -> None:
    decision = decide(history, limits)
    if decision.rule in ("same_exception", "same_memory", "max_crashes"):
        assert decision.cause in CRASHES and not history[-1].progressed


@quick
@given(evidences)
def test_every_evidence_has_a_cause(evidence: Evidence) -> None:
    assert isinstance(cause_of(evidence)[0], Cause)


@quick
@given(evidences)
def test_only_a_completed_record_completes_a_run(evidence: Evidence) -> None:
    assert (cause_of(evidence)[0] is Cause.COMPLETED) == evidence.completed
