"""``gated``: the execution strategy of guarded tasks, Celery's default one behind the gate."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from celery.worker.strategy import default

from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.ticket import Ticket

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker

_SURROGATES = re.compile("[\ud800-\udfff]")


class gated:  # noqa: N801 - Celery knows strategies as functions
    """The message handler of a guarded task (Celery's ``Task.Strategy``).

    What the breaker refuses is deferred there and then: it takes no pool slot and no place in the
    prefetch window. Everything else goes on untouched to Celery's own strategy.
    """

    def __init__(self, task: Any, app: Celery, consumer: Any) -> None:
        self._task, self._app, self._consumer = task, app, consumer
        self._runtime = runtime_of(app)
        self._runtime.host.attach(consumer)
        self._gate, self._compensation = self._runtime.host.gate, self._runtime.host.compensation
        self._go_on = default(task, app, consumer)

    def __call__(self, message: Any, body: Any, ack: Any, reject: Any, callbacks: Any, **kwargs: Any) -> Any:
        """Handle one message that has just arrived."""
        _check(message, body)
        ticket = Ticket.read(message.headers)
        if ticket.resumed and self._runtime.defines(ticket.breaker):  # strangers may write tickets, too
            self._gate.took_up(ticket)
        guards = self._guards(message) if body is None and "args" not in message.payload else []
        refusing = self._gate.refusing(guards, ticket, message.headers["id"]) if guards else None
        limiting = self._compensation.limiting(guards) if refusing is None else None
        if refusing is not None or limiting is not None:
            request = self._request(message, ack, reject)
            if not request.eta and (limiting is not None or request.defers_when_refused()):
                return self._defer(request, refusing, limiting)
        return self._go_on(message, body, ack, reject, callbacks, **kwargs)

    def _guards(self, message: Any) -> list[Breaker]:
        args, kwargs, _ = message.payload
        return self._runtime.guards_of(self._task, args, kwargs)

    def _request(self, message: Any, ack: Any, reject: Any) -> GatedRequest:
        return GatedRequest(
            message,
            on_ack=ack,
            on_reject=reject,
            app=self._app,
            task=self._task,
            hostname=self._consumer.hostname,
            eventer=self._consumer.event_dispatcher,
            connection_errors=self._consumer.connection_errors,
            body=message.body,
            headers=message.headers,
            decoded=False,
            utc=self._app.uses_utc_timezone(),
        )

    @staticmethod
    def _defer(request: GatedRequest, refusing: Breaker | None, limiting: Breaker | None) -> None:
        if request.revoked():  # or expired: Celery has settled it
            return
        request.send_event(
            "task-received",
            name=request.name,
            args=request.argsrepr,
            kwargs=request.kwargsrepr,
            root_id=request.root_id,
            parent_id=request.parent_id,
            retries=request.request_dict.get("retries", 0),
            eta=None,
            expires=request.expires and request.expires.isoformat(),
        )
        if refusing is not None:
            request.put_aside(refusing.name, str(refusing.refuse()))
        elif limiting is not None:
            request.make_way(limiting)


def _check(message: Any, body: Any) -> None:
    """Refuse a message over which Celery would stumble, and the whole worker with it.

    Raises:
        InvalidTaskError: something in it makes no sense; Celery then logs and rejects the message.
        DecodeError: the payload cannot be read; Celery then logs and acknowledges it.
    """
    headers, payload = message.headers if body is None else body, message.payload
    for name, accepts, allowed in _HEADERS:
        value = headers.get(name)
        if value is not None and not accepts(value):  # nobody without an id comes as far as this
            raise InvalidTaskError(f"a task's {name} is {allowed}, not {saferepr(value, maxlen=100)}")
    if body is None and not _is_call(payload):
        raise InvalidTaskError(f"a task's payload is [args, kwargs, options], not {saferepr(payload, maxlen=100)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(value: Any) -> bool:
    return _is_text(value) and (value.isascii() or _SURROGATES.search(value) is None)  # it becomes part of a key


def _are_limits(value: Any) -> bool:
    if not value:
        return True
    pair = isinstance(value, (list, tuple)) and len(value) == 2  # noqa: PLR2004 - a pair
    return pair and all(isinstance(limit, (int, float, type(None))) for limit in value)


def _is_name(value: Any) -> bool:
    return not value or isinstance(value, str)


def _are_stamps(value: Any) -> bool:
    return not value or isinstance(value, dict)


def _are_texts(value: Any) -> bool:
    return not value or (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value))


_HEADERS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("id", _is_id, "text"),
    ("shadow", _is_name, "text or None"),
    ("eta", _is_text, "text or None"),
    ("expires", _is_text, "text or None"),
    ("timelimit", _are_limits, "two numbers or None"),
    ("stamps", _are_stamps, "an object or None"),
    ("stamped_headers", _are_texts, "a list of texts or None"),
)


def _is_call(payload: Any) -> bool:
    if isinstance(payload, dict):
        return "args" in payload  # of Celery 3
    if not isinstance(payload, (list, tuple)) or len(payload) != 3:  # noqa: PLR2004 - the three below
        return False
    args, kwargs, options = payload
    return isinstance(args, (list, tuple)) and isinstance(kwargs, dict) and isinstance(options, (dict, type(None)))
