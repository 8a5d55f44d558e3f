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


class Desk:
    """A reporter with everything around it, on a clock that stands still."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.store = FlakyStore(self.clock)
        shared = FailoverStore(self.store, clock=self.clock)
        self.view = View(shared, self.clock)
        self.standing: CachedState = self.view.declare(SPEC)
        self.told: list[Transition] = []
        self.reporter = Reporter(shared, self.view, self.learn, self.clock)
        self.view.refresh()

    def learn(self, answer: Answer, asked: int) -> None:
        self.view.update(answer.snapshot, asked)
        if answer.transition is not None:
            self.told.append(answer.transition)

    def advance(self, seconds: float) -> None:
        """Advance the time and have the thread look at the clock."""
        self.clock.advance(seconds)
        with self.reporter._condition:
            self.reporter._condition.notify_all()

    def report(self, *outcomes: Outcome, **details: Any) -> int:
        verdicts = [Verdict(outcome, **details) for outcome in outcomes]
        return max(self.reporter.report(self.standing, self.standing.epoch, verdict) for verdict in verdicts)

    def recorded(self) -> list[Evidence]:
        return [arguments[1] for name, arguments in list(self.store.arguments) if name == "record"]

    def half_open(self) -> str:
        """Bring the breaker to HALF_OPEN and return the holder of its permit."""
        self.store.command(SPEC, Verb.TRIP)
        self.clock.advance(1)
        self.view.update(self.store.acquire(SPEC, "holder", lease=LEASE).snapshot)
        return "holder"


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.reporter.close()


# --- batches ------------------------------------------------------------------------------------------


def test_successes_wait_for_company(desk: Desk) -> None:
    desk.report(SUCCESS)
    wait_until(lambda: len(desk.recorded()) == 1)
    desk.report(*[SUCCESS] * 1000)
    assert desk.reporter.flush(60)
    assert [evidence.runs for evidence in desk.recorded()] == [(Calls(SUCCESS),), (Calls(SUCCESS, 1000),)]
    assert desk.view.state("payments").snapshot.calls == 1001


def test_successes_are_sent_when_their_interval_is_over(desk: Desk) -> None:
    desk.report(SUCCESS)
    assert desk.reporter.flush(60)
    desk.report(SUCCESS)
    desk.advance(BATCH_INTERVAL / 2)
    assert len(desk.recorded()) == 1
    desk.advance(BATCH_INTERVAL)
    wait_until(lambda: len(desk.recorded()) == 2)


def test_nobody_has_to_wake_the_thread_for_that() -> None:
    store = FlakyStore()
    shared = FailoverStore(store)
    view = View(shared)
    standing = view.declare(SPEC)
    reporter = Reporter(shared, view, lambda *_: None)
    for sent in range(1, 4):
        reporter.report(standing, standing.epoch, Verdict(SUCCESS))
        wait_until(lambda sent=sent: store.calls["record"] == sent)  # type: ignore[misc]
    reporter.close()


def test_a_failure_is_sent_at_once_with_what_came_before_it(desk: Desk) -> None:
    desk.report(SUCCESS)
    wait_until(lambda: len(desk.recorded()) == 1)
    ticket = desk.report(SUCCESS, SUCCESS, SLOW, FAILURE, cause="ReadTimeout", retry_after=3.0)
    assert desk.reporter.wait(ticket, 60)
    sent = [run for evidence in desk.recorded()[1:] for run in evidence.runs]
    assert [calls.outcome for calls in sent] == [SUCCESS, SLOW, FAILURE]
    assert desk.recorded()[-1].cause == "ReadTimeout"
    assert desk.recorded()[-1].retry_after == 3.0


def test_ignored_calls_are_not_sent(desk: Desk) -> None:
    assert desk.report(IGNORED) == 0
    assert desk.reporter.flush(60)
    assert desk.store.calls["record"] == 0


def test_waiting_for_a_success_takes_no_time(desk: Desk) -> None:
    assert desk.reporter.wait(desk.report(SUCCESS), timeout=0)


def test_the_next_look_sees_what_a_failure_did(desk: Desk) -> None:
    for _ in range(5):
        desk.reporter.wait(desk.report(FAILURE, cause="HTTP 503"), 60)
    assert desk.standing.snapshot.state is State.OPEN
    assert [(told.state, told.reason) for told in desk.told] == [
        (State.OPEN, "evidence 5 of 5: of the last 5 calls 5 failed, last: HTTP 503")
    ]


def test_many_threads_lose_nothing(desk: Desk) -> None:
    desk.store.command(SPEC, Verb.SHADOW)
    desk.view.refresh()
    threads = [threading.Thread(target=lambda: desk.report(*[SUCCESS, FAILURE] * 500)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert desk.reporter.flush(60)
    assert desk.standing.snapshot.calls == 8000
    assert desk.standing.snapshot.failures == 4000


def test_breakers_are_reported_apart(desk: Desk) -> None:
    mail = desk.view.declare(Spec("mail"))
    desk.report(SUCCESS)
    desk.reporter.report(mail, mail.epoch, Verdict(SUCCESS))
    assert desk.reporter.flush(60)
    assert desk.store.calls["record"] == 2
    assert desk.standing.snapshot.calls == mail.snapshot.calls == 1


# --- what is not worth sending ------------------------------------------------------------------------


def test_nothing_is_sent_while_disabled(desk: Desk) -> None:
    desk.store.command(SPEC, Verb.DISABLE)
    desk.view.refresh()
    desk.report(SUCCESS, FAILURE)
    assert desk.reporter.flush(60)
    assert desk.store.calls["record"] == 0


def test_outcomes_of_an_epoch_that_is_over_are_not_sent(desk: Desk) -> None:
    desk.reporter.wait(desk.report(SUCCESS, FAILURE), 60)
    sent = desk.store.calls["record"]
    former = desk.standing.epoch
    desk.store.command(SPEC, Verb.TRIP)
    desk.view.refresh()
    desk.reporter.wait(desk.reporter.report(desk.standing, former, Verdict(FAILURE)), 60)
    assert desk.store.calls["record"] == sent


def test_what_was_admitted_before_the_store_knew_the_breaker_counts(desk: Desk) -> None:
    assert desk.standing.epoch == 0
    desk.report(SUCCESS, SUCCESS)
    assert desk.reporter.flush(60)
    assert desk.standing.epoch > 0
    desk.reporter.report(desk.standing, 0, Verdict(FAILURE))
    desk.report(FAILURE)
    assert desk.reporter.flush(60)
    assert (desk.standing.snapshot.calls, desk.standing.snapshot.failures) == (4, 2)


# --- mistakes of others -------------------------------------------------------------------------------


def test_a_mistake_in_the_store_does_not_end_the_thread(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(desk.store.inner, "record", lambda *_, **__: 1 / 0)
        desk.reporter.wait(desk.report(FAILURE), 60)
    assert "ZeroDivisionError" in caplog.text
    desk.reporter.wait(desk.report(FAILURE), 60)
    assert desk.standing.snapshot.failures == 1


def test_a_listener_that_guards_a_call_does_not_wait_for_itself(desk: Desk) -> None:
    answers: list[bool] = []
    desk.reporter._learn = lambda *_: answers.append(desk.reporter.wait(10**9, 60))
    desk.reporter.wait(desk.report(*[FAILURE] * 5), 60)
    wait_until(lambda: answers)
    assert not any(answers)  # one for each batch: five failures may travel in two


# --- trials -------------------------------------------------------------------------------------------


def test_a_settled_trial_closes_the_breaker(desk: Desk) -> None:
    holder = desk.half_open()
    desk.reporter.settle(SPEC, holder, desk.standing.epoch, Verdict(SUCCESS), wait=60)
    assert desk.standing.snapshot.state is State.CLOSED
    assert [told.state for told in desk.told] == [State.CLOSED]


def test_a_held_permit_outlives_its_lease(desk: Desk) -> None:
    holder = desk.half_open()
    desk.reporter.hold("payments", holder, desk.clock() + 60)

    def renewed_at_least(times: int) -> bool:
        return desk.store.calls["renew"] >= times

    for step in range(1, 9):
        desk.advance(LEASE / 3)
        wait_until(functools.partial(renewed_at_least, step))
    assert desk.store.read([SPEC])[0].trials == 1
    desk.reporter.settle(SPEC, holder, desk.standing.epoch, Verdict(SUCCESS), wait=60)
    assert desk.standing.snapshot.state is State.CLOSED


def test_a_permit_is_held_no_longer_than_its_trial_may_take(desk: Desk) -> None:
    holder = desk.half_open()
    desk.reporter.hold("payments", holder, desk.clock() + LEASE)
    desk.advance(LEASE)
    wait_until(lambda: not desk.reporter._leases._held)
    assert desk.store.calls["renew"] == 0


def test_a_permit_that_was_lost_is_given_up(desk: Desk) -> None:
    desk.half_open()
    desk.reporter.hold("payments", "nobody's", desk.clock() + 60)
    desk.advance(LEASE)
    wait_until(lambda: not desk.reporter._leases._held)
    assert desk.store.calls["renew"] == 1


# --- beginning and end --------------------------------------------------------------------------------


def test_there_is_no_thread_before_the_first_outcome(desk: Desk) -> None:
    assert desk.reporter._thread is None
    assert desk.reporter.flush(0)
    assert desk.reporter._thread is None


def test_closing_sends_what_waits_and_ends_the_thread(desk: Desk) -> None:
    desk.report(SUCCESS)
    thread = desk.reporter._thread
    assert desk.reporter.close()
    assert thread is not None
    assert not thread.is_alive()
    assert desk.store.inner.read([SPEC])[0].calls == 1
    desk.report(SUCCESS)
    assert desk.reporter.flush(60)
    assert desk.standing.snapshot.calls == 2


def test_a_flush_is_bounded(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(desk.store.inner, "record", lambda *_, **__: release.wait(60))
    desk.report(SUCCESS)
    assert not desk.reporter.flush(0.05)
    release.set()


def test_a_forked_child_sends_its_own_outcomes_only(desk: Desk) -> None:
    desk.report(SUCCESS)
    wait_until(lambda: len(desk.recorded()) == 1)
    desk.report(SUCCESS, SUCCESS)  # wait for the interval, in the parent
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        desk.store.arguments.clear()
        desk.report(FAILURE)
        desk.reporter.flush(60)
        sent = [(str(calls.outcome), calls.number) for evidence in desk.recorded() for calls in evidence.runs]
        os.write(writer, repr(sent).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "[('FAILURE', 1)]"
    os.waitpid(pid, 0)
    assert desk.reporter.flush(60)
    assert desk.standing.snapshot.calls == 3


def test_the_last_outcomes_are_sent_at_exit() -> None:
    script = """
        from resilient_tasks.breaker import Breaker
        from resilient_tasks.core.model import Answer, Snapshot, State
        from resilient_tasks.dependency import Fleet
        from resilient_tasks.store.base import Spec
        from resilient_tasks.store.local import LocalStore

        class Loud(LocalStore):
            def record(self, spec, evidence, **kwargs):
                print(*(f"{calls.outcome} {calls.number}" for calls in evidence.runs), flush=True)
                return super().record(spec, evidence, **kwargs)

        fleet = Fleet(Loud())
        breaker = Breaker(Spec("payments"), lambda: fleet)
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
