"""The catalogue of metrics: what is exported of each breaker.

Everything is read from the shared store, so any one process can tell it for the whole fleet. ``docs/metrics.md`` is
this catalogue for people; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from typing import NamedTuple

from resilient_tasks.core.counts import Counts
from resilient_tasks.core.model import Outcome, Snapshot, State

PREFIX = "celery_breaker_"

UP = f"{PREFIX}up"
VIEW_AGE = f"{PREFIX}view_age_seconds"
READ_DURATION = f"{PREFIX}scrape_duration_seconds"


@dataclass(frozen=True)
class Subject:
    """What there is to tell of one breaker.

    Args:
        snapshot: the breaker now.
        counts: what was counted since ever.
        queue: name of its deferred queue.
        tasks: names of the app's tasks that it guards.
        done_in: seconds until the last waiting task is resumed; None: unknown, or none waits.
    """

    snapshot: Snapshot
    counts: Counts
    queue: str
    tasks: Sequence[str] = ()
    done_in: float | None = None

    @cached_property
    def label(self) -> dict[str, str]:
        """The one label that all its points have; not to be changed."""
        return {"breaker": self.snapshot.name}


class Point(NamedTuple):
    """One value of a metric, with its labels beside ``breaker``."""

    value: float
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric of the catalogue.

    Args:
        name: as it is exported; that of a counter ends in ``_total``.
        text: what it tells, for its help line and the documentation.
        points: its values for one breaker.
        labels: names of its labels beside ``breaker``.
    """

    name: str
    text: str
    points: Callable[[Subject], Iterable[Point]]
    labels: tuple[str, ...] = ()

    @property
    def is_counter(self) -> bool:
        """Whether it only grows, for as long as the store keeps its data."""
        return self.name.endswith("_total")

    @property
    def kind(self) -> str:
        """What Prometheus calls that."""
        return "counter" if self.is_counter else "gauge"

    def labelled(self, subject: Subject, labels: Sequence[str]) -> dict[str, str]:
        """Return all labels of one of its points."""
        if not labels:
            return subject.label
        return {"breaker": subject.snapshot.name, **dict(zip(self.labels, labels, strict=True))}


def _plain(name: str, value: str, text: str) -> Metric:
    """Return a metric with one value for each breaker: a field of snapshot or counts."""
    read = attrgetter(value)
    return Metric(PREFIX + name, text, lambda subject: (Point(read(subject)),))


def _named(name: str, label: str, points: Callable[[Subject], Iterable[Point]], text: str) -> Metric:
    return Metric(PREFIX + name, text, points, (label,))


def _by_label(values: Mapping[str, float]) -> Iterator[Point]:
    return (Point(value, (str(label).lower(),)) for label, value in values.items())


def _states(subject: Subject) -> Iterator[Point]:
    return (Point(float(subject.snapshot.state is state), (state.value,)) for state in State)


def _calls(subject: Subject) -> Iterator[Point]:
    return (Point(subject.counts.calls.get(outcome, 0), (outcome.value.lower(),)) for outcome in _COUNTED)


def _transitions(subject: Subject) -> Iterator[Point]:
    entered = subject.counts.entered
    return (Point(entered.get(state, 0), (state.value,)) for state in State if state in _USUAL or state in entered)


def _oldest(subject: Subject) -> tuple[Point]:
    snapshot = subject.snapshot
    since = snapshot.oldest_deferred_at
    return (Point(0.0 if since is None else max(0.0, snapshot.now - since)),)


def _next_trial(subject: Subject) -> tuple[Point, ...]:
    due = subject.snapshot.next_probe_at
    return () if due is None else (Point(due),)


def _where_limited(subject: Subject, value: float | None) -> tuple[Point, ...]:
    return () if value is None or subject.snapshot.concurrency_limit is None else (Point(value),)


_USUAL = (State.CLOSED, State.OPEN, State.HALF_OPEN)  # the others take an operator
_COUNTED = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW)

