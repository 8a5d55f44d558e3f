"""What can crash or hang does: processes, store, broker, result backend. Nothing is lost, and healthy work goes on."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from celery.exceptions import WorkerLostError
from kombu import Connection, Consumer, Queue

from resilient_tasks.core.model import State
from resilient_tasks.worker.broker_queues import open_queues
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Move, Queues
from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import Server

DEFERRED_PAYMENTS = "resilient.deferred.payments"


def soon_restored(seconds: int) -> dict[str, str]:
    """Return an environment in which the broker soon restores what dead workers had taken."""
    options = {"visibility_timeout": seconds, "unacked_restore_interval": 1, "unacked_restore_throttle": 1}
    return {"SHOP_TRANSPORT_OPTIONS": json.dumps(options)}


def redelivered(shop: Shop) -> int:
    return int(shop.resilience.fleet.history.totals(["payments"])["payments"].redelivered)


def copies(broker: redis.Redis) -> Counter[str]:
    """Count the copies of each task's message, wherever on the broker they are at one moment."""
    with broker.pipeline() as pipeline:
        pipeline.lrange("celery", 0, -1)
        pipeline.lrange(DEFERRED_PAYMENTS, 0, -1)
        pipeline.hvals("unacked")
        *lists, taken = pipeline.execute()
    messages = [json.loads(text) for texts in lists for text in texts]
    messages += [json.loads(text)[0] for text in taken]
    return Counter(message["headers"]["id"] for message in messages)


# --- the broker's own redelivery ------------------------------------------------------------------


def test_a_message_restored_just_before_its_deferral_gets_no_second_copy(shop: Shop) -> None:
    with a_delivered_message(shop) as (queues, message):
        message.channel.qos.restore_by_tag(message.delivery_tag)
        assert not queues.put(message, DEFERRED_PAYMENTS, ENVELOPE, owned=True)
        assert list(copies(shop.broker).values()) == [1]
    assert shop.waiting("payments") == 0
    assert list(copies(shop.broker).values()) == [1]


def test_tasks_restored_while_they_run_are_deferred_once(shop: Shop) -> None:
    never_late = {"RESILIENT_TASKS_LATE_AFTER": "3600"}  # or a worker would not let calls that hang have all its slots
    workers = [shop.worker(env={**soon_restored(1), **never_late}) for _ in range(2)]
    shop.set_health("payments", "hang")
    results = [shop.charge.delay(order) for order in range(2)]
    ids = {result.id for result in results}
    shop.wait(lambda: len(shop.runs("charge")) == 4, "the pools to be full of second copies")
    shop.open("payments")
    shop.set_health("payments", "down")
    shop.wait(lambda: shop.waiting("payments") == 2 and copies(shop.broker) == dict.fromkeys(ids, 1), "one of each")
    shop.set_health("payments", "up")
    shop.close("payments")
    shop.wait_done(*results)
    shop.wait(lambda: not copies(shop.broker), "the broker to be empty")
    assert all(worker.running for worker in workers)
    shop.wait(lambda: redelivered(shop) >= 2, "the redeliveries to be counted")


def test_a_trial_that_no_process_had_accepted_when_the_connection_was_cut_gives_its_permit_back(shop: Shop) -> None:
    worker = shop.worker(concurrency=1)
    (stats,) = shop.control("stats").values()
    (child,) = stats["pool"]["processes"]
    shop.open("payments")
    trial = shop.charge.delay(0)
    shop.wait(lambda: shop.waiting("payments") == 1, "the task to be deferred")
    received = f"Task {shop.charge.name}[{trial.id}] received"
    with stopped(child):
        shop.payments.trip("it has to try")
        shop.wait(lambda: received in worker.output(), "the trial to be handed to the pool")
        shop.broker.client_kill_filter(_type="normal", skipme=True)
        shop.wait(lambda: worker.output().count(received) == 2, "the trial to be delivered again")
        assert shop.payments.snapshot().trials <= 1, "a permit of a run that is no more"
    shop.wait_done(trial)
    charge_until_closed(shop)  # what ran while the store was cut off is no trial for it
    assert worker.running


