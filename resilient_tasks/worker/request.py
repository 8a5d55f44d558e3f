"""``GatedRequest``: one delivered message of a guarded task, as Celery's worker handles it.

It ends in exactly one way: *finished* (Celery's own handling), *deferred*, or *failed*. Several callbacks compete to
say so: ``on_success``, ``on_failure`` and, after the latter, ``on_timeout``. What happens then the :class:`Pipeline`
decides.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timezone
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4
from weakref import ref

from billiard.einfo import ExceptionInfo, ExceptionWithTraceback
from celery import signals, states
from celery.worker.request import Request
from kombu.utils.encoding import safe_repr
from kombu.utils.json import dumps

from resilient_tasks.dependency import Dependency, with_parents
from resilient_tasks.fallback import Call, key_of
from resilient_tasks.monitor.events import TASK_FALLBACK, about
from resilient_tasks.store.background import TimedWriter
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import Runtime, runtime_of
from resilient_tasks.worker.definitions import DEFER
from resilient_tasks.worker.envelope import HEADER, Envelope
from resilient_tasks.worker.execution import (
    INVALID_CALLBACKS,
    WENT_WELL,
    Admission,
    Deferred,
    Report,
    limits_of,
    run_admitted,
)

if TYPE_CHECKING:
    from resilient_tasks.store.ledger import Ledger
    from resilient_tasks.worker.queues import Entry

logger = logging.getLogger("resilient_tasks")

#: Seconds that this process waits for the hooks of one task that has ended without a run.
HOOKS_TIMEOUT = 1.0

_arrivals = itertools.count()
_hooks = TimedWriter("hooks of a task", HOOKS_TIMEOUT, even_late=True)


class Pipeline(Protocol):
    """What a request needs of the worker's main process; ``pipeline.py`` says what each does."""

    runtime: Runtime
    consumer: Any

    def origin_of(self, request: GatedRequest) -> str: ...
    def refusing(self, request: GatedRequest) -> Dependency | None: ...
    def on_submit(self, request: GatedRequest) -> Admission: ...
    def on_start(self, request: GatedRequest) -> None: ...
    def on_begun(self, request: GatedRequest) -> None: ...
    def on_result(self, request: GatedRequest, report: Report) -> None: ...
    def on_deferred(self, request: GatedRequest, deferred: Deferred) -> None: ...
    def on_retried(self, request: GatedRequest) -> None: ...
    def on_death(self, request: GatedRequest, exc: BaseException) -> bool: ...


class ResultNotWrittenError(Exception):
    """A result backend has raised something; the text names its class."""


