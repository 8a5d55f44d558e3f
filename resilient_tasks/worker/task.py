"""``ResilientTask``: the base class that makes ``breaker=`` and its companions work.

A task class without ``breaker`` stays exactly as Celery made it. One with it gets our strategy and
request class, and a ``__call__`` that decides what a refusal and a dependency failure lead to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any

import tenacity
from celery import Task
from celery.exceptions import MaxRetriesExceededError, Retry

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.errors import BreakerOpenError, ConfigurationError
from resilient_tasks.fallback import Call, write_provenance
from resilient_tasks.worker.options import DEFER, TaskOptions
from resilient_tasks.worker.run import Run, TaskDeferred, current_run
from resilient_tasks.worker.runtime import Runtime, runtime_of

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
    breaker: Breaker | str | None = None
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
    if cls.__call__ not in (Task.__call__, _run_guarded):
        cls.own_call = cls.__call__
    cls.__call__ = _run_guarded


def _body(task: ResilientTask, *, direct: bool = False) -> Callable[..., Any]:
    """Return what runs the task's function: the ``__call__`` of a user's base class, else what Celery would call."""
    if task.own_call is not None:
        return task.own_call
    return partial(Task.__call__, task) if direct else task.run


def _run_guarded(task: ResilientTask, *args: Any, **kwargs: Any) -> Any:
    """Run the body of a guarded task, from the pool, eagerly or by a direct call."""
    run = current_run.get()
    if run is None or not run.begin(task.request.id):
        return _run_ungated(task, args, kwargs)
    runtime = runtime_of(task.app)
    breaker = runtime.breakers[run.admission.breaker]
    refusal = run.admission.refusal
    if refusal is None and not run.admission.trial and breaker.state in (State.OPEN, State.FORCED_OPEN):
        refusal = breaker.refusal()  # it has opened since the gate let us through
    gated_run = _GatedRun(task, runtime, breaker, run, Call(task.name, task.run, args, kwargs))
    return gated_run.attempt() if refusal is None else gated_run.refused(refusal)


def _run_ungated(task: ResilientTask, args: Any, kwargs: Any) -> Any:
    """Guard a run that passed no gate: eager, or a direct call. There is nothing to defer."""
    options = _options(task)
    runtime = runtime_of(task.app)
    breaker = runtime.breakers[options.breaker]
    call = Call(task.name, task.run, args, kwargs)
    body = _body(task, direct=not task.request.is_eager)
    try:
        value = _attempts(task, breaker)(breaker.call, body, *args, **kwargs)
    except Exception as exc:
        if not isinstance(exc, BreakerOpenError) and breaker.judge(exc).outcome is not Outcome.FAILURE:
            raise
        served = options.fallback.answer(call, runtime.fleet.store)
        if served is None:
            raise
        return served.value
    options.fallback.remember(call, value, runtime.fleet.store)
    return value


def _options(task: ResilientTask) -> TaskOptions:
    if task.options is None:
        raise ConfigurationError(f"task {task.name!r} names no breaker")
    return task.options


def _attempts(task: ResilientTask, breaker: Breaker) -> Any:
    """Return what makes the quick attempts of ``retrying=``: a callable ``(fn, *args, **kwargs)``."""
    retrying = _options(task).retrying
    if retrying is None:
        return lambda fn, *args, **kwargs: fn(*args, **kwargs)
    return retrying.copy(stop=_StopWhenOpen(breaker, retrying.stop), reraise=True)


class _StopWhenOpen(tenacity.stop.stop_base):
    """Ends quick attempts when the user's own condition does, or as soon as the breaker no longer admits."""

    def __init__(self, breaker: Breaker, otherwise: Any) -> None:
        self._breaker = breaker
        self._otherwise = otherwise

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return not self._breaker.admits or bool(self._otherwise(retry_state))


class _GatedRun:
    """One run of a guarded task that came through the gate."""

    def __init__(self, task: ResilientTask, runtime: Runtime, breaker: Breaker, run: Run, call: Call) -> None:
        self.task, self.runtime, self.breaker, self.run, self.call = task, runtime, breaker, run, call
        self.args, self.kwargs = call.args, call.kwargs
        self.options = _options(task)

    def attempt(self) -> Any:
        """Run the body and judge it."""
        started = perf_counter()
        try:
            value = self._body()
        except BreakerOpenError as refusal:
            self.run.verdict = Verdict(Outcome.IGNORED)
            return self.refused(refusal)
        except BaseException as exc:
            self.run.verdict = self.breaker.judge(exc)
            if self.run.verdict.outcome is Outcome.FAILURE and not isinstance(exc, Retry):
                return self._failed(exc)
            raise
        self.run.verdict = Verdict(self.breaker.outcome_of_success(perf_counter() - started))
        self.options.fallback.remember(self.call, value, self.runtime.fleet.store)
        return value

    def _body(self) -> Any:
        if self.options.retrying is None:
            return _body(self.task)(*self.args, **self.kwargs)
        return _attempts(self.task, self.breaker)(self._one_attempt)

    def _one_attempt(self) -> Any:
        if self.run.admission.trial:  # its one permit covers all attempts, its verdict is the last one's
            return _body(self.task)(*self.args, **self.kwargs)
        return self.breaker.call(_body(self.task), *self.args, **self.kwargs)

    def refused(self, refusal: BreakerOpenError) -> Any:
        """Answer for a body that a breaker kept from running, or from going on."""
        if self._serve(refusal.breaker):
            return self._served_value()
        if self.options.on_open == DEFER:
            raise TaskDeferred(refusal.breaker, str(refusal), self.run.admission.attempts) from refusal
        raise refusal

    def _failed(self, exc: BaseException) -> Any:
        """Answer for a body that failed through its dependency; called while ``exc`` is being handled."""
        if self._serve(self.breaker.name):
            return self._served_value()
        attempts = self.run.admission.attempts + self.run.admission.counts
        if self.options.on_failure != DEFER or self._has_retried(exc) or attempts >= self.options.max_attempts:
            raise exc
        cause = self.run.verdict.cause if self.run.verdict else ""
        raise TaskDeferred(self.breaker.name, f"the task failed: {cause}", attempts, True) from exc

    def _has_retried(self, exc: BaseException) -> bool:
        """Whether Celery's own retrying has had, or is having, its say about this failure."""
        automatic = tuple(getattr(self.task, "autoretry_for", None) or ())
        return self.task.request.retries > 0 or isinstance(exc, (MaxRetriesExceededError, *automatic))

    def _serve(self, breaker: str) -> bool:
        self.run.served = self.options.fallback.answer(self.call, self.runtime.fleet.store)
        if self.run.served is None:
            return False
        write_provenance(self.runtime.fleet.store, self.run.task_id, self.run.served, breaker, self.runtime.result_ttl)
        return True

    def _served_value(self) -> Any:
        return self.run.served.value if self.run.served else None
