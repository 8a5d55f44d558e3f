"""``ResilientTask``: the base class that makes ``breaker=`` and its companions work, and what a sender of tasks does.

A task class without ``breaker`` stays exactly as Celery made it. One with it gets our strategy and
request class, and a ``__call__`` that decides what a refusal and a dependency failure lead to. That happens when
Celery binds the task to an app: only then is it named, configured and annotated.

A sender goes by its cached state, without asking the store: ``apply_async(on_open="fail")`` raises and
``on_open="fallback"`` answers. With the setting ``gate_producers`` a task that would only be deferred is published
straight into the deferred queue, with the envelope and by the steps of a worker's deferral. Whatever a sender cannot do
is left to the gate of the workers: the task is published as usual.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import tenacity
from celery import Celery, Task, states
from celery.result import EagerResult
from celery.utils import uuid
from kombu import Queue
from kombu.common import maybe_declare

from resilient_tasks.dependency import with_parents
from resilient_tasks.errors import BreakerOpenError, ConfigurationError, DeferredQueueFullError
from resilient_tasks.fallback import Call
from resilient_tasks.monitor.events import about
from resilient_tasks.store.background import renew_after_fork
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import Runtime, find_runtime, runtime_of
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.definitions import DEFER, FAIL, TaskOptions, check_guarded, options_of, warn_of_retry
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import defer_retry, run_guarded, serve
from resilient_tasks.worker.request import GatedRequest, coalesced_as

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.fallback import TaskKey

logger = logging.getLogger("resilient_tasks")

FALLBACK = "fallback"

Send = Callable[..., Any]

#: Options of a task that a workflow sends on its way: no caller receives an error.
_IN_A_WORKFLOW = ("group_id", "chord", "parent_id")
#: What comes after a task; it waits for a run, and no answer of a producer's own would set it off.
_FOLLOWED_BY = ("link", "chain")


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


# --- sending ---------------------------------------------------------------------------------------------


def send_task(task: Any, send: Send, args: Any, kwargs: Any, on_open: str | None, options: dict[str, Any]) -> Any:
    """Send a guarded task by Celery's ``apply_async``, unless its breaker refuses and something else is wanted then."""
    if on_open not in (None, FAIL, FALLBACK):
        raise ConfigurationError(f"task {task.name!r}: on_open={on_open!r}: a sender may say 'fail' or 'fallback'")
    if on_open == FALLBACK and not task.options.fallback:
        what = "on_open='fallback': it has no fallback, give it one by fallback="
        raise ConfigurationError(f"task {task.name!r}: {what}")
    runtime = find_runtime(task.app) if on_open is None else runtime_of(task.app)
    if runtime is None:
        return send(**options)
    wanted = None if any(map(options.get, _IN_A_WORKFLOW)) else on_open
    gated = runtime.settings.gate_producers and _is_only_deferred(task)
    breakers = runtime.guarding(task, args or (), kwargs or {}) if wanted or gated else ()
    refusal = next((guard.refuse() for guard in with_parents(breakers) if not guard.accepting), None)
    if refusal is None:
        return send(**options)
    served = _serve(runtime, task, args, kwargs, refusal, options) if wanted == FALLBACK else None
    if served is not None:
        return served
    if wanted == FAIL or (wanted == FALLBACK and task.options.on_open == FAIL):
        raise refusal
    return runtime.producers_gate.send(task, send, refusal, options) if gated else send(**options)


def _is_only_deferred(task: Any) -> bool:
    """Whether a refusal has no other effect than that the task waits."""
    options = task.options
    return options.on_open == DEFER and not options.fallback and not task.app.conf.task_always_eager


