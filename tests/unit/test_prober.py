"""Running probes: as trials, as active checks, under a time limit, side by side."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from resilient_tasks import Breaker, Resilience, State, StoreError
from resilient_tasks.checks import HealthCheckError, heartbeat
from resilient_tasks.core.model import Transition
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker import probes as probe_module
from resilient_tasks.worker.probes import Prober
from tests.support.doubles import FlakyStore, wait_until


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", trial_calls=2, open_duration=5, open_jitter=0, slow_call_duration=0.001)


class Rig:
    """Ticks by hand: runs what is due and waits for its end."""

    def __init__(self, clock: Clock) -> None:
        self.woken = 0
        self.clock = clock
        self.prober = Prober(self._wake)

    def _wake(self) -> None:
        self.woken += 1

    def begin(self, breaker: Breaker) -> bool:
        snapshot, probe = breaker.snapshot(), breaker._dependency.probe
        assert probe is not None
        if probe.is_due(snapshot):
            self.prober.start(breaker._dependency, probe, snapshot)
            return True
        return False

    def run(self, breaker: Breaker) -> State:
        self.begin(breaker)
        wait_until(lambda: not self.prober._watching[breaker.name].is_alive())
        return breaker.snapshot().state

    def half_open(self, breaker: Breaker) -> None:
        force(breaker, "OPEN")
        self.clock.advance(1000)
        assert breaker.snapshot().state is State.HALF_OPEN

    def check(self, breaker: Breaker, times: int = 1) -> State:
        """Let so many intervals pass and run an active probe in each."""
        breaker._dependency.fleet.store.advance(breaker._dependency.spec)
        for _ in range(times):
            self.clock.advance(10)
            state = self.run(breaker)
        return state


@pytest.fixture
def rig(payments: Breaker, clock: Clock) -> Iterator[Rig]:
    rig = Rig(clock)
    yield rig
    wait_until(lambda: not any(thread.is_alive() for thread in rig.prober._watching.values()))


@pytest.fixture
def changes(resilience: Resilience) -> list[Transition]:
    changes: list[Transition] = []
    resilience.fleet._announce = changes.append
    return changes


class Dependency:
    """A health check that a test can make fail, or hang until it is released."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.failure: BaseException | None = None
        self.asked = 0
        self.released = threading.Event()
        if not hangs:
            self.released.set()

    def __call__(self) -> None:
        self.asked += 1
        self.released.wait(60)
        if self.failure is not None:
            raise self.failure


# --- as trials ----------------------------------------------------------------------------------------


def test_trials_follow_each_other_until_the_breaker_closes(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency())
    rig.half_open(payments)
    assert rig.run(payments) is State.CLOSED
    assert (check.asked, rig.woken) == (2, 2)


def test_guards_inside_a_probe_share_its_permit(resilience: Resilience, rig: Rig) -> None:
    single = resilience.breaker("single", trial_calls=1, open_jitter=0)
    single.probe(lambda: single.call(lambda: single.call(int)))
    rig.half_open(single)
    assert rig.run(single) is State.CLOSED


def test_a_slow_probe_is_a_success_all_the_same(rig: Rig, payments: Breaker) -> None:
    payments.probe(lambda: time.sleep(0.01))
    rig.half_open(payments)
    assert rig.run(payments) is State.CLOSED


def test_so_many_successes_in_a_row_close_it(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(), successes_before_close=5)
    rig.half_open(payments)
    assert rig.run(payments) is State.CLOSED
    assert check.asked == 5
    assert payments.policy.trial_calls == 2, "of tasks released and resumed the policy still speaks"


def test_one_failure_between_them_opens_it_again(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(), successes_before_close=5)
    failures = [(ValueError("s3cret"), "ValueError"), (HealthCheckError("http_check(...): answered 503"),) * 2]
    for check.failure, cause in failures:
        rig.half_open(payments)
        assert rig.run(payments) is State.OPEN
        assert payments.snapshot().reason == f"1 of 5 trials failed, last: probe: {cause}"


def test_an_interval_spaces_the_trials_of_all_workers(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(), interval=5)
    rig.half_open(payments)
    assert rig.run(payments) is State.HALF_OPEN
    assert not Rig(rig.clock).begin(payments)
    rig.clock.advance(5.001)
    assert Rig(rig.clock).run(payments) is State.CLOSED
    assert check.asked == 2


def test_a_probe_that_hangs_has_failed_when_its_time_is_up(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(hangs=True), timeout=0.05)
    rig.half_open(payments)
    assert rig.run(payments) is State.OPEN
    assert payments.snapshot().reason.endswith("last: probe: no answer within 0.05 s")
    check.released.set()


def test_one_that_hangs_delays_no_other(resilience: Resilience, rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(hangs=True))
    mail = resilience.breaker("mail", trial_calls=1)
    mail.probe(Dependency())
    for breaker in (payments, mail):
        rig.half_open(breaker)
    rig.begin(payments)
    assert rig.run(mail) is State.CLOSED
    assert rig.prober._watching["payments"].is_alive()
    check.released.set()


