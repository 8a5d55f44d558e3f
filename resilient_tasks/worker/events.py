"""Task events that are sent outside the worker's event loop, under the worker's name."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

from celery import Celery

logger = logging.getLogger("resilient_tasks")


class EventSender:
    """Sends events from one thread on a connection of its own, as far as the worker sends any.

    Under the worker's name, because events of any other name make ghost workers in Flower.
    """

    def __init__(self, app: Celery, consumer: Any) -> None:
        self._app = app
        self._consumer = consumer
        self._dispatcher: Any = None

    def dispatcher(self) -> Any:
        """Return the event dispatcher; None if the worker sends no events."""
        worker_events = self._consumer.event_dispatcher
        if worker_events is None or not worker_events.enabled:
            return None
        if self._dispatcher is None:
            self._dispatcher = self._app.events.Dispatcher(
                self._app.connection_for_write(),
                hostname=self._consumer.hostname,
                groups=worker_events.groups,
                buffer_while_offline=False,
            )
        return self._dispatcher

    def send(self, kind: str, **fields: Any) -> None:
        """Send an event, best-effort."""
        try:
            dispatcher = self.dispatcher()
            if dispatcher is not None:
                dispatcher.send(kind, **fields)
        except Exception as exc:  # noqa: BLE001 - whatever the broker raises, the task comes first
            logger.warning("event %s was not sent: %s", kind, type(exc).__name__)
            self.close()

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        dispatcher, self._dispatcher = self._dispatcher, None
        if dispatcher is not None:
            with suppress(Exception):
                dispatcher.close()
                dispatcher.connection.close()