def _serve(
    runtime: Runtime, task: Any, args: Any, kwargs: Any, refusal: BreakerOpenError, options: Mapping[str, Any]
) -> EagerResult | None:
    """Return what a fallback answers; None if none does, or other tasks wait for this one to run."""
    if any(map(options.get, _FOLLOWED_BY)):
        return None
    given_id = options.get("task_id")
    task_id = given_id or uuid()
    served = serve(runtime, task, Call(task.name, task.run, args or (), kwargs or {}, task_id), refusal.breaker)
    if served is None:
        return None
    if (given_id or task.store_eager_result) and not options.get("ignore_result", task.ignore_result):
        task.backend.store_result(task_id, served.value, states.SUCCESS)  # callers that know the id may wait for it
    return EagerResult(task_id, served.value, states.SUCCESS, name=task.name)


class ProducersGate:
    """Publishes tasks of this process straight into deferred queues; safe to use from several threads."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with a new lock and without the parent's connections."""
        self._lock = threading.Lock()
        self._deferral: Deferral | None = None

    def send(self, task: Any, send: Send, refusal: BreakerOpenError, options: dict[str, Any]) -> Any:
        """Send a task with all that Celery does around it, but its message into the deferred queue."""
        task_id = options.pop("task_id", None) or uuid()
        with task.app.producer_or_acquire(options.pop("producer", None)) as producer:
            deferring = _DeferringProducer(producer, task_id, partial(self._try_to_defer, task, refusal))
            return send(task_id=task_id, producer=deferring, **options)

    def _try_to_defer(self, task: Any, refusal: BreakerOpenError, queue: Queue, body: Any, sent: Any) -> bool:
        try:
            with self._lock:
                self._defer(task, refusal, queue, body, sent)
        except DeferredQueueFullError:
            return False
        except Exception as exc:  # not deferred, for whatever reason: it is published, and a worker's gate sees to it
            is_broker = self._deferral is not None and isinstance(exc, self._deferral.errors)
            self._deferral = None
            what, task_id = "Task %s[%s] is published as usual: %r", sent["headers"]["id"]
            fields = about(task_id, task.name, refusal.breaker)
            logger.warning(what, task.name, task_id, exc, exc_info=not is_broker, extra=fields)
            return False
        return True

    def _defer(self, task: Any, refusal: BreakerOpenError, queue: Queue, body: Any, sent: Any) -> None:
        if self._deferral is None:
            self._deferral = Deferral(self._runtime)
        channel = self._deferral.queues.channel
        maybe_declare(queue, channel)  # as a producer does: it must be there when the task is resumed
        message = celery_internals.compose(channel, body, sent)
        request = GatedRequest(message, app=task.app, task=task, **celery_internals.parts_of(message))
        request.acknowledged = True  # it was never delivered
        now = self._runtime.fleet.view.server_now()
        envelope = Envelope(refusal.breaker, origin=queue.name, reason=str(refusal), expires=request.expires_at(now))
        envelope = envelope.begin(now, task.options.defer_for, coalesced_as(request)).defer(now)
        self._deferral.defer(request, envelope)


class _DeferringProducer:
    """Replaces kombu's producer in the sending of one task; passes on everything but the task's message."""

    def __init__(self, producer: Any, task_id: str, defer: Callable[[Queue, Any, Mapping[str, Any]], bool]) -> None:
        self._producer, self._task_id, self._defer = producer, task_id, defer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)

    def publish(self, body: Any, **sent: Any) -> Any:
        headers = sent.get("headers") or {}
        is_due = headers.get("id") == self._task_id and not headers.get("eta") and not headers.get("retries")
        queue = _destination(sent) if is_due else None
        if queue is not None and self._defer(queue, body, sent):
            return None
        return self._producer.publish(body, **sent)


def _destination(sent: Mapping[str, Any]) -> Queue | None:
    """Return the one queue that a message is meant for; None if its routing may say otherwise."""
    declared = list(sent.get("declare") or [])
    if len(declared) != 1 or not isinstance(declared[0], Queue) or declared[0].exchange.type == "fanout":
        return None
    queue, exchange = declared[0], sent.get("exchange")
    route = (getattr(exchange, "name", exchange), sent.get("routing_key"))
    return queue if route in (("", queue.name), (queue.exchange.name, queue.routing_key)) else None