def charge_until_closed(shop: Shop) -> None:
    while shop.payments.snapshot().state is not State.CLOSED:
        shop.wait_done(shop.charge.delay(1))


@contextmanager
def stopped(process_id: int) -> Iterator[None]:
    os.kill(process_id, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process_id, signal.SIGCONT)


@contextmanager
def a_delivered_message(shop: Shop) -> Iterator[tuple[Queues, Any]]:
    """Yield our queues, and a message that a consumer has taken and not acknowledged."""
    shop.charge.delay(1)
    queues = open_queues(shop.app, "resilient")
    received: list[Any] = []
    with shop.app.connection_for_read() as connection:
        channel = connection.default_channel
        with Consumer(channel, [Queue("celery")], on_message=received.append):
            shop.wait(lambda: connection.drain_events(timeout=TIMEOUT) or received, "the message")
        yield queues, received[0]
    queues.close()


def _send_back(queues: Queues) -> list[Move]:
    with queues.peek(DEFERRED_PAYMENTS, "payments") as entries:
        return list(queues.move(DEFERRED_PAYMENTS, [Move(entry, "celery") for entry in entries]))


ENVELOPE = Envelope(breaker="payments", origin="celery")


def test_a_message_that_may_not_be_pushed_stays_where_it_is(shop: Shop) -> None:
    with a_delivered_message(shop) as (queues, message):
        with _without_pushes(shop.broker), pytest.raises(redis.ResponseError):
            queues.put(message, DEFERRED_PAYMENTS, ENVELOPE, owned=True)
        assert (shop.broker.hlen("unacked"), shop.broker.zcard("unacked_index"), shop.waiting("payments")) == (1, 1, 0)
        assert queues.put(message, DEFERRED_PAYMENTS, ENVELOPE, owned=True)
        with _without_pushes(shop.broker), pytest.raises(redis.ResponseError):
            _send_back(queues)
        assert (shop.broker.llen("celery"), shop.waiting("payments")) == (0, 1)
        assert len(_send_back(queues)) == 1
        assert (shop.broker.llen("celery"), shop.waiting("payments")) == (1, 0)


@contextmanager
def _without_pushes(broker: redis.Redis) -> Iterator[None]:
    broker.execute_command("ACL", "SETUSER", "default", "-lpush")
    try:
        yield
    finally:
        broker.execute_command("ACL", "SETUSER", "default", "+lpush")


def test_a_full_broker_still_lets_messages_be_deferred_and_resumed(shop: Shop) -> None:
    with a_delivered_message(shop) as (queues, message), _full(shop.broker):
        assert queues.put(message, DEFERRED_PAYMENTS, ENVELOPE, owned=True)
        assert (shop.broker.hlen("unacked"), shop.waiting("payments")) == (0, 1)
        assert len(_send_back(queues)) == 1
        assert (shop.broker.llen("celery"), shop.waiting("payments")) == (1, 0)


@contextmanager
def _full(broker: redis.Redis) -> Iterator[None]:
    broker.config_set("maxmemory", "1")
    try:
        yield
    finally:
        broker.config_set("maxmemory", "0")


# --- early acknowledgement --------------------------------------------------------------------------


def test_early_ack_loses_nothing_at_the_gate(shop: Shop) -> None:
    worker = shop.worker()
    shop.open("tolerant")
    results = [shop.early.delay() for _ in range(10)]
    shop.wait(lambda: shop.waiting("tolerant") == 10, "all to wait")
    worker.kill()
    assert shop.runs("early") == []
    shop.close("tolerant")
    shop.worker()
    shop.wait_done(*results)
    assert sorted(shop.runs("early")) == sorted(result.id for result in results)


def test_early_ack_defers_a_failing_task_after_its_run(shop: Shop) -> None:
    shop.worker()
    shop.set_health("early", "down")
    result = shop.early.delay()
    shop.wait(lambda: shop.waiting("tolerant") == 1 and not shop.broker.hlen("unacked"), "it to wait")
    shop.wait_state(result, "DEFERRED")
    shop.set_health("early", "up")
    assert result.get(timeout=TIMEOUT) == "ok"
    assert set(shop.runs("early")) == {result.id}


# --- processes --------------------------------------------------------------------------------------


