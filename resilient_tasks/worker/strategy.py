"""``gated``: the execution strategy of guarded tasks, Celery's default one behind the gate."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import Celery
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
        ticket = Ticket.read(message.headers)
        host.gate.took_up(ticket)
        if body is None and host.gate.refuses_now(breaker, ticket) and "args" not in message.payload:
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
        request.put_aside(str(host.gate.refusal(breaker)))

    return handle_message