def test_runs_that_hang_are_not_piled_up(
    rig: Rig, payments: Breaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(probe_module, "MOST_ABANDONED", 2)
    check = payments.probe(Dependency(hangs=True), timeout=0.01, active=True, failures_before_open=99)
    with caplog.at_level(logging.ERROR):
        rig.check(payments, times=4)
    wait_until(lambda: check.asked >= 2)
    assert check.asked == 2
    assert "2 probes of breaker 'payments' hang" in caplog.text
    assert payments.snapshot().failed_checks == 4
    check.released.set()
    wait_until(lambda: not any(run.is_alive() for run, _ in rig.prober._running["payments"]))
    payments.probe(check, active=True, failures_before_open=99)
    rig.check(payments)
    assert payments.snapshot().failed_checks == 0


def test_one_that_hangs_for_very_long_is_no_longer_counted(
    rig: Rig, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "MOST_ABANDONED", 1)
    monkeypatch.setattr(probe_module, "GIVEN_UP_AFTER", 0.0)
    check = payments.probe(Dependency(hangs=True), timeout=0.01, active=True, failures_before_open=99)
    rig.check(payments, times=3)
    wait_until(lambda: check.asked == 3)
    check.released.set()


# --- active -------------------------------------------------------------------------------------------


def test_it_opens_before_any_task_has_failed(rig: Rig, payments: Breaker, changes: list[Transition]) -> None:
    check = payments.probe(Dependency(), active=True)
    assert rig.check(payments, times=2) is State.CLOSED
    check.failure = HealthCheckError("http_check('http://b/'): answered 503, expected 200..299", 503)
    assert rig.check(payments, times=2) is State.CLOSED
    assert changes == []
    assert rig.check(payments) is State.OPEN
    assert [(transition.state, transition.actor) for transition in changes] == [(State.OPEN, "")]
    assert changes[0].reason == f"health check failed 3 times in a row, last: probe: {check.failure}"
    assert payments.snapshot().failures == 0


def test_two_workers_make_each_check_once(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(), active=True)
    payments._dependency.fleet.store.advance(payments._dependency.spec)
    rig.clock.advance(10)
    other = Rig(rig.clock)
    snapshot, probe = payments.snapshot(), payments._dependency.probe
    assert probe is not None
    for prober in (rig.prober, other.prober):
        prober.start(payments._dependency, probe, snapshot)
    for prober in (rig.prober, other.prober):
        wait_until(lambda: not prober._watching["payments"].is_alive())  # noqa: B023 - called at once
    assert check.asked == 1


def test_a_check_that_ends_after_the_breaker_has_moved_says_nothing(rig: Rig, payments: Breaker) -> None:
    check = payments.probe(Dependency(hangs=True), active=True, failures_before_open=1)
    check.failure = ConnectionError()
    payments._dependency.fleet.store.advance(payments._dependency.spec)
    rig.clock.advance(10)
    rig.begin(payments)
    payments.disable()
    check.released.set()
    assert rig.run(payments) is State.DISABLED
    payments.reset()
    assert payments.snapshot().failed_checks == 0


def test_while_the_store_is_away_nothing_is_checked(
    resilience: Resilience, rig: Rig, payments: Breaker, clock: Clock
) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)
    check = payments.probe(Dependency(), active=True, failures_before_open=1)
    rig.check(payments)
    assert check.asked == 1
    clock.advance(10)
    snapshot, probe = payments.snapshot(), payments._dependency.probe
    assert probe is not None
    store.is_unavailable = True
    rig.prober.start(payments._dependency, probe, snapshot)
    wait_until(lambda: not rig.prober._watching["payments"].is_alive())
    assert check.asked == 1


def test_a_store_that_goes_away_during_a_check_does_not_get_its_result(
    resilience: Resilience, rig: Rig, payments: Breaker, clock: Clock
) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)

    def ping() -> None:
        store.is_unavailable = True
        raise ConnectionError

    payments.probe(ping, active=True, failures_before_open=1)
    rig.check(payments)
    store.is_unavailable = False
    assert payments.snapshot().state is State.CLOSED


# --- heartbeat ----------------------------------------------------------------------------------------


def test_silence_is_failure_and_a_heartbeat_heals(rig: Rig, payments: Breaker) -> None:
    payments.probe(heartbeat(ttl=15), active=True, failures_before_open=1)
    payments.heartbeat()
    assert rig.check(payments) is State.CLOSED
    assert rig.check(payments) is State.OPEN
    assert "heartbeat(ttl=15): the last report is 20.0 s old" in payments.snapshot().reason
    rig.half_open(payments)
    payments.heartbeat()
    assert rig.run(payments) is State.CLOSED


def test_a_heartbeat_that_is_not_received_is_no_secret(resilience: Resilience, payments: Breaker, clock: Any) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)
    store.is_unavailable = True
    with pytest.raises(StoreError):
        payments.heartbeat()
