"""Steps that a message takes, and bugs of the library's own in them, for workers that import :mod:`buggy`."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from functools import wraps
from typing import Any

from resilient_tasks.worker import deferred_tasks, maintenance
from resilient_tasks.worker.admission import Gate
from resilient_tasks.worker.broker_queues import RedisQueues
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.deferred_tasks import DeferredTasks, Resumer
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.maintenance import Reconciler
from resilient_tasks.worker.pipeline import Pipeline
from resilient_tasks.worker.queues import Entry, Queues
from resilient_tasks.worker.request import GatedRequest

#: Steps that a message takes on its way, by what happens to it then.
DEFERRING: list[tuple[Any, str]] = [
    (Envelope, "begin"), (Envelope, "write"), (Gate, "refusing"), (Pipeline, "origin_of"), (Pipeline, "_next_envelope"),
    (Deferral, "defer"), (Deferral, "_report"), (RedisQueues, "put"), (Envelope, "read"),
]  # fmt: skip
RESUMING: list[tuple[Any, str]] = [
    (Envelope, "read"), (Envelope, "resume"), (Entry, "_field"), (Queues, "_entry"), (Resumer, "release"),
    (DeferredTasks, "remove_ended"), (DeferredTasks, "resume"), (RedisQueues, "move"),
    (deferred_tasks, "revoked_among"),
]  # fmt: skip
RECONCILING: list[tuple[Any, str]] = [(Reconciler, "reconcile"), (Reconciler, "_index")]
DEAD_LETTERING: list[tuple[Any, str]] = [
    (DeferredTasks, "end"), (DeferredTasks, "_request"), (GatedRequest, "fail"), (Envelope, "dead_letter"),
    (deferred_tasks, "_expiry"), (deferred_tasks, "check_task"),
]  # fmt: skip


def step_name(owner: Any, name: str) -> str:
    """Return the name of a step, of which ``bug:`` and ``hits:`` are keys."""
    return f"{owner.__name__}.{name}"


def install(side: Any) -> None:
    """Have each step fail, in this process, while its key in Redis names an error."""
    for owner, name in {*DEFERRING, *RESUMING, *RECONCILING, *DEAD_LETTERING}:
        found = vars(owner)[name]
        fails: Any = _fails_by_key(side, step_name(owner, name), getattr(found, "__func__", found))
        setattr(owner, name, classmethod(fails) if isinstance(found, classmethod) else fails)
    maintenance.RECONCILE_INTERVAL = 0.5


def _fails_by_key(side: Any, step: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        error = side.get(f"bug:{step}")
        if error is not None:
            side.incr(f"hits:{step}")
            raise getattr(builtins, error)("a bug")
        return function(*args, **kwargs)

    return run
