"""The same outage where the broker is no Redis: RabbitMQ, files, memory. The breakers' state is still in Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import redis
from celery import Celery
from celery.contrib.testing.worker import start_worker as start_worker_here
from kombu import Connection, Producer, Queue

from resilient_tasks import Resilience
from resilient_tasks.worker.broker_queues import PublishedQueues
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Entry
from tests.integration import cloud
from tests.integration.depots import (
    MODULE,
    TIMEOUT,
    Depot,
    are,
    live_through_an_outage,
    messages_in,
    send_charges,
)
from tests.support import forks
from workers.processes import Server, celery_command, wait_until
from workers.rabbitmq import RabbitMQ, rabbitmq_binary, start_rabbitmq

PAYMENTS = "RESILIENT_TASKS_BREAKERS__PAYMENTS__"
ORDERS = 30


@pytest.fixture
def side(server: Server) -> redis.Redis:
    """Where a test sets the dependency's health and counts what was called."""
    side = redis.Redis.from_url(server.url(0), decode_responses=True)
    side.flushall()
    return side


@pytest.fixture(scope="module")
def _rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    if rabbitmq_binary() is None:
        pytest.skip("RabbitMQ is not installed")
    rabbitmq = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    yield rabbitmq
    rabbitmq.stop()


@pytest.fixture
def rabbitmq(_rabbitmq: RabbitMQ) -> RabbitMQ:
    """The node, without queues of ours: they may be of another type."""
    _rabbitmq.delete_queues("resilient.")
    return _rabbitmq


# --- RabbitMQ ---------------------------------------------------------------------------------------------

KINDS = {
    "classic": {},
    "prioritised": {"x-max-priority": 10},
    "quorum": {"x-queue-type": "quorum"},
}


@pytest.fixture
def on_rabbitmq(request: pytest.FixtureRequest, rabbitmq: RabbitMQ, depot: Callable[..., Depot]) -> Depot:
    return depot(rabbitmq.url, queue=f"depot-{request.param}", queue_arguments=KINDS[request.param])


@pytest.mark.rabbitmq
@pytest.mark.parametrize("on_rabbitmq", ["prioritised", "quorum"], indirect=True)
def test_an_outage_on_rabbitmq(on_rabbitmq: Depot) -> None:
    on_rabbitmq.beat()
    on_rabbitmq.worker()
    on_rabbitmq.worker()
    priorities = [order % 10 for order in range(ORDERS)]
    client = live_through_an_outage(on_rabbitmq, priorities)
    queues = on_rabbitmq.queue, "resilient.deferred.payments", "resilient.control"
    wait_until(lambda: messages_in(client, *queues) == [0, 0, 0], timeout=TIMEOUT, what="the queues to be empty")


@pytest.mark.rabbitmq
@pytest.mark.parametrize("on_rabbitmq", ["classic", "quorum"], indirect=True)
def test_a_message_on_rabbitmq_is_in_one_place(on_rabbitmq: Depot, rabbitmq: RabbitMQ) -> None:
    depot = on_rabbitmq
    worker = depot.worker()
    depot.side.set("health", "down")
    client = depot.client()
    results = send_charges(client, [0] * ORDERS)
    wait_until(are("DEFERRED", results), timeout=TIMEOUT, what="all to be deferred")
    worker.stop()  # a tick would have released trials
    queues = depot.queue, "resilient.deferred.payments"
    wait_until(lambda: sum(messages_in(client, *queues)) >= ORDERS, timeout=TIMEOUT, what="the broker to have them all")
    assert sum(messages_in(client, *queues)) == ORDERS
    kinds = dict(line.split() for line in rabbitmq.control("list_queues", "name", "type").splitlines()[1:])
    assert kinds["resilient.deferred.payments"] == kinds[depot.queue]
    depot.side.set("health", "up")
    depot.side.delete("runs")
    depot.worker()
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    assert sorted(depot.side.lrange("runs", 0, -1)) == sorted(result.id for result in results)
    wait_until(lambda: messages_in(client, *queues) == [0, 0], timeout=TIMEOUT, what="the queues to be empty")


