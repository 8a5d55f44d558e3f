"""``gated``: the execution strategy of guarded tasks, Celery's default one behind the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from celery.worker.strategy import default

from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.ticket import Ticket

logger = logging.getLogger("resilient_tasks")

Handler = Callable[..., Any]


def gated(task: Any, app: Celery, consumer: Any) -> Handler:
    """Return the message handler of a guarded task (Celery's ``Task.Strategy``).

    What the breaker refuses is deferred there and then: it takes no pool slot and no place in the
    prefetch window. Everything else goes on untouched to Celery's own strategy.
    """
    runtime = runtime_of(app)
    host = runtime.host
    breaker = runtime.breakers[task.options.breaker]
    handle = default(task, app, consumer)

    def handle_message(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        _check(message, body)
        ticket = Ticket.read(message.headers)
        if ticket.breaker in runtime.breakers:  # strangers may write tickets, too
            host.gate.took_up(ticket)
        is_protocol_2 = body is None and "args" not in message.payload
        if is_protocol_2 and host.gate.refuses_now(breaker, ticket, message.headers["id"]):
            request = task_request(message, ack, reject)
            if request.defers_when_refused() and not request.eta:
                return defer_at_once(request)
        return handle(message, body, ack, reject, callbacks, **kwargs)

    def task_request(message: Any, ack: Any, reject: Any) -> GatedRequest:
        return GatedRequest(
            message, on_ack=ack, on_reject=reject, app=app, hostname=consumer.hostname, task=task,
            eventer=consumer.event_dispatcher, connection_errors=consumer.connection_errors,
            body=message.body, headers=message.headers, decoded=False, utc=app.uses_utc_timezone(),
        )  # fmt: skip

    def defer_at_once(request: GatedRequest) -> None:
        if request.revoked():  # or expired: Celery has settled it
            return
        request.send_event(
            "task-received", name=request.name, args=request.argsrepr, kwargs=request.kwargsrepr,
            root_id=request.root_id, parent_id=request.parent_id, retries=request.request_dict.get("retries", 0),
            eta=None, expires=request.expires and request.expires.isoformat(),
        )  # fmt: skip
        request.put_aside(str(breaker.refusal()))

    return handle_message


def _check(message: Any, body: Any) -> None:
    """Refuse a message over which Celery would stumble, and the whole worker with it.

    Raises:
        InvalidTaskError: something in it makes no sense; Celery then logs and rejects the message.
        DecodeError: the payload cannot be read; Celery then logs and acknowledges it.
    """
    headers, payload = message.headers if body is None else body, message.payload
    for name, accepts, allowed in _HEADERS:
        if not accepts(headers.get(name)):
            raise InvalidTaskError(f"a task's {name} is {allowed}, not {saferepr(headers.get(name), maxlen=100)}")
    if body is None and not _is_call(payload):
        raise InvalidTaskError(f"a task's payload is [args, kwargs, options], not {saferepr(payload, maxlen=100)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_moment(value: Any) -> bool:
    return value is None or _is_text(value)


def _are_limits(value: Any) -> bool:
    if not value:
        return True
    pair = isinstance(value, (list, tuple)) and len(value) == 2  # noqa: PLR2004 - a pair
    return pair and all(isinstance(limit, (int, float, type(None))) for limit in value)


_HEADERS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("id", _is_text, "text"),
    ("eta", _is_moment, "text or None"),
    ("expires", _is_moment, "text or None"),
    ("timelimit", _are_limits, "two numbers or None"),
)


def _is_call(payload: Any) -> bool:
    if isinstance(payload, dict):
        return "args" in payload  # of Celery 3
    if not isinstance(payload, (list, tuple)) or len(payload) != 3:  # noqa: PLR2004 - the three below
        return False
    args, kwargs, options = payload
    return isinstance(args, (list, tuple)) and isinstance(kwargs, dict) and isinstance(options, (dict, type(None)))
