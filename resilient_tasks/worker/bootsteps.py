"""Where the library enters a worker: one bootstep of the worker, one of its consumer, and what it answers.

``celery inspect breakers`` is for people, ``resilience`` for the doctor.
"""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from importlib import metadata
from typing import Any

from celery import bootsteps
from celery.signals import worker_process_init, worker_process_shutdown, worker_shutdown
from celery.worker.control import inspect_command
from kombu import Consumer
from kombu.common import ignore_errors

from resilient_tasks.errors import StoreError
from resilient_tasks.store import background
from resilient_tasks.store.base import Spec
from resilient_tasks.store.view import CachedState
from resilient_tasks.worker import celery_internals, kombu_internals
from resilient_tasks.worker.context import TICK_TASK, Runtime, find_runtime, runtime_of
from resilient_tasks.worker.envelope import UNDECODABLE
from resilient_tasks.worker.pipeline import Pipeline, pipeline_of
from resilient_tasks.worker.queues import declare, own_queue

logger = logging.getLogger("resilient_tasks")


class Membership(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery is untyped
    """Checks the configuration before the worker starts, and shares memory before the pool forks."""

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        super().__init__(worker, **kwargs)
        runtime = runtime_of(worker.app)
        runtime.validate()
        kombu_internals.install(f"{runtime.settings.namespace}.dead.{UNDECODABLE}")
        runtime.fleet.store.check()
        runtime.fleet.view.share()
        runtime.pipeline = Pipeline(runtime)

    def terminate(self, worker: Any) -> None:
        """Leave at a cold shutdown, which sends no signal; a worker inside another process would leave a thread."""
        _leave(worker)


class ControlQueue(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery is untyped
    """Joins the fleet when the consumer connects, and takes ticks from a queue and channel of their own.

    Of their own, because a full prefetch window would starve them otherwise. After Mingle, which waits
    for a second of silence on the connection: ticks that arrive meanwhile would never let it end.
    """

    requires = ("celery.worker.consumer.mingle:Mingle",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)
        celery_internals.filter_messages(consumer, pipeline_of(consumer.app).deferral.takes)
        self._ticks: Any = None

    def start(self, consumer: Any) -> None:
        runtime, pipeline = runtime_of(consumer.app), pipeline_of(consumer.app)
        pipeline.start(consumer)
        try:
            self._ticks = _take_ticks(consumer.connection, runtime)
        except consumer.connection.channel_errors as exc:
            what = "no ticks can be taken from queue %s, this worker runs its own: %s"
            logger.error(what, runtime.control_queue, exc)  # noqa: TRY400 - the broker's words say it all
        pipeline.takes_ticks = self._ticks is not None

    def stop(self, consumer: Any) -> None:
        pipeline = pipeline_of(consumer.app)
        pipeline.takes_ticks = False
        pipeline.compensation.stop()
        ticks, self._ticks = self._ticks, None
        if ticks is not None:
            for close in (ticks.cancel, ticks.channel.close):
                ignore_errors(consumer.connection, close)  # which may be gone already

    shutdown = stop


def _take_ticks(connection: Any, runtime: Runtime) -> Consumer:
    def receive(message: Any) -> None:
        message.ack()
        name = message.headers.get("task") if isinstance(message.headers, dict) else None
        if name == TICK_TASK:
            runtime.pipeline.maintenance.want_tick()
        else:
            logger.warning("ignored a message on %s that is no tick: task=%.100r", runtime.control_queue, name)

    queue = own_queue(runtime.control_queue)
    declare(connection, queue)
    ticks = Consumer(connection.channel(), [queue], auto_declare=False, on_message=receive, prefetch_count=1)
    ticks.consume()
    return ticks


@worker_shutdown.connect  # type: ignore[untyped-decorator]  # Celery is untyped
def _leave(sender: Any, **_: Any) -> None:
    """Leave the fleet when the pool has finished its last tasks."""
    runtime = find_runtime(sender.app)
    if runtime is not None:
        runtime.pipeline.close()


def _runtime_of_child() -> Runtime | None:
    runtime = find_runtime(celery_internals.current_app())
    return runtime if runtime is not None and runtime.pipeline.pid != os.getpid() else None  # solo is no child


@worker_process_init.connect  # type: ignore[untyped-decorator]  # Celery is untyped
def _become_child(**_: Any) -> None:
    """In a pool process: read what the main process shares, follow nothing."""
    runtime = _runtime_of_child()
    if runtime is not None:
        runtime.fleet.view.become_child()


@worker_process_shutdown.connect  # type: ignore[untyped-decorator]  # Celery is untyped
def _report_the_rest(**_: Any) -> None:
    """In a pool process that ends: it skips exit handlers, and its last outcomes may not have been sent."""
    runtime = _runtime_of_child()
    if runtime is not None:
        runtime.fleet.close()
        background.finish_all()


# --- what a worker answers ------------------------------------------------------------------------------


@inspect_command()  # type: ignore[untyped-decorator]  # Celery is untyped
def breakers(state: Any, **_: Any) -> dict[str, dict[str, Any]]:
    """Each breaker as this worker sees it: state, epoch, age in seconds, and whether the store agrees."""
    runtime = find_runtime(state.app)
    if runtime is None:
        return {}
    present = sorted(runtime.present(), key=lambda breaker: breaker.name)
    epochs: dict[str, int] = {}
    with suppress(StoreError):
        read = runtime.fleet.store.read_shared([breaker.spec for breaker in present])
        epochs = {snapshot.name: snapshot.epoch for snapshot in read}
    return {breaker.name: _as_seen(breaker.cached_state, epochs.get(breaker.name)) for breaker in present}


def _as_seen(cached: CachedState, epoch: int | None) -> dict[str, Any]:
    return {
        "state": str(cached.snapshot.state),
        "epoch": cached.epoch,
        "age": None if cached.age is None else round(cached.age, 3),
        "agrees": None if epoch is None else epoch == cached.epoch,
    }


@inspect_command()  # type: ignore[untyped-decorator]  # Celery is untyped
def resilience(state: Any, **_: Any) -> dict[str, Any]:
    """What the doctor asks of a worker: version, control queue, clock and policies; see ``WorkerFacts``."""
    runtime = find_runtime(state.app)
    if runtime is None:
        return {}
    return {
        "version": library_version(),
        "control_queue": runtime.control_queue if runtime.pipeline.takes_ticks else None,
        "refused": runtime.pipeline.deferral.denials.reasons,
        "clock_ahead": time.time() - runtime.fleet.view.server_now(),
        "can_grow": celery_internals.can_grow(state.consumer.pool),
        "tick_scope": runtime.tick_scope,
        "policies": {spec.name: rules_of(spec) for spec in runtime.specs()},
    }


def library_version() -> str:
    return metadata.version("resilient_tasks")


def rules_of(spec: Spec) -> dict[str, Any]:
    """Return what a process declares of a breaker, for comparison with what others do."""
    return {name: value for name, value in spec.rules()._asdict().items() if name != "revision"}
