"""The least rights that docs/permissions.md names are enough, and without rights on our queues other tasks go on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import redis
from celery import Celery
from kombu import Connection

from resilient_tasks.worker.broker_queues import PublishedQueues
from resilient_tasks.worker.queues import own_queue
from tests.integration.depots import MODULE, TIMEOUT, Depot, are, live_through_an_outage, messages_in, send_charges
from tests.support import forks
from workers.processes import LOCALHOST, PROJECT, Program, Server, celery_command, start_valkey, wait_until
from workers.rabbitmq import RabbitMQ

DOCUMENT = (PROJECT / "docs" / "permissions.md").read_text()
USER, PASSWORD = "app", "password"
ORDERS = 20
OURS = re.compile(r"\|resilient\\\.\(.*?\)")


def documented(command: str) -> list[str]:
    """Return the arguments of a command in the document, with the exchange of the depot among the user's own."""
    [block] = (text for text in re.findall(r"```console\n\$ (.*?)```", DOCUMENT, re.DOTALL) if text.startswith(command))
    return [part.replace("^(celery|", "^(celery|to-celery|") for part in shlex.split(block.replace("\\\n", ""))]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """The store, the result backend, and the tests' side channel; for some the broker, too."""
    server = start_valkey(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture
def depot(depot: Callable[..., Depot]) -> Callable[..., Depot]:
    return partial(depot, queue="celery")


@pytest.fixture
def restricted(rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ with a user without rights, and none of our queues."""
    rabbitmq.delete_queues("resilient.")
    rabbitmq.delete_queues("celery")
    if USER not in rabbitmq.control("list_users").split():
        rabbitmq.control("add_user", USER, PASSWORD)
    yield rabbitmq
    rabbitmq.control("clear_permissions", "-p", "/", USER)
    rabbitmq.delete_queues("resilient.")  # some are of another type than those of other tests
    rabbitmq.delete_queues("celery")


def url_of(rabbitmq: RabbitMQ) -> str:
    return f"amqp://{USER}:{PASSWORD}@{LOCALHOST}:{rabbitmq.port}//"


def doctor(depot: Depot) -> str:
    command = celery_command(MODULE, "breakers", "doctor", "--timeout", "3")
    return forks.run(command, env=depot.env).stdout


def operate(depot: Depot, *command: str) -> None:
    forks.run(celery_command(MODULE, "breakers", *command), env=depot.env).check_returncode()


def errors_of(worker: Program) -> list[str]:
    return [line for line in worker.output().splitlines() if "ERROR" in line or "CRITICAL" in line]


def other_tasks_go_on(depot: Depot, worker: Program) -> None:
    """See that an outage holds up nothing but its own tasks, which are done after it."""
    client = depot.client()
    refused = "resilient.deferred.payments"
    worker.wait_for_output("tasks cannot be deferred, the broker refuses", timeout=TIMEOUT)
    operate(depot, "isolate", "payments", "--reason", "test")
    wait_until(lambda: "FORCED_OPEN" in str(client.control.broadcast("breakers", reply=True)), timeout=TIMEOUT)
    charges = send_charges(client, [0] * ORDERS)
    pings = [client.send_task("ping") for _ in range(ORDERS)]
    wait_until(are("SUCCESS", pings), timeout=TIMEOUT, what="other tasks to finish")
    assert not [charge for charge in charges if charge.state in ("SUCCESS", "FAILURE")]
    assert f"the queue {refused}" in doctor(depot)
    operate(depot, "reset", "payments", "--reason", "test")
    wait_until(are("SUCCESS", charges), timeout=TIMEOUT, what="charges to finish")
    assert [client.send_task("ping").get(timeout=TIMEOUT) for _ in range(5)] == ["pong"] * 5
    assert sum(refused in line for line in errors_of(worker)) == 1
    assert "Traceback" not in worker.output()
    assert PASSWORD not in worker.output()


@pytest.mark.rabbitmq
def test_the_rights_on_rabbitmq_are_enough(restricted: RabbitMQ, depot: Callable[..., Depot]) -> None:
    restricted.control(*documented("rabbitmqctl")[1:])
    least = depot(url_of(restricted))
    beat, worker = least.beat(), least.worker()
    live_through_an_outage(least, [0] * ORDERS)
    assert errors_of(worker) == []
    assert "ACCESS_REFUSED" not in beat.output()
    rights = re.search(r"^rights +(\w+)", doctor(least), re.MULTILINE)
    assert rights is not None
    assert rights[1] == "ok"


@pytest.mark.rabbitmq
@pytest.mark.parametrize("kind", ["classic", "quorum"])
@pytest.mark.parametrize("control", ["with the control queue", "without it"])
def test_without_rights_on_rabbitmq_other_tasks_go_on(
    restricted: RabbitMQ, depot: Callable[..., Depot], control: str, kind: str
) -> None:
    ours = r"|resilient\.control" if control == "with the control queue" else ""
    command = [OURS.sub(lambda _: ours, part) for part in documented("rabbitmqctl")]
    restricted.control(*command[1:])
    least = depot(url_of(restricted), queue_arguments={"x-queue-type": kind})
    other_tasks_go_on(least, least.worker())


@pytest.mark.rabbitmq
def test_rights_that_are_granted_later_are_used(restricted: RabbitMQ, depot: Callable[..., Depot]) -> None:
    command = documented("rabbitmqctl")
    restricted.control(*[OURS.sub("", part) for part in command[1:]])
    later = depot(url_of(restricted))
    worker = later.worker()
    client = later.client()
    operate(later, "isolate", "payments", "--reason", "test")
    charges = send_charges(client, [0] * ORDERS)
    restricted.control(*command[1:])
    wait_until(are("DEFERRED", charges), timeout=TIMEOUT, what="all to be deferred")
    wait_until(
        lambda: messages_in(client, "celery", "resilient.deferred.payments") == [0, ORDERS],
        timeout=TIMEOUT,
        what="all to wait in one place",
    )
    worker.wait_for_output("the broker refuses resilient.deferred.payments no more", timeout=TIMEOUT)


@pytest.mark.rabbitmq
def test_queues_that_an_operator_declares_need_no_right_to_configure(restricted: RabbitMQ) -> None:
    with Connection(restricted.url, connect_timeout=60) as connection:
        own_queue("resilient.deferred.payments")(connection.default_channel).declare()
    restricted.control("set_permissions", "-p", "/", USER, "^$", r"^amq\.default$", r"^resilient\..*$")
    queues = PublishedQueues(Celery("app", broker=url_of(restricted), set_as_current=False), "resilient")
    assert queues.check("resilient.deferred.payments") is None
    assert "403" in str(queues.check("resilient.dead.payments"))
    restricted.control("set_permissions", "-p", "/", USER, "^$", "^$", r"^resilient\..*$")
    assert "exchange 'amq.default'" in str(queues.check("resilient.deferred.payments"))
    restricted.control("set_permissions", "-p", "/", USER, "^$", r"^amq\.default$", "^$")
    assert "403" in str(queues.check("resilient.deferred.payments"))
    queues.close()


# --- Redis ----------------------------------------------------------------------------------------------------


@pytest.fixture
def acl(server: Server) -> Callable[..., None]:
    """Set the user's rights on the server to the documented ones, but for some."""

    def set_rights(*, without: tuple[str, ...] = ()) -> None:
        command = [part for part in documented("redis-cli") if part not in without]
        redis.Redis.from_url(server.url()).execute_command(*command[1:])

    return set_rights


def with_user(url: str) -> str:
    return url.replace("redis://", f"redis://{USER}:{PASSWORD}@")


def on_redis(make: Callable[..., Depot], server: Server) -> Depot:
    least = make(with_user(server.url(0)), backend=with_user(server.url(1)), store=with_user(server.url(2)))
    least.env["DEPOT_SIDE_URL"] = server.url(3)
    least.side = redis.Redis.from_url(server.url(3), decode_responses=True)
    return least


def test_the_rights_on_redis_are_enough(acl: Callable[..., None], server: Server, depot: Callable[..., Depot]) -> None:
    acl()
    least = on_redis(depot, server)
    beat, worker = least.beat(), least.worker()
    live_through_an_outage(least, [0] * ORDERS)
    for program in beat, worker:
        assert "NOPERM" not in program.output()
        assert "permissions" not in program.output()
        assert errors_of(program) == []


def test_a_store_without_channels_is_polled(
    acl: Callable[..., None], server: Server, depot: Callable[..., Depot]
) -> None:
    acl(without=("&resilient:*",))
    least = on_redis(depot, server)
    worker = least.worker()
    live_through_an_outage(least, [0] * ORDERS)
    [warning] = [line for line in worker.output().splitlines() if "channel" in line]
    assert "may not use the channel resilient:" in warning
    assert "Traceback" not in worker.output()


def test_without_rights_on_a_redis_broker_other_tasks_go_on(
    acl: Callable[..., None], server: Server, depot: Callable[..., Depot]
) -> None:
    acl(without=("~resilient.*",))
    least = on_redis(depot, server)
    other_tasks_go_on(least, least.worker())
