"""Health checks that are made while tasks are admitted, whichever worker makes them."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import Outcome, State, Verb
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.redis import RedisStore
from tests.contract.lab import SHARED, Lab


def test_so_many_failures_in_a_row_open_it(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.ask()
    assert breaker.health_checks("FFSFF", cause="HTTP 503").snapshot.failed_checks == 2
    assert breaker.transitions == []

    snapshot = breaker.health_checks("F", cause="HTTP 503").snapshot

    assert (snapshot.state, snapshot.calls, snapshot.failed_checks) == (State.OPEN, 0, 0)
    assert snapshot.reason == "health check failed 3 times in a row, last: HTTP 503"
    assert snapshot.retry_after == pytest.approx(5.0)
    assert [made.state for made in breaker.transitions] == [State.OPEN]


def test_retry_after_sets_the_open_time(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.ask()
    assert breaker.health_checks("F", limit=1, retry_after=42.0).snapshot.retry_after == pytest.approx(42.0)


def test_tasks_that_succeed_meanwhile_do_not_interrupt_the_row(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.ask()
    breaker.health_checks("FF")
    breaker.calls("SSS")
    assert breaker.health_checks("F").snapshot.state is State.OPEN


def test_in_shadow_it_reports_once_that_it_would_have_opened(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.SHADOW)
    made = breaker.health_checks("FFF", cause="HTTP 503").transition
    assert made is not None
    assert (made.state, made.would_open) == (State.SHADOW, True)
    assert made.reason == "health check failed 3 times in a row, last: HTTP 503"
    assert breaker.health_checks("FFFF").transition is None
    assert breaker.state is State.SHADOW


@pytest.mark.parametrize("verb", [Verb.ISOLATE, Verb.DISABLE, Verb.TRIP])
def test_what_an_operator_has_set_stays(lab: Lab, verb: Verb) -> None:
    breaker = lab.breaker()
    before = breaker.command(verb).snapshot
    assert breaker.health_checks("FFF", limit=1).snapshot == before


def test_a_check_of_a_former_epoch_says_nothing(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.command(Verb.DISABLE).snapshot.epoch
    breaker.command(Verb.RESET)
    late = lab.store.report_health_check(breaker.spec, Outcome.FAILURE, Evidence(epoch, ()), limit=1)
    assert (late.snapshot.state, late.snapshot.failed_checks) == (State.CLOSED, 0)


def test_a_reset_forgets_failed_checks(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.ask()
    breaker.health_checks("FF")
    assert breaker.command(Verb.RESET).snapshot.failed_checks == 0


def test_one_of_many_makes_the_check(lab: Lab) -> None:
    breaker = lab.breaker()
    assert breaker.snapshot().checked_at is None
    began = lab.clock()
    assert [lab.store.begin_health_check(breaker.spec, since=began) for _ in range(3)] == [True, False, False]
    assert breaker.snapshot().checked_at == pytest.approx(began)
    lab.clock.advance(10)
    assert not lab.store.begin_health_check(breaker.spec, since=began)
    assert lab.store.begin_health_check(breaker.spec, since=began + 0.001)


def test_it_is_remembered_across_transitions(lab: Lab) -> None:
    breaker = lab.breaker()
    lab.store.begin_health_check(breaker.spec, since=lab.clock())
    breaker.half_open()
    assert not lab.store.begin_health_check(breaker.spec, since=lab.clock() - 5)


def test_a_probe_may_ask_for_so_many_successes_in_a_row(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=3, trial_successes=1)
    breaker.spec = Spec(breaker.name, breaker.spec.policy, in_a_row=5)
    assert breaker.half_open().trials("SSSS") is State.HALF_OPEN
    assert breaker.trials("S") is State.CLOSED
    assert breaker.half_open().trials("SF") is State.OPEN


@SHARED
def test_a_record_of_an_older_release_knows_nothing_of_health_checks(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.ask()
    state = Keys("test").breaker(breaker.name).state
    assert isinstance(lab.store, RedisStore)
    lab.store._server.run(lambda client: client.hdel(state, "failed_checks", "checked_at"))
    assert (breaker.snapshot().failed_checks, breaker.snapshot().checked_at) == (0, None)
    assert lab.store.begin_health_check(breaker.spec, since=lab.clock())
    assert breaker.health_checks("FFF").snapshot.state is State.OPEN
