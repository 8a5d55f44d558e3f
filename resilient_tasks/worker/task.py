"""``ResilientTask``: the base class that makes ``breaker=`` and its companions work.

A task class without ``breaker`` stays exactly as Celery made it. One with it gets our strategy and
request class, and a ``__call__`` that decides what a refusal and a dependency failure lead to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import tenacity
from celery import Task

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.worker.body import run_guarded
from resilient_tasks.worker.options import DEFER, TaskOptions
from resilient_tasks.worker.producers import send_task

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.worker.task_key import TaskKey

#: What Celery makes a task's handler and requests of.
_PARTS = {
    "Strategy": "resilient_tasks.worker.strategy:gated",
    "Request": "resilient_tasks.worker.request:GatedRequest",
}
_POSITIONAL_OPTIONS = ("task_id", "producer", "link", "link_error", "shadow")


class ResilientTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Base class of tasks that need a dependency; ``Resilience(app)`` makes it the app's default.

    The attributes are task options, given in the decorator: ``@app.task(breaker="payments")``.
    ``on_failure="defer" | "raise"`` is one of them too; Celery's handler of that name stays what it is.
    """

    abstract = True
    breaker: Breaker | str | Sequence[Breaker | str] | None = None
    breaker_key: TaskKey | None = None
    fallback: Any = None
    on_open: str = DEFER
    on_dependency_failure: str | None = None
    max_attempts: int = 8
    defer_for: float | None = None
    retrying: tenacity.Retrying | None = None
    coalesce: str | None = None
    coalesce_key: TaskKey | None = None
    options: TaskOptions | None = None
    own_call: Callable[..., Any] | None = None

    def apply_async(
        self, args: Any = None, kwargs: Any = None, *others: Any, on_open: str | None = None, **options: Any
    ) -> Any:
        """Send the task, as Celery does.

        Args:
            args: positional arguments of the task.
            kwargs: keyword arguments of the task.
            others: Celery's ``task_id``, ``producer``, ``link``, ``link_error`` and ``shadow`` in this order.
            on_open: what to do at once, in this process, while the breaker refuses: ``"fail"`` raises,
                ``"fallback"`` answers with the task's fallback; None publishes the task.
            options: Celery's options.

        Returns:
            The task's ``AsyncResult``; an ``EagerResult`` if a fallback has answered.

        Raises:
            BreakerOpenError: the breaker refuses, and ``on_open`` or the task's own says to fail.
            ConfigurationError: ``on_open`` is not allowed for this task.
        """
        options.update(zip(_POSITIONAL_OPTIONS, others, strict=False))
        send = partial(super().apply_async, args, kwargs)
        if self.options is None:
            if on_open is not None:
                raise ConfigurationError(f"task {self.name!r}: on_open={on_open!r}: it names no breaker")
            return send(**options)
        return send_task(self, send, args, kwargs, on_open, options)

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