@pytest.mark.rabbitmq
def test_what_names_no_task_is_dead_lettered(rabbitmq: RabbitMQ, depot: Callable[..., Depot]) -> None:
    strange = depot(rabbitmq.url, queue="depot-strange")
    worker = strange.worker()
    client = strange.client()
    for fields in ({"task": ["charge"], "id": "1"}, {"task": {"a": 1}, "id": "2"}, {"task": "unknown", "id": 5}):
        with client.connection_for_write() as connection:
            Producer(connection).publish([[], {}, {}], routing_key="depot-strange", headers=fields)
    (healthy,) = send_charges(client, [0])
    wait_until(are("SUCCESS", [healthy]), timeout=TIMEOUT, what="a healthy task")
    assert worker.running
    wait_until(lambda: messages_in(client, "resilient.dead.undecodable") == [3], timeout=TIMEOUT, what="dead letters")


@pytest.mark.rabbitmq
@pytest.mark.parametrize("on_rabbitmq", ["classic", "quorum"], indirect=True)
def test_what_finds_no_room_on_rabbitmq_stays_on_its_queue(on_rabbitmq: Depot) -> None:
    depot, most = on_rabbitmq, 2
    depot.env |= {f"{PAYMENTS}MAX_DEFERRED": str(most), f"{PAYMENTS}OVERFLOW": "block"}
    worker = depot.worker()
    depot.side.set("health", "down")
    client = depot.client()
    results = send_charges(client, [0] * 10)
    worker.wait_for_output(f"queue {depot.queue} is blocked", timeout=TIMEOUT)
    depot.side.set("health", "up")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    queues = depot.queue, "resilient.deferred.payments"
    wait_until(lambda: messages_in(client, *queues) == [0, 0], timeout=TIMEOUT, what="the queues to be empty")


@pytest.mark.rabbitmq
def test_a_rabbitmq_short_of_memory_holds_up_no_worker(rabbitmq: RabbitMQ, depot: Callable[..., Depot]) -> None:
    short = depot(rabbitmq.url, queue="depot-short")
    worker = short.worker()
    short.side.set("health", "down")
    client = short.client()
    results = send_charges(client, [0] * 3)
    wait_until(are("DEFERRED", results), timeout=TIMEOUT, what="the worker to be at work")
    worker.freeze()
    results += send_charges(client, [0] * 3)
    rabbitmq.control("set_vm_memory_high_watermark", "0")
    try:
        worker.thaw()
        worker.wait_for_output("cannot be deferred yet", timeout=TIMEOUT)
    finally:
        rabbitmq.control("set_vm_memory_high_watermark", "0.4")
    short.side.set("health", "up")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")


@pytest.mark.rabbitmq
def test_a_task_whose_queue_is_gone_is_dead_lettered(rabbitmq: RabbitMQ, depot: Callable[..., Depot]) -> None:
    former = depot(rabbitmq.url, queue="depot-former")
    worker = former.worker()
    former.side.set("health", "down")
    client = former.client()
    results = send_charges(client, [0] * 4)
    wait_until(are("DEFERRED", results), timeout=TIMEOUT, what="all to be deferred")
    worker.kill()
    with client.connection_for_write() as connection:
        connection.default_channel.queue_delete("depot-former")
        connection.default_channel.queue_declare("resilient.dead.payments", durable=True, auto_delete=False)
    former.side.set("health", "up")
    former.env["DEPOT_QUEUE"] = "depot-later"
    former.worker()
    wait_until(lambda: messages_in(client, "resilient.dead.payments") == [4], timeout=TIMEOUT, what="dead letters")
    wait_until(are("FAILURE", results), timeout=TIMEOUT, what="all to have failed")
    assert messages_in(client, "resilient.deferred.payments") == [0]


@pytest.mark.rabbitmq
@pytest.mark.parametrize(("on_rabbitmq", "how"), [("classic", "KILL"), ("quorum", "TERM")], indirect=["on_rabbitmq"])
def test_rabbitmq_restarts_in_mid_outage(on_rabbitmq: Depot, rabbitmq: RabbitMQ, how: str) -> None:
    depot = on_rabbitmq
    depot.worker()
    depot.side.set("health", "down")
    client = depot.client()
    results = send_charges(client, [0] * ORDERS)
    wait_until(are("DEFERRED", results), timeout=TIMEOUT, what="all to be deferred")
    if how == "KILL":
        rabbitmq.program.kill()
    else:
        rabbitmq.program.stop(timeout=30.0)
    rabbitmq.start_again()
    client = depot.client()
    assert client.send_task("ping").get(timeout=TIMEOUT) == "pong"
    depot.side.set("health", "up")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    queues = depot.queue, "resilient.deferred.payments"
    wait_until(lambda: messages_in(client, *queues) == [0, 0], timeout=TIMEOUT, what="the queues to be empty")


