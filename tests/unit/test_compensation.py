"""Late calls, suspect breakers and spare slots, without a worker: who may run, and when the pool grows and shrinks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.bootsteps import RUN

from resilient_tasks import Breaker, Resilience
from resilient_tasks.core.outage import SPARE_SLOTS, SUSPECTED
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.testing import Clock, in_memory
from resilient_tasks.worker import compensation as module
from resilient_tasks.worker.compensation import LINGER, MOST_LATE, REFUSED_FOR, Compensation
from resilient_tasks.worker.context import runtime_of
from tests.support.doubles import ManualClock


class Pool:
    """A pool of a kind that Celery's ``grow`` and ``shrink`` are enough for."""

    active, is_green = True, False

    def __init__(self, size: int) -> None:
        self.num_processes = size
        self.refuses = False

    def grow(self, count: int) -> None:
        if self.refuses:
            raise OSError("out of memory")
        self.num_processes += count

    def shrink(self, count: int) -> None:
        self.num_processes -= count


class Worker:
    """One worker's compensation on a clock of the test's."""

    def __init__(self, app: Celery, size: int, clock: ManualClock) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.tallies: list[tuple[str, str]] = []
        self.looks: list[Any] = []
        self.pool = Pool(size)
        self.clock = clock
        runtime = runtime_of(app)
        runtime.fleet.reporter.tally = lambda *args: self.tallies.append(args)  # type: ignore[method-assign]
        self.consumer = SimpleNamespace(
            pool=self.pool,
            timer=SimpleNamespace(call_after=self._call_after),
            event_dispatcher=SimpleNamespace(send=lambda kind, **fields: self.events.append((kind, fields))),
            blueprint=SimpleNamespace(state=RUN),
            controller=SimpleNamespace(),
            initial_prefetch_count=4 * size,
            prefetch_multiplier=4,
            qos=None,
        )
        self.compensation = Compensation(runtime)
        self.compensation.start(self.consumer)

    def _call_after(self, seconds: float, look: Any) -> Any:
        entry = SimpleNamespace(at=self.clock.now + seconds, look=look, cancelled=False)
        entry.cancel = lambda: setattr(entry, "cancelled", True)
        self.looks.append(entry)
        return entry

    def advance(self, seconds: float) -> None:
        """Let time pass, with all looks that fall due."""
        until = self.clock.now + seconds
        while self.looks and self.looks[-1].at <= until:
            entry = self.looks.pop()
            self.clock.now = max(self.clock.now, entry.at)
            if not entry.cancelled:
                entry.look()
        self.clock.now = until

    def run(self, key: object, *breakers: Breaker) -> bool:
        """Start a run if it may start."""
        called = [breaker._dependency for breaker in breakers]
        if self.compensation.limiting(called) is not None:
            return False
        self.compensation.begin(key, called)
        self.compensation.accept(key)
        return True

    def end(self, *keys: object) -> None:
        for key in keys:
            self.compensation.end(key)


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, now: ManualClock) -> Celery:
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=now))
    return Celery("tasks", broker="memory://", set_as_current=False)


@pytest.fixture
def now() -> ManualClock:
    return ManualClock()


@pytest.fixture
def worker(app: Celery, clock: Clock, now: ManualClock) -> Worker:
    return Worker(app, 4, now)


def hang(worker: Worker, breaker: Breaker, count: int) -> list[str]:
    keys = [f"{breaker.name} {number}" for number in range(count)]
    assert all(worker.run(key, breaker) for key in keys)
    worker.advance(0.6)
    return keys


def test_in_healthy_times_any_number_of_calls_may_run_and_the_pool_stays_as_it_is(
    worker: Worker, payments: Breaker
) -> None:
    for number in range(200):
        assert worker.run(number, payments)
        worker.advance(0.1)
        worker.end(number)
    assert (worker.pool.num_processes, worker.events, worker.tallies) == (4, [], [])


