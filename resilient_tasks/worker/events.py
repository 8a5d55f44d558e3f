"""Task events that are sent outside a worker's event loop, under a worker's name.

Under a worker's name, because events of any other name make ghost workers in Flower.
"""

from __future__ import annotations

import logging
import socket
from abc import ABC, abstractmethod
from contextlib import suppress
from typing import Any

from celery import Celery

from resilient_tasks.worker import seams

logger = logging.getLogger("resilient_tasks")


class EventSender(ABC):
    """Sends events from one thread on a connection of its own, best-effort.

    Attributes:
        hostname: name of this process, for requests that are made of waiting messages.
    """

    hostname: str

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._connection: Any = None
        self._dispatchers: dict[str, Any] = {}
        self._errors = seams.broker_errors(app.connection_for_write())

    @abstractmethod
    def dispatcher(self, teller: str) -> Any:
        """Return the event dispatcher for a task; None if nobody shall tell of it.

        Args:
            teller: name of the worker that has told that the task is deferred; "" if none has.
        """

    def send(self, kind: str, teller: str, **fields: Any) -> None:
        """Send an event about a task of which ``teller`` has told."""
        try:
            dispatcher = self.dispatcher(teller)
            if dispatcher is not None:
                dispatcher.send(kind, **fields)
        except self._errors as exc:  # the task comes first
            logger.warning("event %s was not sent: %s", kind, type(exc).__name__)
            self.close()

    def _dispatcher(self, name: str, **options: Any) -> Any:
        if self._connection is None:
            self._connection = self._app.connection_for_write()
        if name not in self._dispatchers:
            self._dispatchers[name] = self._app.events.Dispatcher(
                self._connection, hostname=name, buffer_while_offline=False, **options
            )
        return self._dispatchers[name]

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        connection, self._connection = self._connection, None
        dispatchers, self._dispatchers = self._dispatchers, {}
        for closing in (*dispatchers.values(), *filter(None, [connection])):
            with suppress(*self._errors):
                closing.close()


class WorkersEvents(EventSender):
    """Sends events as far as this worker sends any, under its name.

    Args:
        app: the Celery app.
        consumer: the worker's consumer, for its name and its event dispatcher.
    """

    def __init__(self, app: Celery, consumer: Any) -> None:
        super().__init__(app)
        self._consumer = consumer
        self.hostname = consumer.hostname

    def dispatcher(self, teller: str) -> Any:  # noqa: ARG002 - this worker is as good
        """Return a dispatcher that resembles the worker's own; None if that sends nothing."""
        own = self._consumer.event_dispatcher
        return self._dispatcher(self.hostname, groups=own.groups) if own is not None and own.enabled else None


class EventsByHand(EventSender):
    """Sends events from a process that is no worker, each under the name of the worker that has told of the task."""

    hostname = socket.gethostname()

    def dispatcher(self, teller: str) -> Any:
        """Return a dispatcher of that name; None if monitors do not know of the task."""
        return self._dispatcher(teller) if teller else None
