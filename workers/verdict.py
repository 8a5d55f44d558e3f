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
BEGINNING_SECONDS = 12.0  # of the outage
LATEST_OPENING_SECONDS = 6.0
TICK_SLACK_SECONDS = 5.0


@dataclass(frozen=True)
class Marks:
    """When the drill did what, seconds since 1970."""

    measured_from: float
    failed_at: float
    healed_at: float


@dataclass(frozen=True)
class Limits:
    """How many calls the rules of a breaker let through to a service that fails.

    Attributes:
        calls_to_open: failures, or calls that hang for a second, that open the breaker.
        trial_calls: trials per HALF_OPEN.
        slots: calls that can be in flight when the breaker opens.
        first_open: seconds until the first trials.
        growth: factor of each further open time.
        jitter: largest share by which an open time is lengthened.
    """

    calls_to_open: int
    trial_calls: int
    slots: int
    first_open: float
    growth: float
    jitter: float

    def longest_open(self, openings: int) -> float:
        """Return the longest time in seconds that the last of so many openings takes."""
        return self.first_open * self.growth ** max(0, openings - 1) * (1 + self.jitter)


@dataclass(frozen=True)
class Recording:
    """Everything that the verdict is computed from.

    Attributes:
        submissions: every task that was sent.
        finished: results by task id.
        strays: ids of results of our tasks that were not submitted.
        stats: what the HTTP service counted, by dependency.
        transitions: of all breakers.
        deferred: ids of tasks that were deferred at least once.
        fallbacks: how many tasks were answered by which fallback.
        peak_deferred: most tasks in state DEFERRED at one time.
        limits: of the breakers whose service failed.
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
        *(
            row
            for name in recording.limits
            for row in (_noticed(recording, name), _calls_while_failing(recording, name))
        ),
        _served_from_fallback(recording),
        _mail_throughput(recording),
        *_deferral(recording),
    ]


def passed(rows: Sequence[Row]) -> bool:
    """Return whether no line failed."""
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


def _noticed(recording: Recording, name: str) -> Row:
    """Judge how soon the breaker has opened, and after how many calls."""
    what, failed_at = f"{name} noticed", recording.marks.failed_at
    opened = [event.at for event in _transitions(recording, name, "breaker-opened") if event.at >= failed_at]
    if not opened:
        return Row(what, "never", f"<= {LATEST_OPENING_SECONDS:g} s", ok=False)
    seconds = opened[0] - failed_at
    calls = sum(at <= opened[0] for at in recording.stats[name]["arrivals_while_failing"])
    figure = f"OPEN after {seconds:.1f} s and {calls} calls"
    return Row(what, figure, f"<= {LATEST_OPENING_SECONDS:g} s", ok=seconds <= LATEST_OPENING_SECONDS)


def _calls_while_failing(recording: Recording, name: str) -> Row:
    limits, reached = recording.limits[name], len(recording.stats[name]["arrivals_while_failing"])
    marks = recording.marks
    half_openings = sum(
        marks.failed_at <= event.at <= marks.healed_at for event in _transitions(recording, name, "breaker-half-opened")
    )
    trials = limits.trial_calls * half_openings
    most = limits.calls_to_open + limits.slots + trials
    bound = f"<= {most}: {limits.calls_to_open} to open, {limits.slots} in flight, {trials} trials"
    return Row(f"calls that reached {name} while it failed", str(reached), bound, ok=reached <= most)


def _transitions(recording: Recording, name: str, kind: str) -> list[BreakerEvent]:
    return [event for event in recording.transitions if event.breaker == name and event.type == kind]


def _served_from_fallback(recording: Recording) -> Row:
    total = sum(recording.fallbacks.values())
    sources = ", ".join(f"{source} {count}" for source, count in recording.fallbacks.items())
    return Row("answered by a fallback", sources or "0", "> 0", ok=total > 0)


def _mail_throughput(recording: Recording) -> Row:
    """Judge mail by the worse of the outage's beginning, before the breakers have opened, and the whole of it."""
    marks = recording.marks
    before = _finished_per_second(recording, "mail", marks.measured_from, marks.failed_at)
    beginning = _finished_per_second(recording, "mail", marks.failed_at, marks.failed_at + BEGINNING_SECONDS)
    during = _finished_per_second(recording, "mail", marks.failed_at, marks.healed_at)
    ratio = min(beginning, during) / before if before else 0.0
    figure = f"{before:.1f}/s before, {beginning:.1f}/s in the first {BEGINNING_SECONDS:g} s, {during:.1f}/s in all"
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
    soonest = max(_longest_open(recording, name) for name in recording.limits) + TICK_SLACK_SECONDS
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


def _longest_open(recording: Recording, name: str) -> float:
    openings = sum(event.at <= recording.marks.healed_at for event in _transitions(recording, name, "breaker-opened"))
    return recording.limits[name].longest_open(openings)
