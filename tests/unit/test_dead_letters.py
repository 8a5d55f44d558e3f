"""The API of dead letters on a broker in memory: no server, no worker."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from celery import Celery
from kombu import Producer, Queue
from kombu.common import QoS

from resilient_tasks import Breaker, ConfigurationError, DeadLetter, DeadLetterError, Resilience
from resilient_tasks.operations.waiting import DeadLetters
from resilient_tasks.testing import Clock
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.envelope import HEADER, Envelope, Step
from resilient_tasks.worker.request import GatedRequest

DEAD = "resilient.dead.payments"
CALL = [[1], {"two": 2}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
ENVELOPE = Envelope(breaker="payments", origin="shop", since=1.0, attempts=3).dead_letter(2.0, "made up")


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app on a broker that all apps of this process share, and leave empty."""
    app = Celery("dead", broker="memory://", backend="cache+memory://", set_as_current=False)

    @app.task(name="dead-charge", shared=False, breaker="payments")
    def charge(*args: object, **kwargs: object) -> None: ...

    yield app
    with app.connection_for_write() as connection:
        for queue in (DEAD, "shop"):
            bound = Queue(queue)(connection.default_channel)
            bound.declare()
            bound.purge()


@pytest.fixture
def dead_letters(resilience: Resilience, payments: Breaker) -> DeadLetters:
    return resilience.dead_letters


def bury(app: Celery, envelope: Envelope | None = ENVELOPE, *, body: Any = CALL, **headers: Any) -> str:
    """Put a message into the dead-letter queue; return its task's id."""
    content = {"content_type": "application/json", "content_encoding": "utf-8"} if isinstance(body, bytes) else {}
    usual = {"id": str(uuid4()), "task": "dead-charge", "argsrepr": "(1,)", "kwargsrepr": "{'two': 2}"}
    written = {**usual, **headers}
    with app.connection_for_write() as connection:
        Producer(connection).publish(
            body, exchange="", routing_key=DEAD, headers=envelope.write(written) if envelope else written,
            declare=[Queue(DEAD)], priority=3, **content,
        )  # fmt: skip
    return str(written["id"])


def taken(app: Celery, queue: str) -> Any:
    """Take one message from a queue; None if it is empty."""
    with app.connection_for_read() as connection:
        bound = Queue(queue)(connection.default_channel)
        bound.declare()
        return bound.get(no_ack=True)


def test_a_dead_letter_shows_everything(app: Celery, dead_letters: DeadLetters) -> None:
    task_id = bury(app)
    shown = dead_letters.show(task_id)
    assert isinstance(shown, DeadLetter)
    assert (shown.task_id, shown.task, shown.breaker, shown.origin) == (task_id, "dead-charge", "payments", "shop")
    assert (shown.reason, shown.since, shown.died_at, shown.attempts) == ("made up", 1.0, 2.0, 3)
    assert shown.history == (Step(2.0, "dead"),)
    assert (shown.args, shown.kwargs) == ("(1,)", "{'two': 2}")
    assert HEADER not in shown.headers
    assert shown.body.startswith(b'[[1], {"two": 2}')
    assert dead_letters.list() == (shown,)


def test_the_oldest_are_listed_and_stay_where_they_are(app: Celery, dead_letters: DeadLetters) -> None:
    ids = [bury(app) for _ in range(5)]
    assert [dead.task_id for dead in dead_letters.list()] == ids
    assert [dead.task_id for dead in dead_letters.list("payments")] == ids
    assert [dead.task_id for dead in dead_letters.list(limit=2)] == ids[:2]
    assert dead_letters.list("unknown") == ()
    assert dead_letters.count() == {"payments": 5}


def test_a_replayed_task_is_what_it_was(app: Celery, dead_letters: DeadLetters) -> None:
    task_id = bury(app)
    app.backend.store_result(task_id, ConnectionError("down"), "FAILURE")
    shown = dead_letters.show(task_id)
    dead_letters.replay(task_id)
    message = taken(app, "shop")
    assert (message.headers, message.payload) == (shown.headers, CALL)
    assert message.properties["priority"] == 3
    assert app.AsyncResult(task_id).state == "PENDING"
    assert dead_letters.count() == {"payments": 0}


