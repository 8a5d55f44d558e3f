"""Outcomes on their way to the store: batches, order, urgency, bounds, leases."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Answer, Calls, Outcome, State, Transition, Verb
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.store.reporter import BATCH_INTERVAL, LEASE, Reporter
from resilient_tasks.store.view import CachedState, View
from tests.support.doubles import FlakyStore, ManualClock, wait_until

SUCCESS, FAILURE, SLOW, IGNORED = Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW, Outcome.IGNORED
SPEC = Spec("payments", BreakerPolicy(minimum_calls=5, trial_calls=1, open_duration=1, open_jitter=0))


class Rig:
    """A reporter with everything around it, on a clock that stops."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = FlakyStore(self.clock)
        shared = FailoverStore(self.store, clock=self.clock)
        self.view = View(shared, self.clock)
        self.cached: CachedState = self.view.declare(SPEC)
        self.changes: list[Transition] = []
        self.reporter = Reporter(shared, self.view, self.learn, self.clock)
        self.view.refresh()

    def learn(self, answer: Answer, asked: int) -> None:
        self.view.update(answer.snapshot, asked)
        if answer.transition is not None:
            self.changes.append(answer.transition)

    def advance(self, seconds: float) -> None:
        """Advance the time and have the thread look at the clock."""
        self.clock.advance(seconds)
        with self.reporter._condition:
            self.reporter._condition.notify_all()

    def report(self, *outcomes: Outcome, **details: Any) -> int:
        verdicts = [Verdict(outcome, **details) for outcome in outcomes]
        return max(self.reporter.report(self.cached, self.cached.epoch, verdict) for verdict in verdicts)

    def recorded(self) -> list[Evidence]:
        return [arguments[1] for name, arguments in list(self.store.arguments) if name == "record"]

    def half_open(self) -> str:
        """Bring the breaker to HALF_OPEN and return the holder of its permit."""
        self.store.command(SPEC, Verb.TRIP)
        self.clock.advance(1)
        self.view.update(self.store.acquire(SPEC, "holder", lease=LEASE).snapshot)
        return "holder"


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.reporter.close()


# --- batches ------------------------------------------------------------------------------------------


def test_successes_wait_for_company(rig: Rig) -> None:
    rig.report(SUCCESS)
    wait_until(lambda: len(rig.recorded()) == 1)
    rig.report(*[SUCCESS] * 1000)
    assert rig.reporter.flush(60)
    assert [evidence.runs for evidence in rig.recorded()] == [(Calls(SUCCESS),), (Calls(SUCCESS, 1000),)]
    assert rig.view.state("payments").snapshot.calls == 1001


def test_successes_are_sent_when_their_interval_is_over(rig: Rig) -> None:
    rig.report(SUCCESS)
    assert rig.reporter.flush(60)
    rig.report(SUCCESS)
    rig.advance(BATCH_INTERVAL / 2)
    assert len(rig.recorded()) == 1
    rig.advance(BATCH_INTERVAL)
    wait_until(lambda: len(rig.recorded()) == 2)


def test_the_thread_wakes_by_itself() -> None:
    store = FlakyStore()
    shared = FailoverStore(store)
    view = View(shared)
    cached = view.declare(SPEC)
    reporter = Reporter(shared, view, lambda *_: None)
    for sent in range(1, 4):
        reporter.report(cached, cached.epoch, Verdict(SUCCESS))
        wait_until(lambda sent=sent: store.calls["record"] == sent)  # type: ignore[misc]
    reporter.close()


def test_a_failure_is_sent_at_once_with_what_came_before_it(rig: Rig) -> None:
    rig.report(SUCCESS)
    wait_until(lambda: len(rig.recorded()) == 1)
    position = rig.report(SUCCESS, SUCCESS, SLOW, FAILURE, cause="ReadTimeout", retry_after=3.0)
    assert rig.reporter.wait(position, 60)
    sent = [run for evidence in rig.recorded()[1:] for run in evidence.runs]
    assert [calls.outcome for calls in sent] == [SUCCESS, SLOW, FAILURE]
    assert rig.recorded()[-1].cause == "ReadTimeout"
    assert rig.recorded()[-1].retry_after == 3.0


