"""Breakers for prometheus-client, from any one process of the fleet.

``celery -A proj breakers exporter`` serves them by itself, and Flower with breakers in its ``/metrics``. A process that
has a ``/metrics`` of its own adds them with one line::

    from resilient_tasks.prometheus import register

    register(app)

One process is enough: everything is read from the shared store, so several export the same values. Needs the extra
``resilient_tasks[metrics]``. The manual's table of metrics is made of the catalogue below.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from celery import Celery
from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from resilient_tasks.core.model import Outcome, Snapshot, State
from resilient_tasks.core.outage import Counts
from resilient_tasks.errors import StoreError
from resilient_tasks.worker.context import Runtime, runtime_of

__all__ = ["BreakerCollector", "register"]

logger = logging.getLogger("resilient_tasks")

PREFIX = "celery_breaker_"
UP = f"{PREFIX}up"

#: Most children of one breaker that have series: each has as many as a breaker.
MOST_CHILDREN = 100


@dataclass(frozen=True, slots=True)
class Subject:
    """One breaker as metrics show it."""

    snapshot: Snapshot
    counts: Counts  # since ever
    queue: str  # name of its deferred queue
    tasks: Sequence[str] = ()  # that it guards
    done_in: float | None = None  # seconds until the last waiting task is resumed; None: unknown, or none waits


class Metric(NamedTuple):
    """One metric of the catalogue; a counter's name ends in ``_total``."""

    name: str
    text: str  # also in the documentation
    labels: tuple[str, ...]  # beside ``breaker``: one, or none
    read: Callable[[Subject], Any]  # a breaker's value, None if it has none; of a metric with a label: values by it

    def family(self, subjects: Sequence[Subject]) -> Family:
        """Return the values for some breakers, as prometheus-client exposes them."""
        make = CounterMetricFamily if self.name.endswith("_total") else GaugeMetricFamily
        family = make(self.name, self.text, labels=["breaker", *self.labels])
        for subject in subjects:
            value = self.read(subject)
            if self.labels:
                for label, each in value.items():
                    family.add_metric([subject.snapshot.name, str(label)], each)
            elif value is not None:
                family.add_metric([subject.snapshot.name], value)
        return family


def _transitions(subject: Subject) -> Mapping[str, int]:
    usual, entered = (State.CLOSED, State.OPEN, State.HALF_OPEN), subject.counts.entered  # others take an operator
    return {state.value: entered.get(state, 0) for state in State if state in usual or state in entered}


def _oldest(subject: Subject) -> float:
    since = subject.snapshot.oldest_deferred_at
    return 0.0 if since is None else max(0.0, subject.snapshot.now - since)


def _calls(subject: Subject) -> Mapping[str, int]:
    counted = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW)
    return {outcome.lower(): subject.counts.calls.get(outcome, 0) for outcome in counted}


def _in_flight(subject: Subject) -> int | None:
    return None if subject.snapshot.concurrency_limit is None else subject.snapshot.in_flight


# name, label if it has one, help line, and its value: a function, or the path of a field
_CATALOGUE: tuple[tuple[str, str, str, Callable[[Subject], Any] | str], ...] = (
    ("state", "state", "1 for the state that the breaker is in, 0 for all others.",
     lambda subject: {state.value: float(subject.snapshot.state is state) for state in State}),
    ("state_timestamp_seconds", "", "When it entered that state, seconds since the epoch.", "snapshot.since"),
    ("next_trial_timestamp_seconds", "",
     "When its open time is over, seconds since the epoch; only while it is OPEN and heals by itself.",
     "snapshot.next_probe_at"),
    ("calls_total", "outcome", "Guarded calls by outcome (success, failure, slow), trials included.", _calls),
    ("failure_evidence", "", "How near it is to opening by failures, 0 to 1; while OPEN as at the trip.",
     "snapshot.evidence"),
    ("slow_evidence", "", "The same by slow calls and calls that hang.", "snapshot.slow_evidence"),
    ("failure_ratio", "", "Share of failures over about its window, 0 to 1; while OPEN as at the trip.",
     "snapshot.failure_rate"),
    ("slow_ratio", "", "Share of slow successes over about its window, likewise.", "snapshot.slow_rate"),
    ("refusals_total", "", "Calls that it refused, of tasks and of guards.", "counts.refused"),
    ("deferred_tasks", "", "Tasks that wait for it now.", "snapshot.deferred"),
    ("oldest_deferred_seconds", "", "How long the oldest of them has waited; 0 if none waits.", _oldest),
    ("drain_eta_seconds", "", "Until the last of them is resumed, at the learned rate; absent while that is unknown.",
     "done_in"),
    ("deferrals_total", "", "Tasks that were deferred for the first time.", "counts.deferred"),
    ("repeated_deferrals_total", "", "Deferrals of tasks that had been resumed before.", "counts.deferred_again"),
    ("resumed_tasks_total", "", "Tasks that were sent back to their queues.", "counts.resumed"),
    ("fallback_answers_total", "source", "Answers of fallbacks by source: cached, constant, or the name of a function.",
     lambda subject: {source.lower(): count for source, count in subject.counts.fallbacks.items()}),
    ("failed_tasks_total", "", "Tasks that a refusal has failed, because they are not to wait.", "counts.failed"),
    ("dead_letters_total", "", "Tasks that went to its dead-letter queue.", "counts.dead"),
    ("expired_tasks_total", "", "Those of them that had waited too long.", "counts.expired"),
    ("revoked_tasks_total", "", "Tasks that were revoked while they waited.", "counts.revoked"),
    ("dropped_tasks_total", "", "Waiting tasks that an operator dropped.", "counts.dropped"),
    ("coalesced_tasks_total", "", "Waiting tasks that a later one with the same key has replaced.", "counts.coalesced"),
    ("redeliveries_total", "", "Tasks that the broker delivered again: some may have run twice.", "counts.redelivered"),
    ("suspicions_total", "", "How often it became suspect in a worker, because a call was late.", "counts.suspected"),
    ("spare_slots_total", "", "Pool slots that workers have added because of its late calls.", "counts.spare_slots"),
    ("trials_total", "", "Calls that were made under a permit.", "counts.trials"),
    ("permits", "", "Permits in flight.", "snapshot.trials"),
    ("in_flight", "", "Calls that hold one of its slots; only of a breaker with max_concurrency.", _in_flight),
    ("concurrency_limit", "", "How many slots it has at present, likewise.", "snapshot.concurrency_limit"),
    ("transitions_total", "state", "Transitions by the state that was entered.", _transitions),
    ("hot_children", "",
     "Its children that are not CLOSED, or that tasks wait for; absent if none. The first 100 have series, too.",
     lambda subject: subject.snapshot.active_children or None),
    ("info", "queue_name",
     "Always 1; its label is the deferred queue, under the name that celery-exporter gives queues.",
     lambda subject: {subject.queue: 1}),
    ("task_info", "name",
     "Always 1, once for each task that it guards, under the label that celery-exporter gives tasks.",
     lambda subject: dict.fromkeys(subject.tasks, 1)),
)  # fmt: skip

