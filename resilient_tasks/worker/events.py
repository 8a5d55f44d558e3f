"""Task events that are sent outside a worker's event loop, under a worker's name.

Under a worker's name, because events of any other name make ghost workers in Flower.
"""

from __future__ import annotations

import logging
import socket
from contextlib import suppress
from typing import Any

from celery import Celery

from resilient_tasks.worker import seams

logger = logging.getLogger("resilient_tasks")


class Events:
    """Sends events from one thread on a connection of its own, best-effort.

    Args:
        app: the Celery app.
        consumer: a worker's consumer: events are sent as far as it sends any, under its name. None: this process is
            no worker, and events are sent under the name of the worker that has reported the task as deferred.
    """

    def __init__(self, app: Celery, consumer: Any = None) -> None:
        self._app, self._consumer = app, consumer
        self.hostname: str = consumer.hostname if consumer else socket.gethostname()
        self._connection: Any = None
        self._dispatchers: dict[str, Any] = {}
        self._errors = seams.broker_errors(app.connection_for_write())

    def dispatcher(self, reported_by: str) -> Any:
        """Return the event dispatcher for a task that a worker has reported as deferred; None if none is to be used."""
        name, groups = reported_by, None
        if self._consumer is not None:
            own = self._consumer.event_dispatcher
            name, groups = (self.hostname, own.groups) if own is not None and own.enabled else ("", None)
        if name and self._connection is None:
            self._connection = self._app.connection_for_write()
        if name and name not in self._dispatchers:
            self._dispatchers[name] = self._app.events.Dispatcher(
                self._connection, hostname=name, buffer_while_offline=False, groups=groups
            )
        return self._dispatchers.get(name)

    def send(self, kind: str, reported_by: str, **fields: Any) -> None:
        """Send an event about a task that a worker has reported as deferred."""
        try:
            dispatcher = self.dispatcher(reported_by)
            if dispatcher is not None:
                dispatcher.send(kind, **fields)
        except self._errors as exc:  # the task comes first
            logger.warning("event %s was not sent: %s", kind, type(exc).__name__)
            self.close()

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        connection, self._connection = self._connection, None
        dispatchers, self._dispatchers = self._dispatchers, {}
        for closing in (*dispatchers.values(), *filter(None, [connection])):
            with suppress(*self._errors):
                closing.close()
