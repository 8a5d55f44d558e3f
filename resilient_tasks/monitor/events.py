"""Telling the world that a breaker has moved: one log line, in-process listeners, one Celery event.

The store tells exactly one process in the fleet that it made a transition, and that process calls its
:class:`Announcer`. Everything here is best-effort: whatever goes wrong while telling, the transition
has happened and no task may suffer for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from resilient_tasks.core.model import State, Transition

logger = logging.getLogger("resilient_tasks")

BREAKER_OPENED = "breaker-opened"
BREAKER_HALF_OPENED = "breaker-half-opened"
BREAKER_CLOSED = "breaker-closed"
BREAKER_FORCED_OPEN = "breaker-forced-open"
BREAKER_DISABLED = "breaker-disabled"
BREAKER_SHADOWED = "breaker-shadowed"
BREAKER_WOULD_OPEN = "breaker-would-open"

BREAKER_SUSPECT = "breaker-suspect"
SLOT_ADDED = "worker-slot-added"
SLOT_REMOVED = "worker-slot-removed"

QUEUE_BLOCKED = "queue-blocked"
QUEUE_UNBLOCKED = "queue-unblocked"

TASK_DEFERRED = "task-deferred"
TASK_FALLBACK = "task-fallback"
TASK_IGNORED = "task-ignored"
TASK_RESUMED = "task-retried"
"""Sent just before a message goes back to its queue. A ``task-resumed`` would become a state RESUMED in
Flower, which sticks while the task runs; RETRY is a state that every monitor knows how to leave."""

LONGEST_REASON = 500
"""Most characters of a reason or an actor that are passed on."""

Listener = Callable[[Transition], object]
Send = Callable[..., object]
_ListenerT = TypeVar("_ListenerT", bound=Listener)

_EVENT_OF_STATE = {
    State.OPEN: BREAKER_OPENED,
    State.HALF_OPEN: BREAKER_HALF_OPENED,
    State.CLOSED: BREAKER_CLOSED,
    State.FORCED_OPEN: BREAKER_FORCED_OPEN,
    State.DISABLED: BREAKER_DISABLED,
    State.SHADOW: BREAKER_SHADOWED,
}


class Announcer:
    """Announces the transitions that this process made.

    Args:
        send: ``send(type, **fields)`` sends a Celery event; ``None``: there is nobody to send it.
    """

    def __init__(self, send: Send | None = None) -> None:
        self.send = send
        self._listeners: tuple[Listener, ...] = ()

    def add_listener(self, listener: _ListenerT) -> _ListenerT:
        """Call ``listener`` with every :class:`Transition` that this process makes; also a decorator.

        A listener runs on the thread that made the transition and should return at once. One that raises
        is logged and harms nobody.
        """
        self._listeners = (*self._listeners, listener)
        return listener

    def __call__(self, transition: Transition) -> None:
        """Tell everybody about one transition. Raises nothing."""
        transition = replace(transition, reason=clean(transition.reason), actor=clean(transition.actor))
        event, fields = event_type(transition), event_fields(transition)
        _log(event, fields, transition)
        for listener in self._listeners:
            _notify(listener, transition)
        if self.send is not None:
            _send(self.send, event, fields)


def event_type(transition: Transition) -> str:
    """Return the type of the Celery event that tells of ``transition``."""
    return BREAKER_WOULD_OPEN if transition.would_open else _EVENT_OF_STATE[transition.state]


def event_fields(transition: Transition) -> dict[str, Any]:
    """Return the fields of that event: plain JSON values, with the rate as a share from 0.0 to 1.0."""
    return {
        "breaker": transition.name,
        "epoch": transition.epoch,
        "reason": transition.reason,
        "actor": transition.actor,
        "previous": str(transition.previous),
        "calls": transition.calls,
        "failures": transition.failures,
        "slow": transition.slow,
        "failure_rate": transition.failures / transition.calls if transition.calls else 0.0,
    }


def clean(text: str) -> str:
    """Return ``text`` fit for a log line: reasons are typed by people and may hold anything."""
    printable = "".join(char if char.isprintable() else " " for char in text[: 2 * LONGEST_REASON])
    return " ".join(printable.split())[:LONGEST_REASON]


def _log(event: str, fields: dict[str, Any], transition: Transition) -> None:
    logger.warning(
        "breaker %s: %s -> %s%s%s (%d of %d calls failed, %d slow)",
        transition.name,
        transition.previous,
        "would be OPEN" if transition.would_open else transition.state,
        f" by {transition.actor}" if transition.actor else "",
        f": {transition.reason}" if transition.reason else "",
        transition.failures,
        transition.calls,
        transition.slow,
        extra={"event": event, "state": str(transition.state), **fields},
    )


def _notify(listener: Listener, transition: Transition) -> None:
    try:
        listener(transition)
    except Exception:
        logger.exception("listener %r failed on the transition of breaker %s", listener, transition.name)


def _send(send: Send, event: str, fields: dict[str, Any]) -> None:
    try:
        send(event, **fields)
    except Exception as error:  # noqa: BLE001  whatever a transport may raise
        logger.warning("event %s of breaker %s was not sent: %r", event, fields["breaker"], error)