METRICS = (
    _named("state", "state", _states, "1 for the state that the breaker is in, 0 for all others."),
    _plain("state_timestamp_seconds", "snapshot.since", "When it entered that state, seconds since the epoch."),
    Metric(
        f"{PREFIX}next_trial_timestamp_seconds",
        "When its open time is over, seconds since the epoch; only while it is OPEN and heals by itself.",
        _next_trial,
    ),
    _named("calls_total", "outcome", _calls, "Guarded calls by outcome (success, failure, slow), trials included."),
    _plain(
        "failure_ratio", "snapshot.failure_rate", "Share of failures in its window, 0 to 1; while OPEN as at the trip."
    ),
    _plain("slow_ratio", "snapshot.slow_rate", "Share of slow successes in its window, likewise."),
    _plain("refused_total", "counts.refused", "Calls that it refused, of tasks and of guards."),
    _plain("deferred_tasks", "snapshot.deferred", "Tasks that wait for it now."),
    Metric(f"{PREFIX}oldest_deferred_seconds", "How long the oldest of them has waited; 0 if none waits.", _oldest),
    Metric(
        f"{PREFIX}done_in_seconds",
        "When the last of them will be resumed, at the learned rate; absent while that is unknown.",
        lambda subject: () if subject.done_in is None else (Point(subject.done_in),),
    ),
    _plain("deferred_total", "counts.deferred", "Tasks that were put aside for the first time."),
    _plain("deferred_again_total", "counts.deferred_again", "Deferrals of tasks that had been resumed before."),
    _plain("resumed_total", "counts.resumed", "Tasks that were sent back to their queues."),
    _named(
        "fallback_total",
        "source",
        lambda subject: _by_label(subject.counts.fallbacks),
        "Answers of fallbacks by source: cached, constant, or the name of a function.",
    ),
    _plain("failed_total", "counts.failed", "Tasks that a refusal has failed, because they are not to wait."),
    _plain("dead_lettered_total", "counts.dead", "Tasks that went to its dead-letter queue."),
    _plain("expired_total", "counts.expired", "Those of them that had waited too long."),
    _plain("revoked_total", "counts.revoked", "Tasks that were revoked while they waited."),
    _plain("dropped_total", "counts.dropped", "Waiting tasks that somebody dropped."),
    _plain("coalesced_total", "counts.coalesced", "Waiting tasks that a later one with the same key has replaced."),
    _plain(
        "redelivered_total", "counts.redelivered", "Tasks that the broker delivered again: some may have run twice."
    ),
    _plain("trials_total", "counts.trials", "Calls that were made under a permit."),
    _plain("permits", "snapshot.trials", "Permits in flight."),
    Metric(
        f"{PREFIX}in_flight",
        "Calls that hold one of its slots; only of a breaker with max_concurrency.",
        lambda subject: _where_limited(subject, subject.snapshot.in_flight),
    ),
    Metric(
        f"{PREFIX}concurrency_limit",
        "How many slots it has at present, likewise.",
        lambda subject: _where_limited(subject, subject.snapshot.concurrency_limit),
    ),
    _named("transitions_total", "state", _transitions, "Transitions by the state that was entered."),
    Metric(
        f"{PREFIX}hot_children",
        "Its children that are not plainly CLOSED; absent while there is none. The first 100 have series, too.",
        lambda subject: (Point(len(hot)),) if (hot := subject.snapshot.hot_children) else (),
    ),
    _named(
        "info",
        "queue_name",
        lambda subject: (Point(1.0, (subject.queue,)),),
        "Always 1; tells the deferred queue, under the label that celery-exporter gives queues.",
    ),
    _named(
        "task_info",
        "name",
        lambda subject: (Point(1.0, (task,)) for task in subject.tasks),
        "Always 1, once for each task that it guards, under the label that celery-exporter gives tasks.",
    ),
)

#: What is told of the readings themselves, once and not for each breaker.
HEALTH = {
    UP: "1 if the store answered when it was last asked, else 0: then nothing is told of any breaker.",
    VIEW_AGE: "Seconds since what is told was read from the store, or since the store last answered.",
    READ_DURATION: "Seconds that reading it took.",
}
