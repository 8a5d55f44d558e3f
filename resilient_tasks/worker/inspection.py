"""``celery inspect breakers``: how each worker sees the breakers, and whether the store agrees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from celery.worker.control import inspect_command

from resilient_tasks.breaker import Breaker
from resilient_tasks.errors import StoreError
from resilient_tasks.store.standing import Standing
from resilient_tasks.worker.runtime import Runtime, find_runtime


@inspect_command()  # type: ignore[untyped-decorator]  # Celery is untyped
def breakers(state: Any, **_: Any) -> dict[str, dict[str, Any]]:
    """Each breaker as this worker sees it: state, epoch, age in seconds, and whether the store agrees."""
    runtime = find_runtime(state.app)
    if runtime is None:
        return {}
    present = sorted(runtime.present(), key=lambda breaker: breaker.name)
    epochs = _epochs_in_store(runtime, present)
    return {breaker.name: _view(breaker.standing, epochs.get(breaker.name)) for breaker in present}


def _epochs_in_store(runtime: Runtime, present: Sequence[Breaker]) -> dict[str, int]:
    """Return the epoch of each breaker that the store knows now; nothing while it is away."""
    specs = [breaker.spec for breaker in present]
    try:
        return {snapshot.name: snapshot.epoch for snapshot in runtime.fleet.store.read_shared(specs)}
    except StoreError:
        return {}


def _view(standing: Standing, epoch: int | None) -> dict[str, Any]:
    return {
        "state": str(standing.snapshot.state),
        "epoch": standing.epoch,
        "age": None if standing.age is None else round(standing.age, 3),
        "agrees": None if epoch is None else epoch == standing.epoch,
    }
