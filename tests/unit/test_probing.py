"""When a probe is due, and what may be said of one."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from resilient_tasks import ConfigurationError
from resilient_tasks.checks import ACTIVE_INTERVAL, Probe
from resilient_tasks.core.model import Snapshot, State

START = 1_789_000_000.0


def ping() -> None:
    pass


def probe(name: str = "payments", **settings: Any) -> Probe:
    return Probe(breaker=name, function=ping, **settings)


def seen(state: State, after: float = 0.0, **known: Any) -> Snapshot:
    return Snapshot("payments", state, epoch=1, version=1, now=START + after, since=START, **known)


def due_times(one: Probe, seconds: int) -> list[int]:
    """Run a probe whenever it is due, looking once a second; return when that was."""
    times: list[int] = []
    for second in range(seconds):
        checked_at = START + times[-1] if times else None
        if one.is_due(seen(State.CLOSED, after=second, checked_at=checked_at)):
            times.append(second)
    return times


def test_an_active_probe_runs_once_per_interval() -> None:
    times = due_times(probe(active=True, interval=7), 70)
    assert len(times) in {9, 10}
    assert {later - earlier for earlier, later in pairwise(times)} <= {6, 7, 8}
    assert due_times(probe(active=True), 30) == due_times(probe(active=True, interval=ACTIVE_INTERVAL), 30)


def test_many_are_not_run_at_once() -> None:
    firsts = [due_times(probe(f"breaker-{number}", active=True), 20)[0] for number in range(100)]
    assert max(firsts.count(second) for second in set(firsts)) <= 25
    assert len(set(firsts)) >= 9


def test_an_active_one_rests_while_the_breaker_refuses_or_an_operator_has_disabled_it() -> None:
    due = [state for state in State if probe(active=True).is_due(seen(state, after=100))]
    assert due == [State.CLOSED, State.HALF_OPEN, State.SHADOW]


def test_a_breaker_that_was_never_used_is_due_so_that_it_comes_into_being() -> None:
    unknown = replace(seen(State.CLOSED), epoch=0)
    assert probe(active=True).is_due(unknown)
    assert not probe().is_due(unknown)


def test_without_active_it_is_due_in_half_open_only() -> None:
    assert [state for state in State if probe().is_due(seen(state, after=100))] == [State.HALF_OPEN]


def test_in_half_open_an_interval_spaces_the_runs() -> None:
    spaced = probe(interval=5)
    assert spaced.is_due(seen(State.HALF_OPEN))
    assert not spaced.is_due(seen(State.HALF_OPEN, after=4.9, checked_at=START))
    assert spaced.is_due(seen(State.HALF_OPEN, after=5.1, checked_at=START))
    assert probe().is_due(seen(State.HALF_OPEN, after=0.1, checked_at=START))


@pytest.mark.parametrize(
    ("settings", "limit", "failures"),
    [
        ({}, 10, 3),
        ({"interval": 4}, 4, 3),
        ({"interval": 60, "active": True}, 10, 3),
        ({"timeout": 60}, 60, 3),
        ({"timeout": 30, "interval": 30, "active": True, "failures_before_open": 1}, 30, 1),
    ],
)
def test_what_is_left_unsaid(settings: dict[str, Any], limit: float, failures: int) -> None:
    assert (probe(**settings).limit, probe(**settings).failures_allowed) == (limit, failures)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"timeout": 0}, "timeout=0: allowed is a positive number of seconds or None"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"timeout": 11, "active": True}, "timeout=11: allowed is up to the interval of 10 seconds"),
        ({"timeout": 6, "interval": 5}, "timeout=6: allowed is up to the interval of 5 seconds"),
        ({"interval": float("inf")}, "interval=inf"),
        ({"active": "yes"}, "active='yes': allowed is True or False"),
        ({"failures_before_open": 0, "active": True}, "failures_before_open=0: allowed is an integer of 1 or more"),
        ({"failures_before_open": 3}, "failures_before_open=3: allowed is None unless active=True"),
        ({"successes_before_close": 1.0}, "successes_before_close=1.0"),
    ],
)
def test_mistakes_name_breaker_argument_value_and_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        probe(**settings)
    assert f"probe of breaker 'payments': {message}" in str(raised.value)


def test_a_probe_can_be_called() -> None:
    with pytest.raises(ConfigurationError, match="function='http://b/'"):
        Probe(breaker="payments", function="http://b/")  # type: ignore[arg-type]