def write_result(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    try:
        write(*args, **kwargs)
    except Exception as exc:
        raise ResultNotWrittenError(type(exc).__name__) from exc


class GatedRequest(Request):  # type: ignore[misc]  # Celery is untyped
    """A request that passes the gate before the pool, and can be deferred at any time until its end."""

    envelope = Envelope()
    admission: Admission | None = None  # the gate's answer, until the outcome of the run is settled
    deferred = False  # the message has been deferred, or is back in its queue
    dead = False  # the message goes to the dead-letter queue; only that move acknowledges it
    held_since = 0.0  # when it was over its worker's own limit first, monotonic; 0: never
    _left: Any = None  # the prefetch window that was widened for it
    finish: Callable[..., Any] = Request.on_success

    def __init__(self, message: Any, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.arrival = next(_arrivals)
        if HEADER in self._request_dict:  # of which the task is not to know
            self.envelope = Envelope.take(self._request_dict)
            celery_internals.drop_header_of_amqp(self._request_dict, HEADER)
            if self.envelope.exchange:  # resumed straight to its queue
                sent_to = {"exchange": self.envelope.exchange, "routing_key": self.envelope.routing_key}
                self._delivery_info.update(sent_to)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Put our methods before the faster copies in the class that Celery derives for each task."""
        super().__init_subclass__(**kwargs)
        if "execute_using_pool" in cls.__dict__:
            del cls.execute_using_pool
        if "on_success" in cls.__dict__:
            cls.finish = cls.__dict__["on_success"]
            del cls.on_success

    @cached_property
    def pipeline(self) -> Pipeline:
        pipeline: Pipeline = runtime_of(self.app).pipeline
        return pipeline

    @cached_property
    def breakers(self) -> list[Dependency]:
        """The breakers for which the run counts; none if its key is invalid, as the run itself will say."""
        return self.pipeline.runtime.guarding(self.task, self.args, self.kwargs)

    @cached_property
    def guards(self) -> Sequence[Dependency]:
        """The breakers that must admit the run."""
        return with_parents(self.breakers)

    @property
    def context(self) -> Any:
        return self._context

    @property
    def log_fields(self) -> dict[str, str]:
        return about(self.id, self.name, self.task.options.breakers[0])

    @cached_property
    def holder(self) -> str:
        """Who holds the permit of this run. Not the task's id: a broker may deliver one task to two workers."""
        return f"{self.id}:{uuid4().hex}"

    def defers_when_refused(self) -> bool:
        """Whether a refusal needs no pool slot: there is no fallback to run and no error to raise."""
        return self.task.options.on_open == DEFER and not self.task.options.fallback

    @property
    def is_refused(self) -> bool:
        """Whether it is yet to be submitted to the pool, and the gate would defer it at once."""
        waits = self.admission is None and not self.deferred
        return waits and self.defers_when_refused() and self.pipeline.refusing(self) is not None

    @property
    def reported_by(self) -> str:
        """The worker under whose name events of this task are sent; "" if none are."""
        return self.hostname if self._eventer and self._eventer.enabled and self.task.send_events else ""

    def expires_at(self, now: float) -> float:
        """Return the end of ``expires``, which is wall-clock time, on the store's clock; 0 if there is none."""
        if not self.expires:
            return 0.0
        wall = datetime.now(timezone.utc if self.expires.tzinfo else None)
        return now + max(float((self.expires - wall).total_seconds()), 0.0)

    # --- into the pool, and out of it -------------------------------------------------------------

    def execute_using_pool(self, pool: Any, **_: Any) -> Any:
        """Pass the gate and submit the task to the pool; TaskRevokedError if it is not to run now."""
        admission = self.admission = self.pipeline.on_submit(self)
        hard, soft = limits_of(self.task, self.time_limits)
        message = self.type, self.id, self.request_dict, self.body, self.content_type, self.content_encoding
        result = pool.apply_async(
            run_admitted,
            args=(admission, *message),
            accept_callback=self.on_accepted,
            timeout_callback=self.on_timeout,
            callback=self.on_success,
            error_callback=self.on_failure,
            soft_timeout=soft,
            timeout=hard,
            correlation_id=self.id,
        )
        self._apply_result = ref(result) if result is not None else None
        return result

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """Handle the start of the run; TaskRevokedError if it is deferred, its breaker being suspect by now."""
        self.pipeline.on_start(self)
        super().on_accepted(pid, time_accepted)
        self.pipeline.on_begun(self)

    def on_success(self, failed__retval__runtime: tuple[int, Any, float, Report | None], **kwargs: Any) -> Any:
        """Handle what the pool returned: a value, or an exception that Celery has dealt with there."""
        failed, value, runtime, found = failed__retval__runtime
        report = found or WENT_WELL
        self.pipeline.on_result(self, report)
        if report.deferred is not None:
            return self.pipeline.on_deferred(self, report.deferred)
        if report.source:
            self.send_event(TASK_FALLBACK, breaker=report.served_for, source=report.source, age=report.age)
        return self.finish((failed, value, runtime), **kwargs)

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> Any:  # noqa: FBT001, FBT002 - Celery's signature
        exc = exc_info.exception
        if isinstance(exc, ExceptionWithTraceback):
            exc = exc.exc
        if not return_ok and self.pipeline.on_death(self, exc):
            return None
        try:
            return super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        except INVALID_CALLBACKS:
            what = "Task %s[%s] has failed, and its callbacks are invalid"
            logger.exception(what, self.name, self.id, extra=self.log_fields)
            self.acknowledge()

    def on_retry(self, exc_info: Any) -> None:
        """Handle a retry that Celery has sent: another message, which may have been deferred by now."""
        super().on_retry(exc_info)
        self.pipeline.on_retried(self)

    def on_timeout(self, soft: bool, timeout: float) -> None:  # noqa: FBT001 - Celery's signature
        """Handle a time limit; a hard one has been through :meth:`on_failure` already."""
        if soft or not self.deferred:
            super().on_timeout(soft, timeout)

    # --- the message ------------------------------------------------------------------------------

    def withdraw(self) -> None:
        """Keep it from the pool: its message leaves this worker."""
        self.deferred = True
        celery_internals.task_ready(self)

    def leave_window(self) -> bool:
        """Let a message that is held take no place in the prefetch window, as Celery does for one with an ETA.

        False if the broker's window cannot be widened.
        """
        if self.acknowledged:
            return True
        consumer = self.pipeline.consumer
        window, before = consumer.qos, consumer.qos.value
        is_fixed = getattr(consumer, "qos_global", True) is False and not celery_internals.is_emulated(
            consumer.task_consumer.channel
        )
        if before and (is_fixed or window.increment_eventually() <= before):
            return False
        self._left = window
        return True

    def enter_window(self) -> None:
        """Undo :meth:`leave_window`, unless a new connection has brought a new window."""
        window, self._left = self._left, None
        if window is not None and window is self.pipeline.consumer.qos:
            window.decrement_eventually()

    def acknowledge(self) -> None:
        if not self.dead:
            super().acknowledge()

    def reject(self, requeue: bool = False) -> None:  # noqa: FBT001, FBT002 - Celery's signature
        if not self.dead:
            super().reject(requeue)

    # --- an end without a run ---------------------------------------------------------------------

    def fail(self, error: Exception) -> None:
        """Give a task that never ran its FAILURE and its hooks; ResultNotWrittenError: nothing has been done."""
        celery_internals.task_ready(self)
        write_result(
            self.task.backend.mark_as_failure, self.id, error, request=self.context,
            store_result=self.store_errors, call_errbacks=False,
        )  # fmt: skip
        self.send_event("task-failed", exception=safe_repr(error), traceback=None)
        _hooks.write(partial(self._call_hooks, error))

    def revoke(self, reason: str, *, expired: bool) -> None:
        """Give a task that never ran REVOKED, as Celery does on a revoke, or when it has expired; raises as above."""
        celery_internals.task_ready(self)
        write_result(
            self.task.backend.mark_as_revoked, self.id, reason, request=self.context, store_result=self.store_errors
        )
        fields = {"terminated": False, "signum": None, "expired": expired}
        self.send_event("task-revoked", **fields)
        _hooks.write(partial(signals.task_revoked.send, sender=self.task, request=self.context, **fields))

    def _call_hooks(self, error: Exception) -> None:
        try:
            raise error  # Celery's hooks get an error that was raised
        except type(error):
            einfo = ExceptionInfo()
        call = self.id, self.args, self.kwargs
        if self.context.errbacks:
            self._call_hook(celery_internals.call_errbacks, self.task.backend, self.context, error)
        self._call_hook(self.task.on_failure, error, *call, einfo)
        self._call_hook(self.task.after_return, states.FAILURE, error, *call, None)
        send = partial(signals.task_failure.send, task_id=self.id, exception=error, args=self.args, kwargs=self.kwargs)
        self._call_hook(send, sender=self.task, traceback=error.__traceback__, einfo=einfo)

    def _call_hook(self, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            hook(*args, **kwargs)
        except Exception:  # a user's code, which harms no other task
            what = "Task %s[%s] has failed, and its %s as well"
            logger.exception(what, self.name, self.id, getattr(hook, "__name__", "signal"), extra=self.log_fields)


class SupersededError(Exception):
    """A later task with the same key, ``latest``, runs instead."""

    def __init__(self, latest: str) -> None:
        super().__init__(f"superseded by {latest}")
        self.latest = latest


def coalesced_as(request: GatedRequest) -> str:
    """Return what a task has in common with those it may supersede; "" if it may not, because others wait for it."""
    options, context = request.task.options, request.context
    if options.coalesce is None or context.callbacks or context.chain or context.chord or context.group:
        return ""
    call = Call(request.task.name, request.task.run, request.args or (), request.kwargs or {})
    try:
        key = options.coalesce_key and key_of(call, options.coalesce_key)
        text = dumps([call.task_name, call.arguments() if key is None else key], sort_keys=True)
    except Exception as exc:  # noqa: BLE001 - a user's function, or arguments that JSON cannot hold
        what = "Task %s[%s] has no key to be coalesced by: %r"
        logger.warning(what, request.name, request.id, exc, extra=request.log_fields)
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def superseded_among(entries: Sequence[Entry], ledger: Ledger, *, gone: Collection[str] = ()) -> dict[str, str]:
    """Return by the id of a waiting task that of the later one which runs instead, if that is not ``gone``."""
    latest = ledger.claims({entry.envelope.coalesced_as for entry in entries} - {""})
    found = {entry.task_id: latest.get(entry.envelope.coalesced_as, entry.task_id) for entry in entries}
    return {task_id: later for task_id, later in found.items() if later != task_id and later not in gone}
