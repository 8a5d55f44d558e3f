"""``gated``: the execution strategy of guarded tasks, Celery's default one behind the gate."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default

from resilient_tasks.worker.envelope import Ticket, check_task
from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.runtime import runtime_of

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency

logger = logging.getLogger("resilient_tasks")

#: Seconds until a message is tried again that could not be handled.
RETRY_INTERVAL = 1.0


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
        check_task(message.headers if body is None else body, message.payload)
        try:
            handled = self._take(message, body, ack, reject)
        except InvalidTaskError:
            raise  # Celery logs and rejects the message
        except Exception:  # a bug of ours ends no worker: the message stays with the broker, and is tried again
            logger.exception("a message for %s cannot be handled yet", self._task.name)
            self._consumer.qos.increment_eventually()  # as for a task with an ETA: it holds up no other
            again = message, body, ack, reject, callbacks
            self._consumer.timer.call_after(RETRY_INTERVAL, self._try_again, again, kwargs)
            return None
        return None if handled else self._go_on(message, body, ack, reject, callbacks, **kwargs)

    def _try_again(self, *args: Any, **kwargs: Any) -> None:
        self._consumer.qos.decrement_eventually()
        self(*args, **kwargs)

    def _take(self, message: Any, body: Any, ack: Any, reject: Any) -> bool:
        """Defer a message that a breaker refuses; False if Celery's own strategy is to handle it."""
        ticket = Ticket.read(message.headers)
        if ticket.resumed and self._runtime.defines(ticket.breaker):  # others may write tickets, too
            self._gate.took_up(ticket)
        guards = self._guards(message) if body is None and "args" not in message.payload else []
        refusing = self._gate.refusing(guards, ticket, message.headers["id"]) if guards else None
        limiting = self._compensation.limiting(guards) if refusing is None else None
        if refusing is None and limiting is None:
            return False
        request = self._request(message, ack, reject)
        if request.eta or (limiting is None and not request.defers_when_refused()):
            return False
        self._defer(request, refusing, limiting)
        return True

    def _guards(self, message: Any) -> list[Dependency]:
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
    def _defer(request: GatedRequest, refusing: Dependency | None, limiting: Dependency | None) -> None:
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
