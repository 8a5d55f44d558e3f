"""The testing kit, used the way users use it: no server anywhere, no waiting."""

from __future__ import annotations

import pytest
from celery import Celery

from resilient_tasks import Breaker, BreakerOpenError, ConfigurationError, Resilience, State, constant
from resilient_tasks.store.local import LocalStore
from resilient_tasks.testing import Clock, force, in_memory


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", minimum_calls=4, open_duration=10, trial_calls=2, open_jitter=0, ramp=0)


def fail() -> None:
    raise ConnectionError("payments is down")


def fail_times(breaker: Breaker, times: int) -> None:
    for _ in range(times):
        with pytest.raises(ConnectionError):
            breaker.call(fail)


def test_calls_open_a_breaker_and_trials_close_it(payments: Breaker, clock: Clock) -> None:
    fail_times(payments, 4)
    clock.settle()
    assert payments.state is State.OPEN
    with pytest.raises(BreakerOpenError):
        payments.call(fail)
    clock.advance(9.9)
    assert payments.state is State.OPEN
    clock.advance(0.1)
    assert payments.state is State.HALF_OPEN
    assert [payments.call(str, number) for number in (1, 2)] == ["1", "2"]
    clock.settle()
    assert payments.state is State.CLOSED


def test_counts_leave_the_window_as_time_passes(payments: Breaker, clock: Clock) -> None:
    fail_times(payments, 3)
    clock.settle()
    assert payments.snapshot().calls == 3
    clock.advance(40)
    assert payments.snapshot().calls == 0


@pytest.mark.parametrize("state", ["CLOSED", "OPEN", "FORCED_OPEN", "DISABLED", "SHADOW"])
def test_a_breaker_can_be_forced_into_a_state(payments: Breaker, clock: Clock, state: str) -> None:
    force(payments, state)
    assert payments.state == state
    force(payments, State.CLOSED)
    assert payments.state is State.CLOSED


@pytest.mark.parametrize("state", ["HALF_OPEN", "open", ""])
def test_other_states_cannot_be_forced(payments: Breaker, clock: Clock, state: str) -> None:
    with pytest.raises(ConfigurationError, match="CLOSED, OPEN, FORCED_OPEN, DISABLED, SHADOW"):
        force(payments, state)


def test_an_eager_task_is_served_by_its_fallback_while_open(app: Celery, payments: Breaker, clock: Clock) -> None:
    @app.task(breaker=payments, fallback=constant(0))
    def balance(account_id: int) -> int:
        return account_id * 100

    assert balance.apply(args=[1]).get() == 100
    force(payments, "OPEN")
    assert balance.apply(args=[1]).get() == 0


def test_a_breaker_defined_inside_goes_by_the_same_clock(resilience: Resilience, clock: Clock) -> None:
    mail = resilience.breaker("mail", open_duration=5, open_jitter=0)
    force(mail, "OPEN")
    clock.advance(5)
    assert mail.state is State.HALF_OPEN


def test_blocks_do_not_see_each_other(resilience: Resilience, payments: Breaker) -> None:
    with in_memory(resilience):
        force(payments, "FORCED_OPEN")
        with in_memory(resilience):
            assert payments.state is State.CLOSED
        assert payments.state is State.FORCED_OPEN
    with in_memory(resilience):
        assert payments.state is State.CLOSED


def test_afterwards_breakers_are_back_in_their_store(resilience: Resilience, payments: Breaker) -> None:
    resilience.use_store(LocalStore())
    force(payments, "FORCED_OPEN")
    with pytest.raises(ConnectionError), in_memory(resilience):
        payments.call(fail)
    assert payments.state is State.FORCED_OPEN


def test_without_a_block_the_configured_store_is_asked(resilience: Resilience, payments: Breaker) -> None:
    with in_memory(resilience):
        assert payments.state is State.CLOSED
    with pytest.raises(ConfigurationError, match="RESILIENT_TASKS_STORE_URL"):
        payments.snapshot()


def test_time_does_not_go_back(clock: Clock) -> None:
    with pytest.raises(ValueError, match="seconds=-1"):
        clock.advance(-1)
