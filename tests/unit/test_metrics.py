"""The catalogue of metrics, and what prometheus-client makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from celery import Celery
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilient_tasks import ConfigurationError, StoreError
from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.core.outage import Counts
from resilient_tasks.prometheus import HEALTH, METRICS, BreakerCollector, Subject, register

NOW = 1_789_000_000.0
OPEN = Subject(
    Snapshot(
        'pay"ments\n', State.OPEN, 17, 17, now=NOW, since=NOW - 60, calls=10, failures=4, slow=1, evidence=0.7,
        slow_evidence=0.2, open_until=NOW + 5,
        trials=2, deferred=3, oldest_deferred_at=NOW - 30, in_flight=4, concurrency_limit=8, active_children=2,
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


def scrape(read: Callable[[], Sequence[Subject]]) -> dict[tuple[str, frozenset[Any]], float]:
    """Return what Prometheus reads of a fleet: values by name and labels."""
    registry = CollectorRegistry()
    registry.register(BreakerCollector(read))
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
    shown = {
        name: value(values, name, breaker='pay"ments\n')
        for name in (
            "state_timestamp_seconds", "next_trial_timestamp_seconds", "failure_evidence", "slow_evidence",
            "failure_ratio", "slow_ratio", "refusals_total",
            "deferred_tasks", "oldest_deferred_seconds", "drain_eta_seconds",
            "deferrals_total", "repeated_deferrals_total", "resumed_tasks_total", "failed_tasks_total",
            "dead_letters_total", "expired_tasks_total", "revoked_tasks_total", "dropped_tasks_total",
            "redeliveries_total", "trials_total", "permits", "in_flight", "concurrency_limit", "hot_children",
        )
    }  # fmt: skip
    expected = (NOW - 60, NOW + 5, 0.7, 0.2, 0.4, 0.1, 7, 3, 30, 2280, 6, 2, 4, 11, 12, 13, 14, 15, 16, 5, 2, 4, 8, 2)
    assert tuple(shown.values()) == expected
    assert value(values, "calls_total", breaker=name, outcome="success") == 100
    assert value(values, "calls_total", breaker=name, outcome="slow") == 0
    assert value(values, "fallback_answers_total", breaker=name, source="<b>") == 1
    assert value(values, "transitions_total", breaker=name, state="OPEN") == 2
    assert value(values, "transitions_total", breaker=name, state="CLOSED") == 0
    assert value(values, "info", breaker=name, queue_name="resilient.deferred.payments") == 1
    assert value(values, "task_info", breaker=name, name="shop.charge") == 1


def test_what_a_breaker_does_not_have_has_no_series_and_what_has_not_happened_is_0() -> None:
    names = {name for name, _ in scrape(lambda: [QUIET])}
    for absent in (
        "next_trial_timestamp_seconds",
        "drain_eta_seconds",
        "in_flight",
        "concurrency_limit",
        "hot_children",
        "fallback_answers_total",
        "task_info",
    ):
        assert f"celery_breaker_{absent}" not in names
    assert value(scrape(lambda: [QUIET]), "refusals_total", breaker="quiet") == 0
    assert value(scrape(lambda: [QUIET]), "oldest_deferred_seconds", breaker="quiet") == 0


def test_a_store_that_is_away_is_shown_and_nothing_else() -> None:
    def away() -> Sequence[Subject]:
        raise StoreError("the cable is pulled")

    values = scrape(away)
    assert {name for name, _ in values} == set(HEALTH)
    assert value(values, "up") == 0
    assert value(values, "view_age_seconds") == float("inf")


def test_the_age_is_that_of_the_last_answer_and_a_store_that_is_away_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, answers = [100.0], [[QUIET]]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def read() -> Sequence[Subject]:
        if not answers:
            raise StoreError("the cable is pulled")
        return answers.pop()

    collector = BreakerCollector(read)

    def health() -> list[float]:
        return [family.samples[0].value for family in collector.collect() if family.name in HEALTH]

    assert health() == [1, 0, 0]
    now[0] = 107.0
    assert health() == health() == [0, 7, 0]
    assert caplog.text.count("metrics cannot be read: the cable is pulled") == 1


def test_kinds_follow_names() -> None:
    families = {family.name: family.type for family in BreakerCollector(list).describe()}
    for metric in METRICS:
        kind = "counter" if metric.name.endswith("_total") else "gauge"
        assert families[metric.name.removesuffix("_total")] == kind


# --- registering ------------------------------------------------------------------------------------


def test_registering_needs_a_resilience() -> None:
    with pytest.raises(ConfigurationError, match="has no Resilience"):
        register(Celery("bare", set_as_current=False), CollectorRegistry())


def test_registering_twice_is_an_error() -> None:
    registry = CollectorRegistry()
    registry.register(BreakerCollector(list))
    with pytest.raises(ValueError, match="celery_breaker_"):
        registry.register(BreakerCollector(list))