def test_a_replay_takes_back_no_success_and_writes_no_ignored_result(app: Celery, dead_letters: DeadLetters) -> None:
    done, ignored = bury(app), bury(app, ignore_result=True)
    app.backend.store_result(done, 7, "SUCCESS")
    app.backend.store_result(ignored, ConnectionError("down"), "FAILURE")
    dead_letters.replay(done, ignored)
    assert [app.AsyncResult(task_id).state for task_id in (done, ignored)] == ["SUCCESS", "FAILURE"]


def test_a_result_backend_that_is_away_stops_no_replay(
    app: Celery, dead_letters: DeadLetters, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("a secret")

    monkeypatch.setattr(app.backend, "store_result", away)
    dead_letters.replay(bury(app))
    assert taken(app, "shop") is not None
    assert "could not be reset: ConnectionError" in caplog.text
    assert "secret" not in caplog.text


def test_what_is_unknown_is_named_after_the_others_are_served(app: Celery, dead_letters: DeadLetters) -> None:
    task_id = bury(app)
    with pytest.raises(DeadLetterError, match="breakers asked: 'accounts'"):
        dead_letters.show(task_id, breaker="accounts")
    with pytest.raises(DeadLetterError, match="no dead letter has the id 'unknown'; breakers asked: 'payments'"):
        dead_letters.drop("unknown", task_id, breaker="payments")
    assert dead_letters.count() == {"payments": 0}


@pytest.mark.parametrize(
    ("buried", "why"),
    [
        ({"expires": "2001-01-01T00:00:00Z"}, "its expires is over"),
        ({"body": b"{"}, "it is undecodable"),
        ({"id": 5}, "it is undecodable"),
    ],
)
def test_what_would_never_run_is_not_replayed(
    app: Celery, dead_letters: DeadLetters, buried: dict[str, Any], why: str
) -> None:
    bury(app, **buried)
    [dead] = dead_letters.list()
    with pytest.raises(DeadLetterError, match=why):
        dead_letters.replay(dead.task_id)
    assert dead_letters.list() == (dead,)
    dead_letters.drop(dead.task_id)
    assert dead_letters.list() == ()


def test_expires_may_be_anything(app: Celery, dead_letters: DeadLetters) -> None:
    moments: list[Any] = [None, "soon", 5, [], "2999-01-01T00:00:00"]
    dead_letters.replay(*(bury(app, expires=moment) for moment in moments))
    assert dead_letters.count() == {"payments": 0}


def test_a_task_without_a_envelope_goes_to_the_default_queue(app: Celery, dead_letters: DeadLetters) -> None:
    app.conf.task_default_queue = "shop"
    dead_letters.replay(bury(app, None))
    assert taken(app, "shop") is not None


def test_without_an_app_there_is_no_broker() -> None:
    with pytest.raises(ConfigurationError, match="init_app"):
        _ = Resilience().dead_letters


def test_a_dead_task_is_held_unacknowledged_until_the_broker_takes_it(
    app: Celery, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged: list[Any] = []
    deferral = Deferral(runtime_of(app))
    away = [True]

    def defer(*_: Any, **__: Any) -> bool:
        if away.pop():
            raise OSError("away")
        acknowledged.append("moved")
        return True

    monkeypatch.setattr(deferral.queues, "put", defer)
    message = SimpleNamespace(
        headers={"id": "an-id", "task": "dead-charge"}, body="[[], {}, {}]", payload=[[], {}, {}], delivery_info={},
        content_type="application/json", content_encoding="utf-8", properties={},
    )  # fmt: skip
    request = GatedRequest(message, app=app, task=app.tasks["dead-charge"], on_ack=acknowledged.append)
    request.dead = True
    window = QoS(lambda **_: None, 4)
    pipeline: Any = SimpleNamespace(consumer=SimpleNamespace(qos=window, qos_global=None))
    runtime_of(app).pipeline = pipeline
    deferral.attempt(request, partial(deferral.defer, request, ENVELOPE))
    request.acknowledge()
    request.reject(requeue=True)
    assert (acknowledged, request.acknowledged) == ([], False)
    assert window.value == 5, "what is held takes no place in the prefetch window"
    away.append(False)
    deferral.retry_held()
    assert (acknowledged, request.acknowledged) == (["moved"], True)
    assert window.value == 4
