"""A bug of the library's own in any step of a message's way: a traceback, no lost message, and all finish after it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery
from kombu import Producer, Queue

from resilient_tasks import Resilience
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Entry, Queues, own_queue
from tests.integration import bugs
from tests.integration.bugs import step_name
from tests.integration.conftest import TIMEOUT, Shop
from tests.integration.test_faults import copies
from tests.unit.test_waiting_tasks import ENDING, READING, strike
from workers.processes import Worker
from workers.rabbitmq import RabbitMQ

ERRORS = itertools.cycle(["KeyError", "TypeError", "AttributeError", "RuntimeError"])
TASKS = 3


@pytest.fixture
def worker(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(shop, "module", "tests.integration.buggy")
    return shop.worker(pool="threads")


class Bug:
    """A bug in one step of the workers, until it is repaired."""

    def __init__(self, shop: Shop, worker: Worker, step: str) -> None:
        self.shop, self.worker, self.step = shop, worker, step
        self.error = next(ERRORS)
        self.logged = self._tracebacks()
        shop.side.set(f"bug:{step}", self.error)

    def _tracebacks(self) -> int:
        return self.worker.output().count(f"\n{self.error}: ")

    def strikes(self) -> None:
        """Wait until it has struck again and again, with a traceback."""
        self.shop.wait(lambda: int(self.shop.side.get(f"hits:{self.step}") or 0) >= 3, f"{self.step} to fail")
        self.shop.wait(lambda: self._tracebacks() > self.logged, f"a traceback of {self.step}")
        assert self.worker.running

    def repair(self) -> None:
        self.shop.side.delete(f"bug:{self.step}", f"hits:{self.step}")


def ids(results: list[Any]) -> dict[str, int]:
    return {result.id: 1 for result in results}


def test_a_bug_in_deferring(shop: Shop, worker: Worker) -> None:
    for owner, name in bugs.DEFERRING:
        shop.open("payments")
        bug = Bug(shop, worker, step_name(owner, name))
        results = [shop.charge.delay(number) for number in range(TASKS)]
        bug.strikes()
        assert shop.ping.delay().get(timeout=TIMEOUT) == "pong", "what cannot be deferred holds up no other task"
        shop.wait(lambda: copies(shop.broker) == ids(results), "one of each")  # noqa: B023
        bug.repair()
        shop.wait(lambda: shop.waiting("payments") == TASKS, f"all to wait after {bug.step}")
        assert copies(shop.broker) == ids(results), bug.step
        shop.close("payments")
        shop.wait_done(*results)
        assert not shop.broker.llen("resilient.dead.payments")


def test_a_bug_in_resuming(shop: Shop, worker: Worker) -> None:
    for owner, name in bugs.RESUMING:
        shop.open("payments")
        results = [shop.charge.delay(number) for number in range(TASKS)]
        shop.wait(lambda: shop.waiting("payments") == TASKS, "all to wait")
        bug = Bug(shop, worker, step_name(owner, name))
        shop.close("payments")
        bug.strikes()
        assert copies(shop.broker) == ids(results), bug.step
        bug.repair()
        shop.wait_done(*results)
        assert not shop.broker.llen("resilient.dead.payments")


def test_a_bug_in_reconciling(shop: Shop, worker: Worker) -> None:
    for owner, name in bugs.RECONCILING:
        shop.open("payments")
        results = [shop.charge.delay(number) for number in range(TASKS)]
        shop.wait(lambda: shop.waiting("payments") == TASKS, "all to wait")
        bug = Bug(shop, worker, step_name(owner, name))
        shop.resilience.fleet.ledger.clear_deferred("payments")
        bug.strikes()
        assert copies(shop.broker) == ids(results), bug.step
        bug.repair()
        shop.close("payments")
        shop.wait_done(*results)


def test_a_bug_in_dead_lettering(shop: Shop, worker: Worker) -> None:
    shop.open("payments")
    for count, (owner, name) in enumerate(bugs.DEAD_LETTERING, 1):
        bug = Bug(shop, worker, step_name(owner, name))
        result = shop.urgent.delay()
        bug.strikes()
        assert copies(shop.broker) == ids([result]), bug.step
        shop.wait_state(result, "DEFERRED")
        bug.repair()
        shop.wait_state(result, "FAILURE")
        shop.wait(lambda: shop.broker.llen("resilient.dead.payments") == count, "the dead letter")  # noqa: B023


@pytest.fixture
def waiting(shop: Shop) -> Iterator[list[Any]]:
    worker = shop.worker(pool="threads")
    shop.open("payments")
    results = [shop.charge.delay(number) for number in range(TASKS)]
    shop.wait(lambda: shop.waiting("payments") == TASKS, "all to wait")
    yield results
    shop.close("payments")
    shop.wait_done(*results)
    assert worker.running


@pytest.mark.parametrize(("owner", "name"), [(Envelope, "read"), (Entry, "_field"), (Queues, "_entry")])
def test_a_bug_in_looking(
    shop: Shop, waiting: list[Any], owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise KeyError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail)
        for look in (
            shop.resilience.deferred.list, shop.resilience.deferred.drop,
            lambda breaker: shop.resilience.deferred.resume(breaker, force=True),
        ):  # fmt: skip
            with pytest.raises(KeyError, match="a bug"):
                look("payments")
    assert copies(shop.broker) == ids(waiting)
    assert len(shop.resilience.deferred.list("payments")) == TASKS


@pytest.mark.rabbitmq
def test_a_bug_beside_rabbitmq_moves_nothing(shop: Shop, rabbitmq: RabbitMQ, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Celery("bugs", broker=rabbitmq.url, backend="cache+memory://", set_as_current=False)
    resilience = Resilience(app, store_url=shop.server.url(), namespace="bugs")
    resilience.breaker("payments")

    @app.task(name="bugs-charge", shared=False, breaker="payments")
    def charge() -> None: ...

    queues = runtime_of(app).queues
    place, origin = queues.deferred("payments"), Queue("bugs-origin")
    with app.connection_for_write() as connection:
        origin(connection.default_channel).declare()
        own_queue(place)(connection.default_channel).declare()
        for number in range(TASKS):
            headers = Envelope("payments", origin.name, since=1.0).write({"id": f"{number}", "task": "bugs-charge"})
            Producer(connection).publish([[], {}, {}], routing_key=place, headers=headers)
    shop.wait(lambda: queues.size(place) == TASKS, "all to wait")
    for step in (*READING, *ENDING):
        act = resilience.deferred.drop if step in ENDING[:2] else resilience.deferred.resume
        strike(monkeypatch, step, KeyError, partial(act, "payments"))
        shop.wait(lambda: queues.size(place) == TASKS, f"all to be back after {step}")
        assert queues.size(queues.dead("payments")) == 0
    assert resilience.deferred.resume("payments") == TASKS
    shop.wait(lambda: queues.size(origin.name) == TASKS, "all to be resumed")
    resilience.fleet.close()
    queues.close()
