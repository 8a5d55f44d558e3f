"""Tasks that can wait no longer: their results, their messages, and the way back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import chord
from celery.exceptions import ChordError, TaskRevokedError
from kombu.exceptions import DecodeError

from resilient_tasks import DeadLetterError, DeferralExpiredError
from resilient_tasks.worker.envelope import HEADER, Envelope
from tests.integration.conftest import TIMEOUT, Shop
from tests.integration.test_bad_messages import GARBAGE, envelope, message

OPTIONS: dict[str, Any] = {"priority": 3, "headers": {"x-trace": "abc"}, "reply_to": "replies"}


def wait_for_the_last_attempt(shop: Shop, result: Any) -> None:
    """Let the dependency serve others, so that failures count, until a task has failed for good."""

    def served_another_task_and_failed() -> bool:
        return shop.antidote.delay().get(timeout=TIMEOUT) == "ok" and result.state == "FAILURE"

    shop.wait(served_another_task_and_failed, "the attempts to be used up")


def wait_for_the_dead(shop: Shop, breaker: str, count: int = 1) -> None:
    shop.wait(lambda: shop.resilience.dead_letters.count(breaker)[breaker] == count, "the dead letters")


class Events:
    """The task events that a broker carries while this is open, from the moment when it is made."""

    def __init__(self, shop: Shop) -> None:
        self._shop = shop
        self._seen: list[dict[str, Any]] = []
        self._connection = shop.app.connection_for_read()
        self._receiver = shop.app.events.Receiver(self._connection, handlers={"*": self._seen.append})
        self._thread = threading.Thread(target=self._receiver.capture, kwargs={"wakeup": False}, daemon=True)
        self._thread.start()
        with shop.app.connection_for_write() as connection, shop.app.events.Dispatcher(connection) as dispatcher:
            # its queue is bound before it has subscribed
            shop.wait(lambda: dispatcher.send("task-test", uuid="test") or self.of("test"), "an event of our own")

    def wait_for(self, kind: str, task_id: str) -> dict[str, Any]:
        """Wait for one event of a task."""

        def found() -> list[dict[str, Any]]:
            return [event for event in self._seen if (event["type"], event.get("uuid")) == (kind, task_id)]

        self._shop.wait(found, f"{kind} of {task_id}")
        return found()[0]

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """Return all events of a task so far."""
        return [event for event in self._seen if event.get("uuid") == task_id]

    def close(self) -> None:
        self._receiver.should_stop = True
        self._thread.join()
        self._connection.close()


@pytest.fixture
def events(running: Shop) -> Iterator[Events]:
    events = Events(running)
    yield events
    events.close()


# --- why tasks are dead-lettered -----------------------------------------------------------------------


def test_out_of_attempts(running: Shop, events: Events) -> None:
    running.set_health("broken", "down")
    result = running.fragile.apply_async((1, "two"), {"dependency": "broken"}, link_error=running.note.si("failed"))
    wait_for_the_last_attempt(running, result)
    with pytest.raises(ConnectionError, match="broken is down"):
        result.get(timeout=TIMEOUT)
    running.wait(running.notes, "the error callback")
    wait_for_the_dead(running, "tolerant")
    dead = running.resilience.dead_letters.show(result.id)
    assert (dead.task_id, dead.breaker, dead.origin, dead.attempts) == (result.id, "tolerant", "celery", 1)
    assert dead.reason == "out of attempts (max_attempts=1): DependencyDownError"
    assert dead.history[-1][1:] == ("dead", "DependencyDownError")
    assert (dead.args, dead.kwargs) == ("(1, 'two')", "{'dependency': 'broken'}")
    assert dead.died_at == pytest.approx(time.time(), abs=TIMEOUT)
    assert events.wait_for("task-failed", result.id)
    assert running.notes() == [["failed"]]
    running.wait(lambda: running.broker.hlen("unacked") == 0, "nothing to be unacknowledged, ticks included")


def test_out_of_attempts_by_a_time_limit(running: Shop, events: Events) -> None:
    running.set_health("endless", "hang")
    result = running.fragile.apply_async(kwargs={"dependency": "endless"}, time_limit=1)
    wait_for_the_last_attempt(running, result)
    wait_for_the_dead(running, "tolerant")
    dead = running.resilience.dead_letters.show(result.id)
    assert dead.reason == "out of attempts (max_attempts=1): TimeLimitExceeded"
    assert events.wait_for("task-failed", result.id)
    running.wait(lambda: running.broker.hlen("unacked") == 0, "its message to be in one place")


def test_defer_for_is_over(running: Shop, events: Events) -> None:
    running.open("payments")
    result = running.urgent.apply_async(link_error=running.note.si("failed"))
    whole = chord([running.urgent.si(), running.ping.si()], running.collect.s()).delay()
    with pytest.raises(DeferralExpiredError):
        result.get(timeout=TIMEOUT)
    running.wait_state(whole, "FAILURE")
    assert isinstance(whole.result, ChordError)
    running.wait(running.notes, "the error callback")
    wait_for_the_dead(running, "payments", 2)
    dead = running.resilience.dead_letters.show(result.id)
    assert dead.reason.endswith("longer than defer_for=1.5 s")
    assert [step.what for step in dead.history] == ["deferred", "dead"]
    assert dead.since == pytest.approx(dead.died_at - 1.5, abs=60)
    assert events.wait_for("task-failed", result.id)
    assert running.waiting("payments") == 0


def test_expires_is_over(running: Shop, events: Events) -> None:
    running.open("payments")
    expires = datetime.now(timezone.utc) + timedelta(seconds=15)  # it is refused before
    result = running.charge.apply_async((1,), expires=expires)
    running.wait_state(result, "REVOKED")  # it has not been resumed
    assert isinstance(result.result, TaskRevokedError)
    assert datetime.now(timezone.utc) > expires
    wait_for_the_dead(running, "payments")
    assert running.resilience.dead_letters.show(result.id).reason == "expired"
    assert events.wait_for("task-revoked", result.id)["expired"]
    running.close("payments")
    with pytest.raises(DeadLetterError, match="its expires is over"):
        running.resilience.dead_letters.replay(result.id)
    assert running.runs("charge") == []


def test_undecodable(running: Shop) -> None:
    running.open("payments")
    broken = message(call=b"{", id="broken-id", **{HEADER: {"breaker": "payments", "origin": "celery"}})
    running.broker.rpush("resilient.deferred.payments", *GARBAGE, broken)
    result = running.charge.delay(1)
    running.close("payments")
    assert result.get(timeout=TIMEOUT) == 1
    wait_for_the_dead(running, "payments", len(GARBAGE) + 1)
    failed = running.app.AsyncResult("broken-id")
    running.wait_state(failed, "FAILURE")
    assert type(failed.result) is DecodeError
    dead_letters = running.resilience.dead_letters
    assert dead_letters.show("broken-id").reason == "the message cannot be decoded: DecodeError"
    undecodable = [dead for dead in dead_letters.list("payments") if dead.reason == "undecodable"]
    assert {dead.body for dead in undecodable} == {text.encode() for text in GARBAGE}
    for dead in undecodable:
        assert dead_letters.show(dead.task_id) == dead
        with pytest.raises(DeadLetterError, match="it is undecodable"):
            dead_letters.replay(dead.task_id)
    dead_letters.drop("broken-id", *(dead.task_id for dead in undecodable))
    assert dead_letters.count() == dict.fromkeys(running.resilience.breakers, 0)


# --- the way back ----------------------------------------------------------------------------------------


def sent(shop: Shop, queue: str = "celery") -> list[dict[str, Any]]:
    """Return what lies in a queue, of all priorities, without what every delivery has of its own."""
    messages = [json.loads(text) for key in shop.broker.keys(f"{queue}*") for text in shop.broker.lrange(key, 0, -1)]
    for each in messages:
        each["properties"].pop("delivery_tag")
    return messages


def replayed(shop: Shop, result: Any) -> Any:
    """Return what a replayed task returns, to a process that has not seen it fail."""
    fresh = shop.app.AsyncResult(result.id)
    shop.wait_state(fresh, "SUCCESS")
    return fresh.result


def test_what_is_replayed_is_what_was_sent(shop: Shop) -> None:
    shop.set_health("broken", "down")
    result = shop.fragile.apply_async((1, "two"), {"dependency": "broken"}, **OPTIONS)
    published = sent(shop)
    assert len(published) == 1
    worker = shop.worker()
    wait_for_the_last_attempt(shop, result)
    wait_for_the_dead(shop, "tolerant")
    worker.stop()
    dead_letters = shop.resilience.dead_letters
    assert dead_letters.show(result.id).headers == published[0]["headers"]
    dead_letters.replay(result.id)
    assert shop.app.AsyncResult(result.id).state == "PENDING"
    assert sent(shop) == published
    assert dead_letters.count("tolerant") == {"tolerant": 0}
    with pytest.raises(DeadLetterError, match=result.id):
        dead_letters.replay(result.id)
    shop.set_health("broken", "up")
    shop.worker()
    assert replayed(shop, result) == [result.id, {"x-trace": "abc"}, 3, "replies"]


def test_replayed_while_the_breaker_is_open_a_task_is_deferred_afresh(running: Shop) -> None:
    running.open("payments")
    result = running.urgent.delay()
    wait_for_the_dead(running, "payments")
    first = running.resilience.dead_letters.show(result.id)
    running.resilience.dead_letters.replay(result.id)
    wait_for_the_dead(running, "payments")  # again, after a whole defer_for
    again = running.resilience.dead_letters.show(result.id)
    assert again.since > first.since
    assert [step.what for step in again.history] == ["deferred", "dead"]
    running.close("payments")
    running.wait_until_known("payments")
    running.resilience.dead_letters.replay(result.id)
    assert replayed(running, result) == "ok"


# --- without any worker -----------------------------------------------------------------------------------


def bury(shop: Shop, count: int) -> list[str]:
    """Put so many dead letters into the queue of payments; return their ids, oldest first."""
    ids = [f"task-{number}" for number in range(count)]
    header = Envelope(breaker="payments", origin="celery", since=1.0).dead_letter(2.0, "made up")
    shop.broker.lpush("resilient.dead.payments", *(message(id=task_id, **header.write({})) for task_id in ids))
    return ids


def test_ten_thousand_are_listed_found_and_dropped(shop: Shop) -> None:
    ids = bury(shop, 10_000)
    dead_letters = shop.resilience.dead_letters
    assert dead_letters.count("payments") == {"payments": 10_000}
    started = time.process_time()
    assert [dead.task_id for dead in dead_letters.list(limit=20)] == ids[:20]
    assert time.process_time() - started < 1.0  # twenty are read, not all
    assert dead_letters.show(ids[-1]).task_id == ids[-1]
    dead_letters.drop(ids[0], ids[5_000], ids[-1])
    assert [dead.task_id for dead in dead_letters.list("payments", limit=1)] == [ids[1]]
    assert dead_letters.count("payments") == {"payments": 9_997}


def test_a_message_whose_origin_cannot_take_it_stays(shop: Shop) -> None:
    shop.broker.hset("no-list", "a", "b")
    header = Envelope(breaker="payments", origin="no-list").dead_letter(2.0, "made up")
    shop.broker.lpush("resilient.dead.payments", message(id="an-id", **header.write({})), envelope({}, b"[]"))
    with pytest.raises(DeadLetterError, match="'an-id' is not replayed"):
        shop.resilience.dead_letters.replay("an-id")
    assert shop.resilience.dead_letters.count("payments") == {"payments": 2}
