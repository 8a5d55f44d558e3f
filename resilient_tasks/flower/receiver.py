"""``SoundReceiver``: Flower hears no events that make no sense.

One of them ends the connection on which Flower listens, and what others tell until it has another one is lost.
"""

from __future__ import annotations

import logging
import math
from typing import Any

from resilient_tasks.flower import seams
from resilient_tasks.monitor.log import Throttle

logger = logging.getLogger("resilient_tasks")

_TEXTS = (
    "name", "args", "kwargs", "result", "exception", "traceback", "eta", "expires", "queue", "exchange", "routing_key",
    "root_id", "parent_id", "state", "sw_ident", "sw_ver", "sw_sys",
)  # fmt: skip
_NUMBERS = ("utcoffset", "pid", "retries", "runtime", "freq", "active", "processed")
_LATEST = 1e12  # seconds, clock ticks; no calendar goes so far
_MOST_LINES, _INTERVAL = 10, 60.0  # in the log


class SoundReceiver(seams.EventReceiver):
    """Celery's receiver, which leaves out and logs what is no event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines = Throttle(_MOST_LINES, _INTERVAL)

    def _receive(self, body: Any, message: Any, **_: Any) -> None:
        for event in body if isinstance(body, list) else [body]:
            if _is_sound(event):
                super()._receive(event, message)
            else:
                self._tell(event)

    def _tell(self, event: Any) -> None:
        for count in self._lines.take_suppressed().values():
            logger.warning("%d more events made no sense", count)
        if self._lines.admits(""):
            logger.warning("an event makes no sense: %.200r", event)


def _is_sound(event: Any) -> bool:
    """Whether Celery's memory of events, and Flower's pages, can make something of an event."""
    if not isinstance(event, dict):
        return False
    needed = ("type", "hostname", "uuid") if str(event.get("type")).startswith("task-") else ("type", "hostname")
    return (
        all(isinstance(event.get(field), str) for field in needed)
        and all(_is_number(event.get(field)) for field in ("timestamp", "clock"))
        and all(isinstance(event.get(field), (str, type(None))) for field in _TEXTS)
        and all(event.get(field) is None or _is_number(event[field]) for field in _NUMBERS)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _LATEST
