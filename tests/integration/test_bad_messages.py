"""Messages that no program should send: the worker stays up, and all other tasks finish."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from resilient_tasks.worker.envelope import HEADER, Envelope
from tests.integration.conftest import TIMEOUT, Shop

NUMBERS = [0, -1, 1, 1.5, 1e300, -1e300, 10**400, 2**63, float("inf"), float("nan")]
TEXTS = [
    "",
    "payments",
    "unknown",
    "nowhere",
    "unacked",
    "resilient.control",
    "x" * 100_000,
    "\x00",
    "\ud83d\ude00",
    "\udcff",
    "../..",
]
NESTED = [[], {}, [[[[]]]], {"a": {"b": {"c": [1, None]}}}, [1] * 1000, {str(number): number for number in range(1000)}]
VALUES: list[Any] = [None, True, False, *NUMBERS, *TEXTS, *NESTED]
FIELDS = [*Envelope.__dataclass_fields__, "teller"]
NO_MOMENTS: list[Any] = [5, "soon", [], {}]
CALL = [[1], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
HEALTHY = 20


def envelope(headers: Any, body: bytes, *, queue: str = "celery", **properties: Any) -> str:
    """Return a message as it lies in Redis."""
    return json.dumps({
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "correlation_id": "a-correlation-id", "reply_to": "", "delivery_mode": 2, "priority": 0,
            "delivery_info": {"exchange": "", "routing_key": queue}, "body_encoding": "base64",
            "delivery_tag": str(uuid4()), **properties,
        },
    })  # fmt: skip


def message(*, call: Any = CALL, task: Any = "charge", **headers: Any) -> str:
    """Return a message for a task of the shop, with some of its headers changed."""
    usual = {"lang": "py", "task": f"tests.integration.shop.{task}", "id": str(uuid4()), "retries": 0}
    body = call if isinstance(call, bytes) else json.dumps(call).encode()
    return envelope({**usual, **headers}, body)


def headers() -> Iterator[Any]:
    """Everything that may be in place of our header."""
    yield from VALUES
    for name in FIELDS:
        for value in VALUES:
            yield {name: value}
    chosen = random.Random(1)
    for _ in range(60):
        yield {name: chosen.choice(VALUES) for name in chosen.sample(FIELDS, 5)}


def unreadable() -> Iterator[str]:
    """Messages of a guarded task of which Celery can make nothing; many of them would end a plain worker."""
    for body in (b"", b"{", b"\xff\xfe", b"5", b"null", b"[]", b"[1]", b"{}", b'"text"', b"[1, 2, 3]", b"[[], [], []]"):
        yield message(call=body)
    for task_id in (None, 5, 1.5, True, "", [], ["an-id"], {}, {"an": "id"}):
        yield message(id=task_id)
    yield from (message(shadow=name) for name in (5, [1], {"a": 1}))
    yield from (message(stamps=stamps) for stamps in (5, "text", [1]))
    yield from (message(stamps={}, stamped_headers=names) for names in (5, "text", [[1]]))
    for limits in (5, "10", [1], [1, 2, 3], ["a", "b"], {"soft": 1}):
        yield message(timelimit=limits)
    for header in ("eta", "expires"):
        yield from (message(**{header: moment}) for moment in NO_MOMENTS)
    yield message(task="unknown")
    yield envelope({"lang": "py", "task": "tests.integration.shop.charge"}, json.dumps(CALL).encode())
    yield envelope(None, b"")
    yield envelope({}, b"[1, 2]")


def finish_healthy(shop: Shop) -> None:
    """See that tasks with and without a breaker still run."""
    results = [task.delay(*args) for _ in range(HEALTHY) for task, args in ((shop.ping, ()), (shop.charge, (7,)))]
    for result in results:
        assert result.get(timeout=TIMEOUT) in ("pong", 7)


def test_a_header_of_any_kind_is_no_obstacle(running: Shop) -> None:
    sent = [message(**{HEADER: value}) for value in headers()]
    assert len(sent) > 200
    running.broker.lpush("celery", *sent)
    running.wait(lambda: len(running.runs("charge")) == len(sent), "all of them to run")
    finish_healthy(running)
    assert set(running.broker.keys("*unknown*")) == set()


def test_a_header_of_any_kind_can_be_deferred_and_resumed(running: Shop) -> None:
    running.open("payments")
    healthy = [running.charge.delay(number) for number in range(HEALTHY)]
    sent = [message(**{HEADER: value}) for value in headers() if not _ends_by_right(value)]
    running.broker.lpush("celery", *sent)
    running.wait(lambda: running.waiting("payments") == len(sent) + HEALTHY, "all of them to wait")
    running.close("payments")
    assert [result.get(timeout=TIMEOUT) for result in healthy] == list(range(HEALTHY))
    running.wait(lambda: len(running.runs("charge")) == len(sent) + HEALTHY, "all of them to run")
    assert running.waiting("payments") == 0


def _ends_by_right(value: Any) -> bool:
    """Whether a header says that its task's ``defer_for`` is over."""
    return bool(Envelope.read({HEADER: value}).deadline)


@pytest.mark.parametrize("state", ["CLOSED", "OPEN"])
def test_an_invalid_message_is_rejected(running: Shop, state: str) -> None:
    if state == "OPEN":
        running.open("payments")
    running.broker.lpush("celery", *unreadable())
    running.wait(lambda: running.broker.llen("celery") == running.broker.hlen("unacked") == 0, "all of them to be gone")
    running.close("payments")
    finish_healthy(running)
    assert running.waiting("payments") == 0


