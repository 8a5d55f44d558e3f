"""What the gate adds to one task, step by step: processor time of one process, without broker, pool and scheduler.

A task that does nothing, guarded and not, is taken through Celery's own strategy, request and tracer, and pickled on
its way as a pool does it. The least of many short, alternating rounds counts, so that a busy machine
gives a quiet one's figure. ``benchmarks.throughput`` shows what that is in a live worker, beside all that it does.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

from celery import Celery
from celery.app.trace import build_tracer, setup_worker_optimizations
from kombu.message import Message

from resilient_tasks import Resilience
from resilient_tasks.testing import in_memory
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.pipeline import Pipeline

ROUNDS = 40  # per task
TASKS = 200  # per round
MAIN, POOL = "main process", "pool process"
STEPS = {
    "arrives": MAIN,
    "is submitted": MAIN,
    "is sent to the pool": MAIN,
    "is read there": POOL,
    "runs": POOL,
    "is answered": POOL,
    "its answer is read": MAIN,
    "has ended": MAIN,
}

app = Celery("gate", broker="memory://", set_as_current=False)
app.conf.update(task_acks_late=True, task_ignore_result=True)
resilience = Resilience(app)
payments = resilience.breaker("payments")


@app.task(send_events=False, shared=False)
def plain() -> None:
    """Do nothing."""


@app.task(breaker=payments, send_events=False, shared=False)
def guarded() -> None:
    """Do nothing, behind the gate."""


class Worker:
    """As much of a worker as the two tasks pass through."""

    def __init__(self) -> None:
        for silenced in ("celery.worker.strategy", "celery.app.trace"):
            logging.getLogger(silenced).setLevel(logging.WARNING)
        setup_worker_optimizations(app)
        for name, task in app.tasks.items():
            task.__trace__ = build_tracer(name, task, app.loader, "worker", app=app)
        runtime_of(app).pipeline = Pipeline(runtime_of(app))
        self._consumer = Mock(
            hostname="worker",
            connection_errors=(),
            disable_rate_limits=True,
            task_buckets={},
            event_dispatcher=Mock(enabled=False),
            on_task_request=self._reserve,
            pool=SimpleNamespace(apply_async=self._submit),
        )
        self._consumer.controller.state.revoked = ()

    def _reserve(self, request: Any) -> None:
        self._request = request

    def _submit(self, run: Callable[..., Any], **options: Any) -> None:
        self._submitted = run, options

    def handler(self, task: Any) -> Callable[..., None]:
        """Return what handles the messages of a task."""
        started: Callable[..., None] = task.start_strategy(app, self._consumer)
        return started

    def take(self, handle: Callable[..., None], message: Message) -> Iterator[None]:
        """Take a message through a worker, step by step."""
        handle(message, None, _settled, _settled, None)
        yield
        self._request.execute_using_pool(self._consumer.pool)
        run, options = self._submitted
        yield
        sent = pickle.dumps((run, options["args"]))
        yield
        run, args = pickle.loads(sent)
        yield
        answer = run(*args)
        yield
        sent = pickle.dumps(answer)
        yield
        answer = pickle.loads(sent)
        yield
        options["accept_callback"](os.getpid(), time.monotonic())
        options["callback"](answer)
        yield


def _settled(*_: object) -> None:
    """Take an acknowledgement's place."""


def message_of(task: Any) -> Callable[[], Message]:
    """Return what makes a fresh message of a task, as a worker gets it."""
    with app.connection_for_write() as connection:
        task.apply_async(connection=connection)
        sent = connection.default_channel.basic_get(app.conf.task_default_queue)
    parts = {name: getattr(sent, name) for name in ("body", "content_type", "content_encoding", "properties")}
    return lambda: Message(
        **parts, headers=dict(sent.headers), delivery_info=dict(sent.delivery_info), accept={"application/json"}
    )


def measure(worker: Worker, handle: Callable[..., None], fresh: Callable[[], Message]) -> list[float]:
    """Return the microseconds that each step of one task takes."""
    spent = [0.0] * len(STEPS)
    for _ in range(TASKS):
        steps = worker.take(handle, fresh())
        before = time.thread_time()
        for number, _ in enumerate(steps):
            after = time.thread_time()
            spent[number] += after - before
            before = time.thread_time()
    return [seconds / TASKS * 1e6 for seconds in spent]


def report(unguarded: list[float], own: list[float]) -> None:
    print(f"\nµs of processor time for one task that does nothing; least of {ROUNDS} rounds of {TASKS} tasks\n")
    print(f"{'':14}{'the task':20}{'unguarded':>10}{'guarded':>10}{'more':>8}")
    for process in (MAIN, POOL):
        mine = [number for number, where in enumerate(STEPS.values()) if where == process]
        rows = [(list(STEPS)[number], unguarded[number], own[number]) for number in mine]
        rows.append(("in all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
        for step, other, ours in rows:
            print(f"{process:14}{step:20}{other:10.1f}{ours:10.1f}{ours - other:8.1f}")


def main() -> None:
    with in_memory(resilience):
        worker = Worker()
        contestants = [(worker.handler(task), message_of(task)) for task in (plain, guarded)]
        rounds: list[list[list[float]]] = [[], []]
        for _ in range(ROUNDS):
            for contestant, times in zip(contestants, rounds, strict=True):
                gc.collect()
                times.append(measure(worker, *contestant))
        runtime_of(app).pipeline.maintenance.stop()
        report(*([min(step) for step in zip(*times, strict=True)] for times in rounds))


if __name__ == "__main__":
    main()