def test_a_killed_worker_gives_its_permits_to_another(shop: Shop) -> None:
    doomed = shop.worker(env=soon_restored(2))
    shop.set_health("payments", "hang")
    shop.trip("payments")
    results = [shop.charge.delay(order) for order in range(5)]

    def is_tried() -> bool:
        seen = shop.payments.snapshot()
        return seen.state is State.HALF_OPEN and seen.trials > 0 and shop.calls("payments") > 0

    shop.wait(is_tried, "a trial")
    doomed.kill()
    shop.set_health("payments", "up")
    shop.worker(env=soon_restored(2))
    shop.wait_done(*results)
    charge_until_closed(shop)


def test_killed_workers_lose_nothing_of_several_queues_and_priorities(shop: Shop) -> None:
    queues, results = ["celery", "second", "third"], list[Any]()
    for _ in range(3):
        doomed = shop.worker(queues=queues, env=soon_restored(2))
        results.extend(shop.antidote.apply_async(queue=queues[n % 3], priority=n % 10) for n in range(30))
        shop.wait(lambda: any(result.ready() for result in results[-30:]), "one to have run")
        doomed.kill()
    shop.worker(queues=queues, env=soon_restored(2))
    shop.wait_done(*results)


def test_a_killed_pool_process_is_one_failure(shop: Shop) -> None:
    shop.worker()
    shop.set_health("slow", "hang")
    result = shop.reckless.delay("slow")
    shop.kill_pool_process()
    with pytest.raises(WorkerLostError):
        result.get(timeout=TIMEOUT)
    assert shop.antidote.delay().get(timeout=TIMEOUT) == "ok"
    shop.wait(lambda: shop.tolerant.snapshot().calls == 2, "both to be counted")
    assert shop.tolerant.snapshot().failures == 1


def test_a_trial_whose_pool_process_is_killed_fails_at_once(shop: Shop) -> None:
    worker = shop.worker()
    shop.set_health("slow", "hang")
    shop.trip("tolerant")
    shop.reckless.delay("slow")
    shop.kill_pool_process()
    opened_again = "tolerant: HALF_OPEN -> OPEN: 1 of 3 trials failed, last: WorkerLostError"
    shop.wait(lambda: opened_again in worker.output(), "the breaker to open again")


# --- the result backend -----------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["frozen", "stopped"])
def test_without_the_result_backend_tasks_are_deferred_and_healthy_ones_run(shop: Shop, fault: str) -> None:
    backend = shop.server_of_its_own()
    shop.worker(env={"SHOP_BACKEND_URL": backend.url(), "SHOP_STATE_TIMEOUT": "0.25"})
    shop.open("payments")
    _take_away(backend, fault)
    charges = [shop.charge.delay(order).id for order in range(50)]
    for _ in range(50):
        shop.tally.delay()
    # fifty deferrals that wait for the backend take many times as long as this does
    shop.wait(lambda: shop.waiting("payments") == 50 and shop.side.get("tally") == "50", "all of both kinds")
    backend = _bring_back(shop, backend, fault)
    shop.close("payments")
    shop.wait(lambda: sorted(shop.runs("charge")) == sorted(charges), "all to run")
    results = redis.Redis.from_url(backend.url())
    shop.wait(lambda: all(_stored_state(results, task_id) == "SUCCESS" for task_id in charges), "all to finish")


def _stored_state(results: redis.Redis, task_id: str) -> str:
    meta = results.get(f"celery-task-meta-{task_id}")
    return json.loads(meta)["status"] if meta else "PENDING"


def _take_away(server: Server, fault: str) -> None:
    if fault == "frozen":
        server.program.freeze()
    else:
        server.stop()


def _bring_back(shop: Shop, server: Server, fault: str, *, persistent: bool = False) -> Server:
    if fault != "frozen":
        return shop.start_again(server, persistent=persistent)
    server.program.thaw()
    return server


# --- the store --------------------------------------------------------------------------------------


@pytest.fixture
def store(shop: Shop) -> Iterator[Server]:
    """Yield a store of its own for the workers of the test."""
    server = shop.server_of_its_own()
    own = {"RESILIENT_TASKS_STORE_URL": server.url(), "RESILIENT_TASKS_STORE_TIMEOUT": "0.5"}
    shop.env.update(own)
    yield server
    for name in own:
        del shop.env[name]