def test_invalid_callbacks_take_no_slot_for_good(running: Shop) -> None:
    values: list[Any] = [[5], [{}]]
    invalid = [
        *({name: value} for name in ("callbacks", "errbacks", "chain") for value in values),
        {"chord": {"a": 1}},
    ]
    sent = [message(call=[args, {}, options]) for args in ([1], []) for options in invalid]
    running.broker.lpush("celery", *sent)
    finish_healthy(running)
    running.wait(lambda: running.broker.hlen("unacked") == 0, "all of them to be out of hand")


GARBAGE = [
    "garbage", "", "5", "null", "[]", "{}", '{"properties": {}}', '{"properties": {"delivery_tag": "1"}}', "\x80" * 10,
    envelope(None, b"[]"), envelope([], b"[]"), envelope("text", b"[]"), envelope({"id": 5, "task": 5}, b"{"),
    envelope({}, b"[]"), envelope({HEADER: "text"}, b"[]"),
    envelope({HEADER: {"breaker": "payments"}}, b"{"), envelope({HEADER: {"breaker": "payments"}}, b"[]"),
    envelope({"id": "1"}, b"[]", delivery_info=5),
    envelope({"id": "1"}, b"[]", priority="high"), envelope({"id": "1"}, b"[]", body_encoding="rot13"),
    "x" * 1_000_000,
]  # fmt: skip


#: What ends a plain worker: kombu cannot make a message of it, or Celery cannot look its task up.
DEADLY = [
    "garbage", "", "5", "null", "[]", "{}", '{"properties": {}}', '{"properties": {"delivery_tag": "1"}}', "\x80" * 10,
    envelope([], b"[]"), envelope("text", b"[]"), envelope({}, b"[]", delivery_info=5),
    envelope({}, b"[]", delivery_tag=5),
    envelope({}, b"[]", body_encoding="rot13"), envelope({}, b"[]").replace('"body": "W10="', '"body": "a"'),
    envelope({}, b"[]").replace('"application/json"', "[]"), envelope({}, b"[]").replace('"utf-8"', "5"),
    message(task="ping").replace('"tests.integration.shop.ping"', "[]"),
    message(task="ping").replace('"tests.integration.shop.ping"', '{"a": 1}'),
    message(task="unknown", id=5), message(task="unknown", id=None),
    envelope({"task": "unknown"}, b"[]"), envelope({}, b'{"task": ["a"], "id": "1", "args": [], "kwargs": {}}'),
    envelope({}, b'{"task": "unknown", "args": [], "kwargs": {}}'),
]  # fmt: skip


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_what_ends_a_plain_worker_is_dead_lettered(shop: Shop, pool: str) -> None:
    worker = shop.worker(pool=pool)
    for text in DEADLY:
        shop.broker.lpush("celery", text)
    finish_healthy(shop)
    assert worker.running
    shop.wait(lambda: shop.broker.llen("resilient.dead.undecodable") == len(DEADLY), "all of them to be kept")
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "all of them to be out of hand")
    dead_letters = shop.resilience.dead_letters
    kept = dead_letters.list("undecodable")
    assert [dead.body.decode(errors="replace") for dead in kept].count("garbage") == 1
    dead_letters.drop(*{dead.task_id for dead in kept}, breaker="undecodable")
    assert "undecodable" not in dead_letters.count()


def test_garbage_in_the_deferred_queue_holds_no_task_up(running: Shop) -> None:
    running.open("payments")
    former = [running.charge.delay(number) for number in range(HEALTHY)]
    running.wait(lambda: running.waiting("payments") == HEALTHY, "all of them to wait")
    forged = [
        message(**{HEADER: {"breaker": "payments", "origin": origin, "deadline": deadline, "not_before": not_before}})
        for origin in ("nowhere", "_kombu.binding.celery.pidbox", "resilient.deferred.payments", "")
        for deadline in (0, 1.0)
        for not_before in (0, 1e15)
    ]
    nameless = [
        message(task=task, **{HEADER: {"breaker": "payments", "deadline": 1.0}}) for task in ("ping", "unknown")
    ]
    for text in (*GARBAGE, *forged, *nameless):
        running.broker.rpush("resilient.deferred.payments", text)  # ahead of all others
    later = [running.charge.delay(number) for number in range(HEALTHY)]
    running.close("payments")
    assert [result.get(timeout=TIMEOUT) for result in (*former, *later)] == [*range(HEALTHY), *range(HEALTHY)]
    running.wait(lambda: running.waiting("payments") == 0, "the garbage to be out of the way")
    assert running.broker.llen("resilient.dead.payments") >= len(GARBAGE) - 3
    finish_healthy(running)


def test_unknown_messages_on_the_control_queue_are_ignored(running: Shop) -> None:
    for headers in (None, {}, {"task": None}, {"task": 5}, {"task": ["x"]}, {"task": "tests.integration.shop.ping"}):
        for body in (b"", b"{", b"5", b"[[], {}, {}]"):
            running.broker.lpush("resilient.control", envelope(headers, body, queue="resilient.control"))
    running.wait(lambda: running.broker.llen("resilient.control") == 0, "all of them to be taken")
    finish_healthy(running)
    assert running.side.get("runs:ping") == str(HEALTHY)
