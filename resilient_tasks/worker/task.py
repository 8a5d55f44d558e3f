"""``ResilientTask``: the base class that makes ``breaker=`` and its companions work.

A task class without ``breaker`` stays exactly as Celery made it. One with it gets our strategy and
request class, and a ``__call__`` that decides what a refusal and a dependency failure lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import tenacity
from celery import Task

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.worker.body import run_guarded
from resilient_tasks.worker.options import DEFER, TaskOptions

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker

#: What Celery makes a task's handler and requests of.
_PARTS = {
    "Strategy": "resilient_tasks.worker.strategy:gated",
    "Request": "resilient_tasks.worker.request:GatedRequest",
}


class ResilientTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Base class of tasks that need a dependency; ``Resilience(app)`` makes it the app's default.

    The attributes are task options, given in the decorator: ``@app.task(breaker="payments")``.
    ``on_failure="defer" | "raise"`` is one of them too; Celery's handler of that name stays what it is.
    """

    abstract = True
    breaker: Breaker | str | Sequence[Breaker | str] | None = None
    breaker_key: Any = None
    fallback: Any = None
    on_open: str = DEFER
    on_dependency_failure: str | None = None
    max_attempts: int = 8
    defer_for: float | None = None
    retrying: tenacity.Retrying | None = None
    options: TaskOptions | None = None
    own_call: Callable[..., Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "on_failure" in cls.__dict__ and not callable(cls.on_failure):
            cls.on_dependency_failure = cls.on_failure
            del cls.on_failure
        if cls.breaker is not None and cls.name:
            _guard(cls)


def _guard(cls: type[ResilientTask]) -> None:
    """Make a task class that names a breaker a guarded one."""
    cls.options = TaskOptions.of(cls)
    for part, ours in _PARTS.items():
        if getattr(cls, part) not in (getattr(Task, part), ours):
            raise ConfigurationError(f"task {cls.name!r}: {part}={getattr(cls, part)!r}: a guarded task needs {ours!r}")
        setattr(cls, part, ours)
    if cls.__call__ not in (Task.__call__, run_guarded):
        cls.own_call = cls.__call__
    cls.__call__ = run_guarded
