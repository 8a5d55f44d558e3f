"""``celery inspect breakers``: how each worker sees the breakers, in case they disagree."""

from __future__ import annotations

from typing import Any

from celery.worker.control import inspect_command

from resilient_tasks.worker.runtime import find_runtime


@inspect_command()  # type: ignore[untyped-decorator]  # Celery is untyped
def breakers(state: Any, **_: Any) -> dict[str, dict[str, Any]]:
    """State of each breaker as this worker sees it, its epoch, and the age of that knowledge in seconds."""
    runtime = find_runtime(state.app)
    if runtime is None:
        return {}
    return {
        standing.name: {
            "state": str(standing.snapshot.state),
            "epoch": standing.epoch,
            "age": None if standing.age is None else round(standing.age, 3),
        }
        for standing in sorted(runtime.fleet.view.standings(), key=lambda standing: standing.name)
    }
