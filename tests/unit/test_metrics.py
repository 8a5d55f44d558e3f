"""The catalogue of metrics, and what prometheus-client makes of a reading."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilient_tasks import ConfigurationError, StoreError
from resilient_tasks.core.counts import Counts
from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.monitor import readings
from resilient_tasks.monitor.metrics import HEALTH, METRICS, Subject
from resilient_tasks.monitor.readings import Readings
from resilient_tasks.prometheus import BreakerCollector, register
from tests.support.doubles import wait_until

DOC = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()

NOW = 1_789_000_000.0
OPEN = Subject(
    Snapshot(
        'pay"ments\n', State.OPEN, 17, 17, now=NOW, since=NOW - 60, calls=10, failures=4, slow=1, open_until=NOW + 5,
        trials=2, deferred=3, oldest_deferred_at=NOW - 30, in_flight=4, concurrency_limit=8, hot_children=("acme", "b"),
    ),
    Counts.of({
        "SUCCESS": 100, "FAILURE": 20, "trials": 5, "refused": 7, "deferred": 6, "deferred_again": 2, "resumed": 4,
        "fallback:cached": 9, "fallback:<b>": 1, "failed": 11, "dead": 12, "expired": 13, "revoked": 14, "dropped": 15,
        "redelivered": 16, "entered:OPEN": 2,
    }),
    "resilient.deferred.payments",
    ("shop.charge", "shop.refund"),
    38 * 60.0,
)  # fmt: skip
QUIET = Subject(Snapshot("quiet", State.CLOSED, 0, 0, now=NOW, since=0.0), Counts(), "resilient.deferred.quiet")


@pytest.fixture(autouse=True)
def _nothing_stays_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "FRESH", 0.0)


def scrape(read: Callable[[], Sequence[Subject]], patience: float = 10.0) -> dict[tuple[str, frozenset[Any]], float]:
    """Return what Prometheus reads of a fleet: values by name and labels."""
    registry = CollectorRegistry()
    registry.register(BreakerCollector(read, patience))
    families = text_string_to_metric_families(generate_latest(registry).decode())
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(values: dict[tuple[str, frozenset[Any]], float], name: str, /, **labels: str) -> float:
    return values[f"celery_breaker_{name}", frozenset(labels.items())]


def test_a_reading_becomes_series_of_all_breakers() -> None:
    values = scrape(lambda: [OPEN, QUIET])
    name = 'pay"ments\n'
    assert value(values, "up") == 1
    assert {state: value(values, "state", breaker=name, state=state) for state in State} == {
        state: state is State.OPEN for state in State
    }
    told = {
        name: value(values, name, breaker='pay"ments\n')
        for name in (
            "state_timestamp_seconds", "next_trial_timestamp_seconds", "failure_ratio", "slow_ratio", "refused_total",
            "deferred_tasks", "oldest_deferred_seconds", "done_in_seconds",
            "deferred_total", "deferred_again_total", "resumed_total",
            "failed_total", "dead_lettered_total", "expired_total", "revoked_total", "dropped_total",
            "redelivered_total", "trials_total", "permits", "in_flight", "concurrency_limit", "hot_children",
        )
    }  # fmt: skip
    expected = (NOW - 60, NOW + 5, 0.4, 0.1, 7, 3, 30, 2280, 6, 2, 4, 11, 12, 13, 14, 15, 16, 5, 2, 4, 8, 2)
    assert tuple(told.values()) == expected
    assert value(values, "calls_total", breaker=name, outcome="success") == 100
    assert value(values, "calls_total", breaker=name, outcome="slow") == 0
    assert value(values, "fallback_total", breaker=name, source="<b>") == 1
    assert value(values, "transitions_total", breaker=name, state="OPEN") == 2
    assert value(values, "transitions_total", breaker=name, state="CLOSED") == 0
    assert value(values, "info", breaker=name, queue_name="resilient.deferred.payments") == 1
    assert value(values, "task_info", breaker=name, name="shop.charge") == 1


def test_what_a_breaker_does_not_have_has_no_series_and_what_has_not_happened_is_0() -> None:
    names = {name for name, _ in scrape(lambda: [QUIET])}
    for absent in (
        "next_trial_timestamp_seconds",
        "done_in_seconds",
        "in_flight",
        "concurrency_limit",
        "hot_children",
        "fallback_total",
        "task_info",
    ):
        assert f"celery_breaker_{absent}" not in names
    assert value(scrape(lambda: [QUIET]), "refused_total", breaker="quiet") == 0
    assert value(scrape(lambda: [QUIET]), "oldest_deferred_seconds", breaker="quiet") == 0


def test_a_store_that_is_away_is_told_and_nothing_else() -> None:
    def away() -> Sequence[Subject]:
        raise StoreError("the cable is pulled")

    values = scrape(away)
    assert {name for name, _ in values} == set(HEALTH)
    assert value(values, "up") == 0


def test_the_documentation_has_exactly_these_metrics_with_their_labels() -> None:
    rows = re.findall(r"^\| `(celery_breaker_\w+)` \| (.*?) \| (.*?) \|$", DOC, flags=re.MULTILINE)
    documented = [(name, tuple(re.findall(r"`(\w+)`", labels)), text) for name, labels, text in rows]
    catalogue = [(each.name, each.labels, each.text) for each in METRICS]
    assert documented == [*((name, (), text) for name, text in HEALTH.items()), *catalogue]


def test_kinds_follow_names() -> None:
    families = {family.name: family.type for family in BreakerCollector(list).describe()}
    for metric in METRICS:
        assert families[metric.name.removesuffix("_total")] == ("counter" if metric.is_counter else "gauge")


# --- registering ------------------------------------------------------------------------------------


def test_registering_needs_a_resilience() -> None:
    with pytest.raises(ConfigurationError, match="has no Resilience"):
        register(Celery("bare", set_as_current=False), CollectorRegistry())


def test_registering_twice_is_told() -> None:
    registry = CollectorRegistry()
    registry.register(BreakerCollector(list))
    with pytest.raises(ValueError, match="celery_breaker_"):
        registry.register(BreakerCollector(list))


# --- readings ---------------------------------------------------------------------------------------


class Slow:
    """A store that answers when it is told to."""

    def __init__(self) -> None:
        self.begun, self.answer = threading.Event(), threading.Event()
        self.times = 0

    def __call__(self) -> Sequence[Subject]:
        self.begun.set()
        assert self.answer.wait(10)
        self.times += 1
        return [QUIET]


def test_nobody_waits_for_a_store_that_takes_its_time() -> None:
    slow = Slow()
    reads = Readings(slow, patience=0.0)
    assert not reads.latest().up
    assert slow.begun.wait(10)
    slow.answer.set()
    wait_until(lambda: reads.latest().up)
    assert reads.latest().age < 10


def test_who_asks_first_or_after_a_long_time_waits_for_a_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "PATIENCE_AT_FIRST", 60.0)
    monkeypatch.setattr(readings, "FRESH", 0.0)
    monkeypatch.setattr(readings, "OLD", 0.0)
    slow, no_time = Slow(), 1e-9
    slow.answer.set()
    reads = Readings(slow, patience=no_time)
    assert reads.latest().up
    first = slow.times
    assert reads.latest().up
    assert slow.times > first


def test_what_the_store_said_before_it_went_away_is_not_told_but_how_long_ago_it_was() -> None:
    answers = [True]

    def read() -> Sequence[Subject]:
        if not answers.pop():
            raise StoreError("the cable is pulled")
        return [QUIET]

    reads = Readings(read, patience=10.0)
    told = reads.latest()
    answers.append(False)
    gone = reads.latest()
    assert (told.up, told.content, gone.up, gone.content) == (True, [QUIET], False, None)
    assert gone.answered_at == told.answered_at


def test_who_asks_again_at_once_gets_the_same_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "FRESH", 60.0)
    reads = Readings(lambda: [QUIET], patience=10.0)
    assert reads.latest() is reads.latest()


def test_a_mistake_is_logged_and_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Sequence[Subject]] = [[QUIET]]
    reads = Readings(lambda: answers.pop(), patience=10.0)  # noqa: PLW0108 - bound late
    assert reads.latest().up
    assert not reads.latest().up
    assert not reads.latest().up
    assert caplog.text.count("metrics cannot be read: pop from empty list") == 1
    answers.append([QUIET])
    assert reads.latest().up


def test_it_goes_on_reading_while_somebody_is_interested_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "REFRESH", 0.01)
    monkeypatch.setattr(readings, "INTEREST", 0.2)
    times: list[float] = []

    def read() -> Sequence[Subject]:
        times.append(time.monotonic())
        return [QUIET]

    reads = Readings(read, patience=10.0)
    reads.latest()
    wait_until(lambda: len(times) > 3)
    wait_until(lambda: time.monotonic() > times[-1] + 0.5)
