"""What a worker answers: ``celery inspect breakers`` for people, ``resilience`` for the doctor."""

from __future__ import annotations

import time
from contextlib import suppress
from importlib import metadata
from typing import Any

from celery.worker.control import inspect_command

from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import find_runtime


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
    found = {}
    for breaker in present:
        cached, epoch = breaker.cached_state, epochs.get(breaker.name)
        found[breaker.name] = {
            "state": str(cached.snapshot.state),
            "epoch": cached.epoch,
            "age": None if cached.age is None else round(cached.age, 3),
            "agrees": None if epoch is None else epoch == cached.epoch,
        }
    return found


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