def test_a_suspect_breaker_gets_all_slots_but_one(worker: Worker, payments: Breaker) -> None:
    hang(worker, payments, 1)
    assert "payments" in worker.compensation.suspects
    assert worker.run("second", payments)
    assert worker.run("third", payments)
    assert not worker.run("fourth", payments)
    assert worker.tallies == [("payments", SUSPECTED)]
    assert worker.events == [("breaker-suspect", {"breaker": "payments"})]


def test_it_is_suspect_until_a_call_has_returned_in_time_and_none_is_late(worker: Worker, payments: Breaker) -> None:
    worker.run("usual", payments)
    worker.advance(0.01)
    worker.end("usual")
    late, _ = hang(worker, payments, 2)
    worker.run("quick", payments)
    worker.end("quick")
    assert "payments" in worker.compensation.suspects, "others are late still"
    worker.end(late, _)
    assert "payments" in worker.compensation.suspects, "they were late"
    worker.run("quick", payments)
    worker.end("quick")
    assert "payments" not in worker.compensation.suspects


def test_a_task_over_the_share_waits_as_long_as_the_breaker_is_suspect_already(
    worker: Worker, payments: Breaker
) -> None:
    hang(worker, payments, 3)
    assert worker.compensation.wait(payments._dependency) == pytest.approx(0.5)
    waits = []
    for _ in range(4):
        waits.append(worker.compensation.wait(payments._dependency))
        worker.advance(waits[-1])
    assert waits == pytest.approx([0.5, 0.6, 1.2, 2.4], abs=0.15)
    worker.advance(100)
    assert worker.compensation.wait(payments._dependency) == payments.policy.open_duration


def test_slots_are_added_while_late_calls_hold_all_and_taken_back_when_they_have_returned(
    worker: Worker, payments: Breaker, resilience: Resilience
) -> None:
    keys = hang(worker, payments, 4)
    assert (worker.pool.num_processes, worker.consumer.initial_prefetch_count) == (5, 20)
    assert worker.tallies == [("payments", SUSPECTED), ("payments", SPARE_SLOTS)]
    assert worker.events[1][0] == "worker-slot-added"
    worker.advance(60)
    assert worker.pool.num_processes == 5, "one is free"
    others = [resilience.breaker(f"other{number}") for number in range(3)]
    for other in others[:2]:
        assert worker.run(other.name, other)
        worker.advance(1.0)
    assert worker.pool.num_processes == 6, "no more than two"
    worker.end(*keys, *(other.name for other in others))
    worker.advance(LINGER - 1)
    assert worker.pool.num_processes == 6
    worker.advance(LINGER)
    assert (worker.pool.num_processes, worker.consumer.initial_prefetch_count) == (4, 16)
    assert worker.events[-1] == ("worker-slot-removed", {"slots": 4, "spare": 0, "reason": "late calls have returned"})


def test_suspect_breakers_share_the_slots_but_one_and_each_may_have_a_call(
    worker: Worker, payments: Breaker, resilience: Resilience
) -> None:
    accounts = resilience.breaker("accounts")
    worker.run("usual", accounts)
    worker.end("usual")
    hang(worker, payments, 3)
    accounts_late = hang(worker, accounts, 1)
    assert not worker.run("one more", payments)
    assert not worker.run("one more", accounts)
    worker.end(*accounts_late)
    assert worker.run("one", accounts), "it could never return in time else"
    assert not worker.run("two", accounts)


def test_children_that_hang_leave_a_slot_however_many_they_are(
    app: Celery, resilience: Resilience, now: ManualClock
) -> None:
    tenants = resilience.breaker("tenants")
    with in_memory(resilience):
        worker = Worker(app, 2, now)
        for number in range(400):
            worker.run(number, tenants.child(f"tenant-{number}"))
            worker.advance(0.6)
        assert worker.pool.num_processes == 4
        running = sum(call.started is not None for call in worker.compensation._calls.values())
        assert running == 3, "one of the two spare slots is left to others"


