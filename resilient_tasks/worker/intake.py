"""What a worker takes in: messages over which kombu or Celery would stumble, and the worker with them, are kept apart.

They lie in ``<namespace>.dead.undecodable``, where ``Resilience.dead_letters`` finds them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.utils.saferepr import saferepr

logger = logging.getLogger("resilient_tasks")

#: Stands where other queues' names have a breaker's.
UNDECODABLE = "undecodable"

_TEXT_OR_NOTHING = (str, type(None))


def flaw_in_envelope(raw: Any) -> str | None:
    """Say what keeps kombu from making a message of what lies in a Redis list; None if nothing does."""
    if not isinstance(raw, dict):
        return "no envelope"
    properties = raw.get("properties")
    if not isinstance(properties, dict) or not isinstance(properties.get("delivery_tag"), str):
        return "no delivery tag"
    info = properties.get("delivery_info")
    if not isinstance(info, dict) or not {"exchange", "routing_key"} <= info.keys():
        return "no delivery info"
    if not isinstance(raw.get("headers"), (dict, type(None))):
        return "headers are no object"
    if not isinstance(raw.get("body"), str):
        return "no body"
    names = ("content-type", "content-encoding")
    odd = [name for name in names if not isinstance(raw.get(name), _TEXT_OR_NOTHING)]
    return f"{odd[0]} is no text" if odd else None


class Intake:
    """Stands before a worker's own handling of task messages, on any broker.

    Args:
        keep: puts a message into the queue of the undecodable, given the reason.
    """

    def __init__(self, keep: Callable[[Any, str], None]) -> None:
        self._keep = keep

    def takes(self, message: Any) -> bool:
        """Whether Celery can look up the message's task; what it cannot is kept apart."""
        flaw = _flaw_in_task(message)
        if flaw is None:
            return True
        logger.error("a message on %s is kept apart: %s", message.delivery_info.get("routing_key"), flaw)
        try:
            self._keep(message, flaw)
        except Exception as exc:  # noqa: BLE001 - whatever a broker raises: it delivers the message again
            logger.warning("it could not be moved: %s", type(exc).__name__)
        return False


def _flaw_in_task(message: Any) -> str | None:
    """Celery looks a task up before it knows whose it is, and writes a FAILURE under the id of an unknown one."""
    fields = message.headers
    if not isinstance(fields, dict):
        return None
    if "task" not in fields:  # of protocol 1, or nothing that Celery takes for a task
        try:
            fields = message.decode()
        except Exception:  # noqa: BLE001 - whatever a decoder raises, Celery knows what to do
            return None
        if not isinstance(fields, dict) or "task" not in fields:
            return None
    for name in ("task", "id"):
        if not isinstance(fields.get(name), str):
            return f"a task's {name} is text, not {saferepr(fields.get(name), maxlen=100)}"
    return None