def test_ignored_calls_are_not_sent(rig: Rig) -> None:
    assert rig.report(IGNORED) == 0
    assert rig.reporter.flush(60)
    assert rig.store.calls["record"] == 0


def test_waiting_for_a_success_takes_no_time(rig: Rig) -> None:
    assert rig.reporter.wait(rig.report(SUCCESS), timeout=0)


def test_the_next_look_sees_what_a_failure_did(rig: Rig) -> None:
    for _ in range(5):
        rig.reporter.wait(rig.report(FAILURE, cause="HTTP 503"), 60)
    assert rig.cached.snapshot.state is State.OPEN
    assert [(change.state, change.reason) for change in rig.changes] == [
        (State.OPEN, "evidence 5 of 5: of the last 5 calls 5 failed, last: HTTP 503")
    ]


def test_many_threads_lose_nothing(rig: Rig) -> None:
    rig.store.command(SPEC, Verb.SHADOW)
    rig.view.refresh()
    threads = [threading.Thread(target=lambda: rig.report(*[SUCCESS, FAILURE] * 500)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rig.reporter.flush(60)
    assert rig.cached.snapshot.calls == 8000
    assert rig.cached.snapshot.failures == 4000


def test_breakers_are_reported_apart(rig: Rig) -> None:
    mail = rig.view.declare(Spec("mail"))
    rig.report(SUCCESS)
    rig.reporter.report(mail, mail.epoch, Verdict(SUCCESS))
    assert rig.reporter.flush(60)
    assert rig.store.calls["record"] == 2
    assert rig.cached.snapshot.calls == mail.snapshot.calls == 1


# --- what is not worth sending ------------------------------------------------------------------------


def test_nothing_is_sent_while_disabled(rig: Rig) -> None:
    rig.store.command(SPEC, Verb.DISABLE)
    rig.view.refresh()
    rig.report(SUCCESS, FAILURE)
    assert rig.reporter.flush(60)
    assert rig.store.calls["record"] == 0


def test_outcomes_of_an_epoch_that_is_over_are_not_sent(rig: Rig) -> None:
    rig.reporter.wait(rig.report(SUCCESS, FAILURE), 60)
    sent = rig.store.calls["record"]
    former = rig.cached.epoch
    rig.store.command(SPEC, Verb.TRIP)
    rig.view.refresh()
    rig.reporter.wait(rig.reporter.report(rig.cached, former, Verdict(FAILURE)), 60)
    assert rig.store.calls["record"] == sent


def test_what_was_admitted_before_the_store_knew_the_breaker_counts(rig: Rig) -> None:
    assert rig.cached.epoch == 0
    rig.report(SUCCESS, SUCCESS)
    assert rig.reporter.flush(60)
    assert rig.cached.epoch > 0
    rig.reporter.report(rig.cached, 0, Verdict(FAILURE))
    rig.report(FAILURE)
    assert rig.reporter.flush(60)
    assert (rig.cached.snapshot.calls, rig.cached.snapshot.failures) == (4, 2)


# --- mistakes of others -------------------------------------------------------------------------------


def test_a_mistake_in_the_store_does_not_end_the_thread(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(rig.store.inner, "record", lambda *_, **__: 1 / 0)
        rig.reporter.wait(rig.report(FAILURE), 60)
    assert "ZeroDivisionError" in caplog.text
    rig.reporter.wait(rig.report(FAILURE), 60)
    assert rig.cached.snapshot.failures == 1


def test_a_listener_that_guards_a_call_does_not_wait_for_itself(rig: Rig) -> None:
    answers: list[bool] = []
    rig.reporter._learn = lambda *_: answers.append(rig.reporter.wait(10**9, 60))
    rig.reporter.wait(rig.report(*[FAILURE] * 5), 60)
    wait_until(lambda: answers)
    assert not any(answers)  # one for each batch: five failures may travel in two


# --- trials -------------------------------------------------------------------------------------------


def test_a_settled_trial_closes_the_breaker(rig: Rig) -> None:
    holder = rig.half_open()
    rig.reporter.settle(SPEC, holder, rig.cached.epoch, Verdict(SUCCESS), wait=60)
    assert rig.cached.snapshot.state is State.CLOSED
    assert [change.state for change in rig.changes] == [State.CLOSED]


def test_a_held_permit_outlives_its_lease(rig: Rig) -> None:
    holder = rig.half_open()
    rig.reporter.hold("payments", holder, rig.clock() + 60)

    def renewed_at_least(times: int) -> bool:
        return rig.store.calls["renew"] >= times

    for step in range(1, 9):
        rig.advance(LEASE / 3)
        wait_until(functools.partial(renewed_at_least, step))
    assert rig.store.read([SPEC])[0].trials == 1
    rig.reporter.settle(SPEC, holder, rig.cached.epoch, Verdict(SUCCESS), wait=60)
    assert rig.cached.snapshot.state is State.CLOSED


def test_a_permit_is_held_no_longer_than_its_trial_may_take(rig: Rig) -> None:
    holder = rig.half_open()
    rig.reporter.hold("payments", holder, rig.clock() + LEASE)
    rig.advance(LEASE)
    wait_until(lambda: not rig.reporter._leases._held)
    assert rig.store.calls["renew"] == 0


def test_a_permit_that_was_lost_is_given_up(rig: Rig) -> None:
    rig.half_open()
    rig.reporter.hold("payments", "unknown", rig.clock() + 60)
    rig.advance(LEASE)
    wait_until(lambda: not rig.reporter._leases._held)
    assert rig.store.calls["renew"] == 1


# --- beginning and end --------------------------------------------------------------------------------


def test_there_is_no_thread_before_the_first_outcome(rig: Rig) -> None:
    assert rig.reporter._thread is None
    assert rig.reporter.flush(0)
    assert rig.reporter._thread is None


def test_closing_sends_what_waits_and_ends_the_thread(rig: Rig) -> None:
    rig.report(SUCCESS)
    thread = rig.reporter._thread
    assert rig.reporter.close()
    assert thread is not None
    assert not thread.is_alive()
    assert rig.store.inner.read([SPEC])[0].calls == 1
    rig.report(SUCCESS)
    assert rig.reporter.flush(60)
    assert rig.cached.snapshot.calls == 2


def test_a_flush_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(rig.store.inner, "record", lambda *_, **__: release.wait(60))
    rig.report(SUCCESS)
    assert not rig.reporter.flush(0.05)
    release.set()


def test_a_forked_child_sends_its_own_outcomes_only(rig: Rig) -> None:
    rig.report(SUCCESS)
    wait_until(lambda: len(rig.recorded()) == 1)
    rig.report(SUCCESS, SUCCESS)  # wait for the interval, in the parent
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        rig.store.arguments.clear()
        rig.report(FAILURE)
        rig.reporter.flush(60)
        sent = [(str(calls.outcome), calls.number) for evidence in rig.recorded() for calls in evidence.runs]
        os.write(writer, repr(sent).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "[('FAILURE', 1)]"
    os.waitpid(pid, 0)
    assert rig.reporter.flush(60)
    assert rig.cached.snapshot.calls == 3


def test_the_last_outcomes_are_sent_at_exit() -> None:
    script = """
        from resilient_tasks.breaker import Breaker
        from resilient_tasks.core.model import Answer, Snapshot, State
        from resilient_tasks.dependency import Fleet
        from resilient_tasks.store.local import LocalStore

        class Loud(LocalStore):
            def record(self, spec, evidence, **kwargs):
                print(*(f"{calls.outcome} {calls.number}" for calls in evidence.runs), flush=True)
                return super().record(spec, evidence, **kwargs)

        fleet = Fleet(Loud())
        breaker = Breaker("payments", fleet=lambda: fleet)
        breaker.call(int)
        fleet.reporter.flush(60)
        for _ in range(3):
            breaker.call(int)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=True
    )
    assert run.stdout.splitlines() == ["SUCCESS 1", "SUCCESS 3"]
    assert run.stderr == ""