@pytest.mark.rabbitmq
def test_no_message_is_looked_at_too_often(rabbitmq: RabbitMQ) -> None:
    """A quorum queue throws away what was requeued more often than its limit, and RabbitMQ 4 gives it one of 20."""
    app = Celery("app", broker=rabbitmq.url, set_as_current=False)
    app.conf.broker_transport_options = {"confirm_publish": False}
    queues = PublishedQueues(app, "often")
    limited = {"x-queue-type": "quorum", "x-delivery-limit": 20}
    with Connection(rabbitmq.url, connect_timeout=60) as connection:
        channel = connection.default_channel
        Queue(queues.deferred("payments"), queue_arguments=limited)(channel).declare()
        Queue("often")(channel).declare()
        headers = {"id": "an-id", "task": "charge", "x-trace": "abc"}
        Producer(channel).publish([[], {}, {}], routing_key="often", headers=headers, priority=3)
        deferred = queues.deferred("payments")
        queues.put(Queue("often")(channel).get(), deferred, Envelope("payments", "often"), owned=True)
    assert queues.channel.basic_publish == queues.channel.basic_publish_confirm, "whatever the app's setting"
    found: list[Entry] = []

    for _ in range(50):
        with queues.peek(deferred, "payments") as entries:
            found.extend(entries)
    assert len(found) == 50
    assert found[-1].envelope == Envelope("payments", "often")
    assert found[-1].message.properties["priority"] == 3
    assert found[-1].message.headers["x-trace"] == "abc"
    queues.close()


def test_without_a_store_a_worker_says_what_to_do_and_ends(depot: Callable[..., Depot]) -> None:
    nowhere = depot("amqp://guest:secret@127.0.0.1:1//", backend="rpc://", store=None)
    command = celery_command(MODULE, "worker", "-P", "solo", "-l", "INFO")
    ended = forks.run(command, env=nowhere.env)
    assert ended.returncode != 0
    errors = [line for line in ended.stderr.splitlines() if line.startswith("resilient_tasks.errors.")]
    assert len(errors) == 1
    assert "set RESILIENT_TASKS_STORE_URL, for example to redis://localhost:6379/0" in errors[0]
    assert "secret" not in ended.stderr


# --- memory, in this process ---------------------------------------------------------------------------------


class Dependency:
    """Up or down, and how often it was called."""

    def __init__(self) -> None:
        self.up = False
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        if not self.up:
            raise ConnectionError("down")


@pytest.mark.parametrize(("broker", "pool"), [("memory", "solo"), ("memory", "threads"), (cloud.SCHEME, "threads")])
def test_an_outage_in_memory(
    server: Server, side: redis.Redis, monkeypatch: pytest.MonkeyPatch, broker: str, pool: str
) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", server.url(2))
    app = Celery(broker, broker=f"{broker}://", backend="cache+memory://", set_as_current=False)
    app.conf.update(task_acks_late=True, broker_transport_options={"polling_interval": 0.02})
    resilience = Resilience(app, tick_interval=0.25)
    payments = resilience.breaker("payments", consecutive_failures=3, open_duration=0.5, open_jitter=0.0, ramp=0.0)
    dependency = Dependency()

    @app.task(name="charge_in_memory", shared=False, breaker=payments)
    def charge(order: int) -> int:
        dependency()
        return order

    with start_worker_here(app, pool=pool, perform_ping_check=False, shutdown_timeout=TIMEOUT):
        results = [charge.delay(order) for order in range(ORDERS)]
        wait_until(are("DEFERRED", results), timeout=TIMEOUT, what="all to be deferred")
        dependency.up = True
        wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    assert [result.result for result in results] == list(range(ORDERS))
    assert payments.snapshot().state == "CLOSED"
    assert "resilient-tasks-maintenance" not in {thread.name for thread in threading.enumerate()}
