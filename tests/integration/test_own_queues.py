"""Our queues on RabbitMQ are declared in one way, whatever the app sets for its own, and hold up no worker."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Queue

from resilient_tasks.worker.broker_queues import PublishedQueues
from tests.integration.depots import (
    MODULE,
    TIMEOUT,
    Depot,
    are,
    live_through_an_outage,
    messages_in,
    send_charges,
    wait_until_deferred,
)
from tests.support import forks
from workers.processes import celery_command, wait_until
from workers.rabbitmq import RabbitMQ

pytestmark = pytest.mark.rabbitmq

CONTROL, DEFERRED, DEAD = OURS = "resilient.control", "resilient.deferred.payments", "resilient.dead.payments"
ORDERS = 10
#: What projects set for their own queues.
DEFAULTS: dict[str, dict[str, Any]] = {
    "quorum": {"task_default_queue_type": "quorum", "broker_transport_options": {"confirm_publish": True}},
    "priorities": {"task_queue_max_priority": 10},
    "no missing queues": {"task_create_missing_queues": False},
    "routes": {"task_routes": {"resilient_tasks.*": {"exchange": "elsewhere", "routing_key": "nowhere"}}},
}


@pytest.fixture
def fresh(rabbitmq: RabbitMQ) -> Iterator[RabbitMQ]:
    """A RabbitMQ that has none of our queues; other tests find none of another type."""
    rabbitmq.delete_queues("resilient.")
    yield rabbitmq
    rabbitmq.delete_queues("resilient.")


@pytest.fixture
def depot(fresh: RabbitMQ, depot: Callable[..., Depot]) -> Callable[..., Depot]:
    return partial(depot, fresh.url)


def types(rabbitmq: RabbitMQ) -> dict[str, str]:
    """Return the types of our queues that there are."""
    lines = rabbitmq.control("list_queues", "name", "type").splitlines()[1:]
    return {name: kind for name, kind in map(str.split, lines) if name in OURS}


def breakers(depot: Depot, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as an operator of the depot does."""
    return forks.run(celery_command(MODULE, "breakers", *command), env=depot.env)


@pytest.mark.parametrize("first", ["beat", "worker"])
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_any_process_may_come_first(depot: Callable[..., Depot], fresh: RabbitMQ, defaults: str, first: str) -> None:
    project = depot(queue=f"depot-{defaults.replace(' ', '-')}", conf=DEFAULTS[defaults])
    breakers(project, "doctor", "--timeout", "0.1")
    assert types(fresh) == {}, "to look declares nothing"
    breakers(project, "trip", "payments", "--reason", "test")  # from now on a tick is due all the time
    beat, worker = (project.beat(), project.worker()) if first == "beat" else (project.worker(), project.beat())[::-1]
    live_through_an_outage(project, [0] * ORDERS)

    worker.stop()
    breakers(project, "trip", "payments", "--reason", "test")
    client = project.client()
    wait_until(lambda: messages_in(client, CONTROL) > [0], timeout=TIMEOUT, what="a tick of beat's")
    as_the_app = "quorum" if defaults == "quorum" else "classic"
    found = types(fresh)
    assert (found[CONTROL], found[DEFERRED]) == ("classic", as_the_app)
    for program in beat, worker:
        assert "Traceback" not in program.output()
        assert "PRECONDITION_FAILED" not in program.output()


@pytest.mark.parametrize("arguments", [{"x-queue-type": "quorum"}, {"x-max-priority": 5}, {"x-queue-type": "stream"}])
def test_what_exists_otherwise_is_an_error_and_holds_up_nothing(
    depot: Callable[..., Depot], fresh: RabbitMQ, arguments: dict[str, Any]
) -> None:
    with Connection(fresh.url, connect_timeout=60) as connection:
        Queue(CONTROL, queue_arguments=arguments)(connection.default_channel).declare()
        Queue(DEFERRED, queue_arguments={"x-max-priority": 5})(connection.default_channel).declare()
    otherwise = depot(queue="depot-otherwise")
    beat, worker = otherwise.beat(), otherwise.worker()
    live_through_an_outage(otherwise, [0] * ORDERS)
    errors = [line for line in worker.output().splitlines() if "ERROR" in line]
    assert sum(f"queue {CONTROL} exists otherwise than declared here" in error for error in errors) == 1
    assert sum(f"queue {DEFERRED} exists otherwise than declared here" in error for error in errors) == 1
    assert "once empty, delete it" in errors[0]
    assert "Traceback" not in beat.output() + worker.output()


def test_a_size_declares_nothing(fresh: RabbitMQ) -> None:
    app = Celery("app", broker=fresh.url, set_as_current=False)
    queues = PublishedQueues(app, "resilient")
    assert queues.size(*OURS) == 0
    assert types(fresh) == {}
    queues.close()


def test_a_queue_of_the_users_below_the_namespace(depot: Callable[..., Depot]) -> None:
    below = depot(queue="resilient.emails")
    below.worker()
    client = below.client()
    below.side.set("health", "down")
    results = send_charges(client, [0] * ORDERS)
    wait_until_deferred(client, len(results))
    below.side.set("health", "up")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