def test_where_calls_usually_take_long_they_are_late_after_twice_as_long(worker: Worker, payments: Breaker) -> None:
    worker.run("first", payments)
    worker.advance(2.0)
    assert "payments" in worker.compensation.suspects
    worker.end("first")
    assert "payments" not in worker.compensation.suspects, "that is what its calls take"
    hang(worker, payments, 4)
    worker.advance(3.0)
    assert "payments" not in worker.compensation.suspects
    worker.advance(1.5)
    assert "payments" in worker.compensation.suspects


def test_a_worker_that_has_known_nothing_but_a_hang_finds_it_late(worker: Worker, payments: Breaker) -> None:
    worker.run("first", payments)
    worker.advance(MOST_LATE * 0.5 + 1)
    worker.end("first")
    assert "payments" in worker.compensation.suspects


def test_no_call_that_has_passed_slow_call_duration_is_in_time(worker: Worker, resilience: Resilience) -> None:
    strict = resilience.breaker("strict", slow_call_duration=0.2)
    worker.run("first", strict)
    worker.advance(0.6)
    assert "strict" in worker.compensation.suspects
    worker.end("first")
    assert "strict" in worker.compensation.suspects


def test_while_the_store_is_unavailable_no_breaker_is_limited(
    worker: Worker, payments: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang(worker, payments, 3)
    worker.advance(1.0)
    assert not worker.run("one more", payments)
    monkeypatch.setattr(FailoverStore, "is_unavailable", True)
    assert worker.run("another", payments), "what is deferred could not be resumed"


def test_a_breaker_in_shadow_is_never_limited(worker: Worker, payments: Breaker) -> None:
    payments.shadow(reason="a first look")
    hang(worker, payments, 4)
    assert worker.run("one more", payments)


def test_a_pool_that_refuses_to_grow_is_asked_again_later(
    worker: Worker, payments: Breaker, caplog: pytest.LogCaptureFixture
) -> None:
    worker.pool.refuses = True
    hang(worker, payments, 4)
    worker.advance(REFUSED_FOR / 2)
    assert caplog.text.count("has refused to grow: out of memory") == 1
    worker.pool.refuses = False
    worker.advance(REFUSED_FOR)
    assert worker.pool.num_processes == 5


def test_a_pool_that_autoscales_grows_by_itself_first(
    worker: Worker, payments: Breaker, resilience: Resilience
) -> None:
    worker.consumer.controller.autoscaler = SimpleNamespace(max_concurrency=6)
    hang(worker, payments, 4)
    worker.advance(5)
    assert worker.pool.num_processes == 4
    worker.pool.grow(2)
    for name in ("accounts", "ledger"):
        hang(worker, resilience.breaker(name), 1)
    assert worker.pool.num_processes == 7


def test_a_spare_slot_that_an_operator_has_removed_is_not_removed_again(worker: Worker, payments: Breaker) -> None:
    keys = hang(worker, payments, 4)
    worker.pool.shrink(1)
    worker.end(*keys)
    worker.advance(3 * LINGER)
    assert worker.pool.num_processes == 4


def test_a_run_that_the_pool_has_discarded_is_known(worker: Worker, payments: Breaker) -> None:
    worker.run("accepted", payments)
    for key in ("finished", "discarded"):
        worker.compensation.begin(key, [payments._dependency])
    worker.end("finished")
    assert worker.compensation.unaccepted() == ["discarded"]


def test_without_spare_slots_none_is_added(app: Celery, payments: Breaker, clock: Clock, now: ManualClock) -> None:
    settings: Any = SimpleNamespace(late_after=0.5, spare_slots=0)
    runtime_of(app).settings = settings
    worker = Worker(app, 2, now)
    hang(worker, payments, 2)
    worker.advance(5)
    assert worker.pool.num_processes == 2
    assert not worker.run("one more", payments)
