"""What an outage did to the tasks: a recording of the drill in, a table of figures and bounds out.

Nothing here does I/O; every figure is counted from what the result backend, the HTTP service and
Celery's event stream said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from workers.load import BreakerEvent, Result, Submission

LEAST_MAIL_RATIO = 0.9
TICK_SLACK_SECONDS = 5.0


@dataclass(frozen=True)
class Marks:
    """When the drill did what, seconds since 1970."""

    measured_from: float
    ill_at: float
    healed_at: float


@dataclass(frozen=True)
class Limits:
    """How many calls the rules of a breaker let through to a dead dependency.

    Attributes:
        calls_to_trip: failures in a row that open the breaker.
        trial_calls: trials per HALF_OPEN.
        slots: processes that can be in a call when the breaker opens.
        longest_open: seconds until the next trial, at most.
    """

    calls_to_trip: int
    trial_calls: int
    slots: int
    longest_open: float


@dataclass(frozen=True)
class Recording:
    """Everything that the verdict is computed from.

    Attributes:
        submissions: every task that was sent.
        finished: results by task id.
        strays: ids of results of our tasks that nobody submitted.
        stats: what the HTTP service counted, by dependency.
        transitions: of all breakers.
        deferred: ids of tasks that were deferred at least once.
        fallbacks: how many tasks were answered by which fallback.
        peak_deferred: most tasks in state DEFERRED at one time.
        limits: of the breakers whose dependency fell ill.
        marks: when that was.
    """

    submissions: Sequence[Submission]
    finished: Mapping[str, Result]
    strays: Sequence[str]
    stats: Mapping[str, Mapping[str, Any]]
    transitions: Sequence[BreakerEvent]
    deferred: frozenset[str]
    fallbacks: Counter[str]
    peak_deferred: int
    limits: Mapping[str, Limits]
    marks: Marks
    repeatable: frozenset[str] = field(default=frozenset({"accounts"}))  # reads, whose ids come round again


@dataclass(frozen=True)
class Row:
    """One line of the verdict; ``ok`` is None where there is nothing to pass or fail."""

    what: str
    figure: str
    bound: str = ""
    ok: bool | None = None


def judge(recording: Recording) -> list[Row]:
    """Return the verdict, line by line."""
    return [
        _submitted(recording),
        *_fates(recording),
        *(_calls_while_ill(recording, name) for name in recording.limits),
        _served_from_fallback(recording),
        _mail_throughput(recording),
        *_deferral(recording),
    ]


def passed(rows: Sequence[Row]) -> bool:
    """Tell whether no line failed."""
    return all(row.ok is not False for row in rows)


def _submitted(recording: Recording) -> Row:
    streams = Counter(submission.stream for submission in recording.submissions)
    return Row("tasks submitted", ", ".join(f"{name} {count}" for name, count in streams.items()))


def _fates(recording: Recording) -> list[Row]:
    results = [(submission, recording.finished.get(submission.task_id)) for submission in recording.submissions]
    own = sum(result is not None and _is_its_own(submission, result) for submission, result in results)
    failed = sum(result is not None and result.state != "SUCCESS" for _, result in results)
    lost = sum(result is None for _, result in results)
    total = len(results)
    return [
        Row("finished under their own id", f"{own} of {total}", "all", ok=own == total),
        _none_allowed("failed", failed),
        _none_allowed("lost", lost),
        _none_allowed("finished under another id", len(recording.strays)),
        _none_allowed("run twice", _run_twice(recording)),
    ]


def _is_its_own(submission: Submission, result: Result) -> bool:
    return result.state == "SUCCESS" and result.value["id"] == str(submission.key)


def _none_allowed(what: str, count: int) -> Row:
    return Row(what, str(count), "0", ok=count == 0)


def _run_twice(recording: Recording) -> int:
    return sum(
        len(figures["repeated"]) for name, figures in recording.stats.items() if name not in recording.repeatable
    )


def _calls_while_ill(recording: Recording, name: str) -> Row:
    limits, reached = recording.limits[name], len(recording.stats[name]["arrivals_while_ill"])
    trials = limits.trial_calls * _half_openings_while_ill(recording, name)
    most = limits.calls_to_trip + limits.slots + trials
    bound = f"<= {most}: {limits.calls_to_trip} to trip, {limits.slots} running, {trials} trials"
    return Row(f"calls that reached ill {name}", str(reached), bound, ok=reached <= most)


def _half_openings_while_ill(recording: Recording, name: str) -> int:
    marks = recording.marks
    return sum(
        event.breaker == name and event.type == "breaker-half-opened" and marks.ill_at <= event.at <= marks.healed_at
        for event in recording.transitions
    )


def _served_from_fallback(recording: Recording) -> Row:
    total = sum(recording.fallbacks.values())
    sources = ", ".join(f"{source} {count}" for source, count in recording.fallbacks.items())
    return Row("answered by a fallback", sources or "0", "> 0", ok=total > 0)


def _mail_throughput(recording: Recording) -> Row:
    marks = recording.marks
    before = _finished_per_second(recording, "mail", marks.measured_from, marks.ill_at)
    during = _finished_per_second(recording, "mail", marks.ill_at, marks.healed_at)
    ratio = during / before if before else 0.0
    figure = f"{before:.1f}/s before, {during:.1f}/s during ({ratio:.0%})"
    return Row("mail, which stays healthy", figure, f">= {LEAST_MAIL_RATIO:.0%}", ok=ratio >= LEAST_MAIL_RATIO)


def _finished_per_second(recording: Recording, stream: str, start: float, end: float) -> float:
    ids = {submission.task_id for submission in recording.submissions if submission.stream == stream}
    count = sum(start <= result.at < end for id_, result in recording.finished.items() if id_ in ids)
    return count / (end - start)


def _deferral(recording: Recording) -> list[Row]:
    peak = Row("DEFERRED at the peak", str(recording.peak_deferred), "> 0", ok=recording.peak_deferred > 0)
    healed = recording.marks.healed_at
    ends = [recording.finished[id_].at - healed for id_ in recording.deferred if id_ in recording.finished]
    resumed = [seconds for seconds in ends if seconds > 0]
    if not resumed:
        return [peak, Row("deferred tasks finished after healing", "0", "> 0", ok=False)]
    soonest = max(limits.longest_open for limits in recording.limits.values()) + TICK_SLACK_SECONDS
    return [
        peak,
        Row(
            "first deferred task finished",
            f"{min(resumed):.1f} s after healing",
            f"<= {soonest:.1f} s",
            ok=min(resumed) <= soonest,
        ),
        Row("last deferred task finished", f"{max(resumed):.1f} s after healing"),
    ]