@pytest.mark.parametrize("fault", ["frozen", "stopped"])
def test_without_the_store_open_is_honoured_and_healthy_tasks_run(shop: Shop, store: Server, fault: str) -> None:
    with shop.breaker_in(store) as payments:
        payments.isolate()
    shop.worker()
    charges = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == 5, "the first to wait")
    _take_away(store, fault)
    healthy = [shop.antidote.delay() for _ in range(20)]
    charges += [shop.charge.delay(order) for order in range(5)]
    shop.wait_done(*healthy)
    shop.wait(lambda: shop.waiting("payments") == 10, "the others to wait as well")
    assert shop.calls("payments") == 0
    store = _bring_back(shop, store, fault)
    with shop.breaker_in(store) as payments:
        payments.reset()
    shop.wait_done(*charges)


def test_without_the_store_a_breaker_opens_in_each_worker(shop: Shop, store: Server) -> None:
    shop.worker(env={"RESILIENT_TASKS_BREAKERS__PAYMENTS__OPEN_DURATION": "8"})  # no trials while we look
    assert shop.charge.delay(0).get(timeout=TIMEOUT) == 0
    store.stop()
    shop.set_health("payments", "down")
    charges = [shop.charge.delay(order) for order in range(30)]
    shop.wait(lambda: shop.waiting("payments") == 30, "all to wait")
    assert shop.calls("payments") < 30
    shop.start_again(store)
    shop.set_health("payments", "up")
    shop.wait_done(*charges)


@pytest.mark.parametrize("command", ["FLUSHALL", "SCRIPT FLUSH"])
def test_a_store_that_forgets_strands_nothing(shop: Shop, store: Server, command: str) -> None:
    shop.worker()
    with shop.breaker_in(store) as payments:
        payments.isolate()
        charges = [shop.charge.delay(order) for order in range(10)]
        shop.wait(lambda: shop.waiting("payments") == 10, "all to wait")
        redis.Redis.from_url(store.url()).execute_command(*command.split())
        payments.reset()
    shop.wait_done(*charges)
    assert sorted(shop.runs("charge")) == sorted(result.id for result in charges)


# --- the broker -------------------------------------------------------------------------------------


def test_a_broker_killed_in_mid_outage_loses_nothing(shop: Shop) -> None:
    server = shop.server_of_its_own(persistent=True)
    worker = shop.worker(env={**soon_restored(3), "SHOP_BROKER_URL": server.url()})
    broker = redis.Redis.from_url(server.url(), decode_responses=True)
    shop.set_health("payments", "down")
    charges = _charge_through(shop, server, 20)
    shop.wait(lambda: broker.llen(DEFERRED_PAYMENTS) >= 10, "some to wait")
    server.program.kill()
    server = shop.start_again(server, persistent=True)
    charges += _charge_through(shop, server, 10)
    shop.wait(lambda: broker.llen(DEFERRED_PAYMENTS) >= 20, "most to wait")
    shop.set_health("payments", "up")
    shop.wait_done(*charges)
    assert worker.running


def test_a_task_acknowledged_early_that_fails_while_the_broker_is_away_is_deferred_later(shop: Shop) -> None:
    server = shop.server_of_its_own(persistent=True)
    worker = shop.worker(env={"SHOP_BROKER_URL": server.url()})
    shop.set_health("early", "hang")
    with Connection(server.url()) as connection:
        result = shop.early.apply_async(connection=connection)
    shop.wait(lambda: shop.runs("early"), "it to run")
    server.program.kill()
    shop.set_health("early", "down")
    shop.wait(lambda: "Connection to broker lost" in worker.output(), "the worker to notice")
    server = shop.start_again(server, persistent=True)
    shop.wait_state(result, "DEFERRED")
    shop.set_health("early", "up")
    assert result.get(timeout=TIMEOUT) == "ok"


def _charge_through(shop: Shop, broker: Server, count: int) -> list[Any]:
    with Connection(broker.url()) as connection:
        return [shop.charge.apply_async((order,), connection=connection) for order in range(count)]