METRICS = tuple(
    Metric(PREFIX + name, text, (label,) if label else (), attrgetter(read) if isinstance(read, str) else read)
    for name, label, text, read in _CATALOGUE
)

#: Metrics of the scrape itself, without labels.
HEALTH = {
    UP: "1 if the store answered, else 0: then there are no other metrics of breakers.",
    f"{PREFIX}view_age_seconds": "Seconds since the store last answered.",
    f"{PREFIX}scrape_duration_seconds": "Seconds that reading it took.",
}


class BreakerCollector(Collector):
    """Reads all breakers with each scrape, which takes no longer than the store's timeout allows."""

    def __init__(self, read: Callable[[], Sequence[Subject]]) -> None:
        self._read = read
        self._answered_at = float("-inf")  # on the monotonic clock
        self._is_up = True

    def describe(self) -> Iterator[Family]:
        """Yield all families without values: registering asks for names, and needs no store."""
        yield from (GaugeMetricFamily(name, text) for name, text in HEALTH.items())
        yield from (metric.family(()) for metric in METRICS)

    def collect(self) -> Iterator[Family]:
        """Yield all families as the store knows them now; while it is unavailable only those of the scrape."""
        began, subjects = time.monotonic(), None
        try:
            subjects = self._read()
            self._answered_at = time.monotonic()
        except StoreError as error:
            if self._is_up:
                logger.warning("metrics cannot be read: %s", error)
        self._is_up = subjects is not None
        ended = time.monotonic()
        health = (float(self._is_up), ended - self._answered_at, ended - began)
        yield from (GaugeMetricFamily(*metric, value) for metric, value in zip(HEALTH.items(), health, strict=True))
        if subjects is not None:
            yield from (metric.family(subjects) for metric in METRICS)


def register(app: Celery, registry: CollectorRegistry = REGISTRY) -> BreakerCollector:
    """Add the breakers of an app to a registry of prometheus-client.

    Each scrape reads the store, which takes about a second for a thousand breakers: in an event loop, call
    ``generate_latest`` in a thread.

    Args:
        app: the Celery app that the ``Resilience`` was initialised with.
        registry: where to add them.

    Returns:
        What was added, for ``registry.unregister``.

    Raises:
        ConfigurationError: the app has no ``Resilience``.
        ValueError: they are in the registry already.
    """
    collector = BreakerCollector(partial(_read, runtime_of(app)))
    registry.register(collector)
    return collector


def _read(runtime: Runtime) -> list[Subject]:
    """Read all breakers of an app from the store, and their first active children."""
    snapshots = runtime.read(MOST_CHILDREN)
    history, queues = runtime.fleet.history, f"{runtime.settings.namespace}.deferred."
    totals, estimates = history.totals([each.name for each in snapshots]), history.estimates(snapshots)
    done_in = {name: estimate.done_in for name, estimate in estimates.items()}
    tasks = runtime.tasks_by_breaker()
    return [
        Subject(each, totals[each.name], queues + each.name, tasks[each.name], done_in.get(each.name))
        for each in snapshots
    ]
