"""The depot, a small Celery project on whatever broker a test gives it, and the outage that it lives through."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from kombu import Exchange, Queue

from workers.processes import Program, Server, start_beat, start_worker, wait_until

MODULE = "tests.integration.depot"
DEFERRED, TRIALS = "resilient.deferred.payments", 3
TIMEOUT = 120.0  # seconds; what is waited for comes true in a second or two on an idle machine


class Depot:
    """The test project on some broker, in processes of its own."""

    def __init__(
        self,
        broker: str,
        server: Server,
        directory: Path,
        *,
        backend: str | None = None,
        store: str | None = "",
        queue: str = "depot",
        queue_arguments: dict[str, Any] | None = None,
        conf: dict[str, Any] | None = None,
    ) -> None:
        """Make a depot on ``broker``; ``server`` holds what tests look at, and backend and store by default.

        ``store=None``: the library finds it by itself. ``conf``: more of Celery's settings.
        """
        self.directory = directory
        self.side = redis.Redis.from_url(server.url(0), decode_responses=True)
        self.queue = queue
        self.env = {
            "DEPOT_BROKER_URL": broker,
            "DEPOT_BACKEND_URL": backend or server.url(1),
            "DEPOT_SIDE_URL": server.url(0),
            "DEPOT_QUEUE": queue,
            "DEPOT_QUEUE_ARGUMENTS": json.dumps(queue_arguments or {}),
            "DEPOT_CONF": json.dumps(conf or {}),
        }
        if store is not None:
            self.env["RESILIENT_TASKS_STORE_URL"] = store or server.url(2)
        self._count = itertools.count(1)
        self._programs: list[Program] = []

    def worker(self, **options: Any) -> Program:
        name = f"worker{next(self._count)}"
        worker = start_worker(MODULE, name=name, directory=self.directory, env=self.env, **options)
        self._programs.append(worker)
        return worker.wait_until_ready()

    def beat(self) -> Program:
        beat = start_beat(MODULE, directory=self.directory, env=self.env)
        self._programs.append(beat)
        return beat

    def client(self) -> Celery:
        """Return an app that sends what the project's tasks take and reads what they return."""
        app = Celery("client", broker=self.env["DEPOT_BROKER_URL"], backend=self.env["DEPOT_BACKEND_URL"])
        app.conf.update(json.loads(self.env["DEPOT_CONF"]), broker_connection_timeout=60)
        arguments = json.loads(self.env["DEPOT_QUEUE_ARGUMENTS"])
        exchange = Exchange(f"to-{self.queue}", "topic")
        app.conf.task_queues = [Queue(self.queue, exchange, routing_key="work.#", queue_arguments=arguments)]
        app.conf.task_default_queue = self.queue
        app.conf.task_default_routing_key = "work.anywhere"
        return app

    def stop(self) -> None:
        while self._programs:
            program = self._programs.pop()
            program.kill()  # nothing they would still do matters to anybody
            print(f"--- {program.name}\n{program.output()}")


def send_charges(client: Celery, priorities: list[int]) -> list[Any]:
    options: dict[str, Any] = {"headers": {"x-trace": "abc"}, "reply_to": "replies"}
    return [
        client.send_task("charge", (order,), priority=priority, **options) for order, priority in enumerate(priorities)
    ]


def are(state: str, results: list[Any]) -> Callable[[], bool]:
    return lambda: {result.state for result in results} == {state}


def messages_in(client: Celery, *queues: str) -> list[int]:
    """Return how many messages lie in each of some queues."""
    with client.connection_for_read() as connection:
        return [connection.default_channel.queue_declare(queue, passive=True).message_count for queue in queues]


def wait_until_deferred(client: Celery, count: int) -> None:
    """Wait until the deferred queue has so many tasks, but for trials; states are written best-effort."""

    def waiting() -> int:
        with client.connection_for_read() as connection, suppress(*connection.channel_errors):  # not declared yet
            channel = connection.default_channel
            if hasattr(channel, "_size"):  # kombu asks for EXISTS without the prefix
                return int(channel._size(DEFERRED))
            return int(channel.queue_declare(DEFERRED, passive=True).message_count)
        return 0

    wait_until(lambda: waiting() >= count - TRIALS, timeout=TIMEOUT, what="all to be deferred")


def live_through_an_outage(depot: Depot, priorities: list[int]) -> Celery:
    """Let the dependency go down and come back, and see that every task does what it would have done."""
    depot.side.set("health", "down")
    client = depot.client()
    results = send_charges(client, priorities)
    wait_until_deferred(client, len(results))
    shown = wait_until(lambda: [each for each in results if each.state == "DEFERRED"], timeout=TIMEOUT, what="a state")
    assert shown[0].info["breaker"] == "payments"
    assert client.send_task("ping").get(timeout=TIMEOUT) == "pong"
    depot.side.set("health", "up")
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish")
    expected = [[order, priority, {"x-trace": "abc"}, "replies"] for order, priority in enumerate(priorities)]
    assert [result.result for result in results] == expected
    return client
