"""Names and fields of events: a transition's log line and Celery event, and what happens to tasks; fields of log lines.

Exactly one process in the fleet makes a transition; it logs it, calls the receivers of its signal and sends its event.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from resilient_tasks.core.model import State, Transition

logger = logging.getLogger("resilient_tasks")

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
Flower, which stays while the task runs; every monitor replaces RETRY by the next state."""

LONGEST_REASON = 500
"""Most characters of a reason or an actor that are passed on."""

_EVENT_OF_STATE = {
    State.OPEN: "breaker-opened",
    State.HALF_OPEN: "breaker-half-opened",
    State.CLOSED: "breaker-closed",
    State.FORCED_OPEN: "breaker-forced-open",
    State.DISABLED: "breaker-disabled",
    State.SHADOW: "breaker-shadowed",
}


def log(transition: Transition) -> Transition:
    """Log a transition, with its event's fields on the record; return it with reason and actor fit for one line."""
    transition = replace(transition, reason=clean(transition.reason), actor=clean(transition.actor))
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
        extra={"event": event_type(transition), "state": str(transition.state), **event_fields(transition)},
    )
    return transition


def event_type(transition: Transition) -> str:
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


# --- log lines ------------------------------------------------------------------------------------------


def about(task_id: str, task: str, breaker: str = "") -> dict[str, str]:
    """Return the structured fields of a line about a task, which may wait for a breaker, for ``extra=``."""
    fields = {"task_id": task_id, "task": task}
    return {**fields, "breaker": breaker} if breaker else fields


class Throttle:
    """Lets ``most`` lines of a kind pass in each interval, in seconds, and counts the others; for several threads."""

    def __init__(self, most: int, interval: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._interval, self._clock = most, interval, clock
        self._lock = threading.Lock()
        self._began: dict[str, float] = {}
        self._seen: Counter[str] = Counter()

    def admits(self, kind: str) -> bool:
        with self._lock:
            self._began.setdefault(kind, self._clock())
            self._seen[kind] += 1
            return self._seen[kind] <= self._most

    def take_suppressed(self, *, early: bool = False) -> dict[str, int]:
        """End the intervals that are over, or all; return how many lines of each kind did not pass in them, if any."""
        with self._lock:
            over = [kind for kind, began in self._began.items() if early or self._clock() >= began + self._interval]
            for kind in over:
                del self._began[kind]
            seen = {kind: self._seen.pop(kind) for kind in over}
        return {kind: count - self._most for kind, count in seen.items() if count > self._most}
