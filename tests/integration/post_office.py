"""``PostOffice``: the project ``post`` with a worker on some broker, and a producer that does not know the library."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import redis
from celery import Celery, Signature
from celery.result import AsyncResult

from resilient_tasks import Resilience
from resilient_tasks.core.model import State
from workers.processes import Server, Worker, start_worker, wait_until

MODULE = "tests.integration.post"
TIMEOUT = float(os.environ.get("SHOP_TIMEOUT", "120"))  # seconds
QUEUE, ABROAD = "post", "abroad"
RESULTS, SIDE = 4, 5  # databases


class PostOffice:
    """The project as its clients and its operator see it.

    Args:
        broker: URL of the broker.
        server: where results, breakers and the side channel are.
        directory: for logs and files.
        backends: more result backends, URL by name; a task ``charge_on_<name>`` uses each.
    """

    def __init__(self, broker: str, server: Server, directory: Path, backends: dict[str, str]) -> None:
        self.directory = directory
        self.backends = backends
        self.side: Any = redis.Redis.from_url(server.url(SIDE), decode_responses=True)
        self.env = {
            "POST_BROKER_URL": broker,
            "POST_BACKEND_URL": server.url(RESULTS),
            "POST_SIDE_URL": server.url(SIDE),
            "POST_BACKENDS": json.dumps(backends),
            "RESILIENT_TASKS_STORE_URL": server.url(SIDE),
            "RESILIENT_TASKS_NAMESPACE": "post",
            "RESILIENT_TASKS_LATE_AFTER": "3600",  # no call is taken for one that hangs
        }
        os.environ.update({name: value for name, value in self.env.items() if name.startswith("POST_")})
        self.project = importlib.import_module(MODULE)
        self.client = self.producer()
        self.operator = Resilience(self.producer(), store_url=server.url(SIDE), store_timeout=20, namespace="post")
        for name, breaker in self.project.resilience.breakers.items():
            self.operator.breaker(name, breaker.policy)
        self._count = itertools.count(1)
        self.worker = self._start_worker()

    def _start_worker(self) -> Worker:
        name = f"post{next(self._count)}"
        arguments = ["--without-mingle"]
        worker = start_worker(MODULE, name=name, directory=self.directory, env=self.env, arguments=arguments)
        return worker.wait_until_ready()

    def restart(self) -> None:
        """Stop the only worker and start another."""
        self.worker.stop()
        self.worker = self._start_worker()

    def producer(self, backend: str | None = None, **settings: Any) -> Celery:
        """Return an app without our library that knows no task."""
        backend = backend or self.env["POST_BACKEND_URL"]
        client = Celery("client", broker=self.env["POST_BROKER_URL"], backend=backend)
        client.conf.update({**self.project.SETTINGS, **settings})
        return client

    def task(self, name: str, *args: Any, **kwargs: Any) -> Signature:
        """Return a task of the project, by name, as that producer would send it."""
        return self.client.signature(name, args, kwargs)

    def clear(self) -> None:
        """Close the breakers, and forget what former tests have noted."""
        for name in self.operator.breakers:
            self.close(name)
        for key in ["health", "notes", *self.side.keys("runs:*")]:
            self.side.delete(key)

    def open(self, breaker: str) -> None:
        """Have tasks refused until the breaker is reset; return once the worker knows."""
        self.operator.breakers[breaker].isolate(reason="test")
        self.wait(lambda: self._seen_by_worker(breaker) == State.FORCED_OPEN, "the worker to see it")

    def _seen_by_worker(self, breaker: str) -> str | None:
        with self.client.connection_for_write() as connection:  # those of the pool may be of an earlier server's time
            answers = self.client.control.broadcast("breakers", reply=True, timeout=10, limit=1, connection=connection)
        return next((views[breaker]["state"] for answer in answers for views in answer.values()), None)

    def close(self, breaker: str) -> None:
        """Have them admitted again."""
        self.operator.breakers[breaker].reset(reason="test")

    def runs(self, task: str = "charge") -> list[str]:
        """Ids of the runs of a task, in order."""
        return list(self.side.lrange(f"runs:{task}", 0, -1))

    def notes(self) -> list[list[str]]:
        """What ``note`` was called with."""
        return [json.loads(note) for note in self.side.lrange("notes", 0, -1)]

    def waiting(self, breaker: str) -> int:
        """How many tasks wait, by the store's index."""
        return self.operator.breakers[breaker].snapshot().deferred

    @staticmethod
    def wait(condition: Any, what: str) -> Any:
        """Wait until a condition holds."""
        return wait_until(condition, timeout=TIMEOUT, what=what)

    def wait_state(self, state: str, results: Iterable[AsyncResult]) -> None:
        """Wait until all results have a state."""
        wanted = list(results)
        self.wait(lambda: {result.state for result in wanted} == {state}, f"all to be {state}")

    def wait_until_deferred(self, count: int, breaker: str = "payments") -> None:
        """Wait until so many messages lie in a deferred queue; their states and the index show them before."""
        self.wait(lambda: self.operator.deferred.count(breaker) == count, f"{count} to wait")

    def through_an_outage(self, *results: AsyncResult) -> list[Any]:
        """See that tasks wait while payments are refused and finish afterwards; return their results."""
        self.wait_state("DEFERRED", results)
        self.close("payments")
        return [result.get(timeout=TIMEOUT) for result in results]

    def stop(self) -> None:
        """Stop the worker; pytest shows what it wrote if a test failed."""
        gc.collect()  # results take leave of their backend, which must still be there
        self.operator.fleet.close()
        self.client.close()
        self.worker.kill()
        print(f"--- {self.worker.name}\n{self.worker.output()}")
