"""``ResilientTask``: the base class that makes ``breaker=`` and its companions work.

A task class without ``breaker`` stays exactly as Celery made it. One with it gets our strategy and
request class, and a ``__call__`` that decides what a refusal and a dependency failure lead to. That happens when
Celery binds the task to an app: only then is it named, configured and annotated.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import tenacity
from celery import Celery, Task

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.worker.definitions import DEFER, TaskOptions, check_guarded, options_of, warn_of_retry
from resilient_tasks.worker.execution import defer_retry, run_guarded
from resilient_tasks.worker.producers import send_task

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.fallback import TaskKey

#: What Celery makes a task's handler and requests of.
_PARTS = {
    "Strategy": "resilient_tasks.worker.pipeline:strategy",
    "Request": "resilient_tasks.worker.request:GatedRequest",
}
_POSITIONAL_OPTIONS = ("task_id", "producer", "link", "link_error", "shadow")


class ResilientTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Base class of tasks that need a dependency; ``Resilience(app)`` makes it the app's default.

    The attributes are task options, given in the decorator: ``@app.task(breaker="payments")``.

    Args:
        breaker: a :class:`Breaker`, its name, or a list of them: all must admit before the task starts; it waits for
            the first that refuses. A task without it is an ordinary Celery task.
        breaker_key: parameter name or callable ``(args, kwargs) -> str``: a breaker of its own per tenant, host or
            credential, ``payments:acme``.
        fallback: one or a list of ``cached(max_age=, key=)``, a function with the task's arguments,
            ``constant(value)``; tried in order when the breaker refuses, or when the dependency fails.
        on_open: when the breaker refuses and no fallback answered: ``"defer"`` (the default), or ``"fail"``: FAILURE
            with ``BreakerOpenError``, at once.
        on_failure: when the task fails because of the dependency: ``"defer"`` it as well, or ``"raise"``: leave it to
            Celery. The default is ``"defer"``, with ``on_open="fail"`` it is ``"raise"``. Celery's handler of that name
            stays what it is.
        max_attempts: failures of one task before it fails for good, 8 by default. A failure counts only if another call
            has succeeded since this task's last failure; an outage uses up no attempts.
        defer_for: longest time in deferral, seconds; then ``DeferralExpiredError`` and the dead-letter queue. By
            default there is no limit.
        retrying: a ``tenacity.Retrying``: quick attempts inside one run, each of which counts; they end when the
            breaker opens, and before the time limit.
        coalesce: ``"latest"``: of the waiting tasks with one key only the latest runs, the others end ``IGNORED``.
        coalesce_key: parameter name or callable ``(args, kwargs) -> str``; by default all arguments.
    """

    abstract = True
    breaker: Breaker | str | Sequence[Breaker | str] | None = None
    breaker_key: TaskKey | None = None
    fallback: Any = None
    on_open: Literal["defer", "fail"] = DEFER
    on_dependency_failure: str | None = None
    max_attempts: int = 8
    defer_for: float | None = None
    retrying: tenacity.Retrying | None = None
    coalesce: Literal["latest"] | None = None
    coalesce_key: TaskKey | None = None
    options: TaskOptions | None = None
    own_call: Callable[..., Any] | None = None

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        *others: Any,
        on_open: Literal["fail", "fallback"] | None = None,
        **options: Any,
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
        check_guarded(self, self.app)
        if options_of(self) is not None:
            return send_task(self, send, args, kwargs, on_open, options)
        if on_open is not None:
            raise ConfigurationError(f"task {self.name!r}: on_open={on_open!r}: it names no breaker")
        return send(**options)

    def retry(
        self,
        args: Any = None,
        kwargs: Any = None,
        exc: Any = None,
        throw: bool = True,  # noqa: FBT001, FBT002 - Celery's signature
        eta: Any = None,
        countdown: float | None = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> Any:
        """Retry, as Celery does; but a failure while the breaker is open waits in deferral, and uses no retry up.

        Takes the arguments of Celery's ``Task.retry``, and returns and raises what that does.
        """
        if throw and options_of(self) is not None:
            cls: Any = type(self)
            warn_of_retry(cls)
            limit = self.max_retries if max_retries is None else max_retries
            is_last = limit is not None and self.request.retries >= limit
            is_same = args is None and kwargs is None and not options
            defer_retry(self, exc or sys.exc_info()[1], same_message=is_same or is_last)
        return super().retry(args, kwargs, exc, throw, eta, countdown, max_retries, **options)

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Bind the class to an app, as Celery does, and then read its options."""
        bound = super().bind(app)
        if not cls.__dict__.get("abstract"):
            _guard(cls, cls.name or app.gen_task_name(cls.__name__, cls.__module__))
        return bound


def _guard(cls: type[ResilientTask], name: str) -> None:
    """Make a task class that names a breaker a guarded one; a second time changes nothing."""
    if not callable(cls.on_failure):  # our option; Celery's handler of that name is further up
        cls.on_dependency_failure = cls.on_failure
        cls.on_failure = next(own for base in cls.__mro__ if callable(own := base.__dict__.get("on_failure")))
    if cls.breaker is None:
        return
    if not isinstance(cls.options, (TaskOptions, type(None))):
        raise ConfigurationError(f"task {name!r}: options={cls.options!r:.100}: this name is taken in guarded tasks")
    cls.options = TaskOptions.of(cls, name)
    for part, ours in _PARTS.items():
        if getattr(cls, part) not in (getattr(Task, part), ours):
            raise ConfigurationError(f"task {name!r}: {part}={getattr(cls, part)!r}: a guarded task needs {ours!r}")
        setattr(cls, part, ours)
    if cls.__call__ not in (Task.__call__, run_guarded):
        cls.own_call = cls.__call__
    cls.__call__ = run_guarded


def resilient(base: type[Task]) -> type[ResilientTask]:
    """Return a task class of an app as a ``ResilientTask``: itself if it is one, else derived from it."""
    if issubclass(base, ResilientTask):
        return base
    described = {"__module__": base.__module__, "__doc__": base.__doc__}
    return type(base.__name__, (ResilientTask, base), {"abstract": True, **described})
