"""``Ticket``: what a deferred message says about itself, in one header of its own.

The header travels with the message, so that counting attempts and finding the way back need no
store. The worker takes it off before the task runs: a task's ``request.headers`` are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

HEADER = "x-resilient-tasks"

#: Latest steps that a ticket remembers.
MOST_STEPS = 16

_MOST = 1e17  # no time and no count of ours comes near
_TEXT, _SECONDS, _COUNT, _HISTORY = "text", "seconds", "count", "history"
_KINDS = {
    "breaker": _TEXT, "origin": _TEXT, "reason": _TEXT, "exchange": _TEXT, "routing_key": _TEXT, "coalesced_as": _TEXT,
    "trace": _TEXT, "teller": _TEXT,
    "since": _SECONDS, "attempted_at": _SECONDS, "not_before": _SECONDS, "deadline": _SECONDS, "expires": _SECONDS,
    "died_at": _SECONDS, "attempts": _COUNT, "resumed": _COUNT, "expiration": _COUNT, "history": _HISTORY,
}  # fmt: skip


class Step(NamedTuple):
    """One step of a task's way.

    Args:
        at: when, in seconds on the store's clock.
        what: ``"deferred"``, ``"failed"``, ``"resumed"`` or ``"dead"``.
        cause: what the failure was, e.g. ``"ReadTimeout"``.
    """

    at: float
    what: str
    cause: str = ""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Seconds are on the store's clock; 0 means "not set".

    Args:
        breaker: the breaker the task waits, or waited, for.
        origin: name of the queue it came from and goes back to.
        reason: why it was deferred.
        since: when it was first deferred.
        attempts: dependency failures of its own that counted so far.
        attempted_at: when it last failed.
        not_before: earliest time to resume it.
        deadline: end of its ``defer_for``.
        expires: end of its ``expires``.
        died_at: when it was dead-lettered.
        resumed: epoch of the breaker in which it was last resumed; the ramp lets it pass.
        exchange: the exchange it was sent to, where resuming it goes another way.
        routing_key: what it was sent with, likewise.
        coalesced_as: what it has in common with those of which only the latest runs.
        expiration: AMQP's property of that name, ms: kept here, because the broker would drop a waiting message.
        trace: ``traceparent`` of its first run, or of its first refusal, where somebody traces.
        teller: name of the worker that has told monitors that it waits; "" if none has.
        history: its latest steps, oldest first.
    """

    breaker: str = ""
    origin: str = ""
    reason: str = ""
    since: float = 0.0
    attempts: int = 0
    attempted_at: float = 0.0
    not_before: float = 0.0
    deadline: float = 0.0
    expires: float = 0.0
    died_at: float = 0.0
    resumed: int = 0
    exchange: str = ""
    routing_key: str = ""
    coalesced_as: str = ""
    expiration: int = 0
    trace: str = ""
    teller: str = ""
    history: tuple[Step, ...] = ()

    @classmethod
    def read(cls, headers: object) -> Ticket:
        """Return the ticket in ``headers``; an empty one if there is none or it makes no sense."""
        raw = headers.get(HEADER) if isinstance(headers, Mapping) else None
        if raw is None:  # nearly every message there is
            return _NO_TICKET
        if not isinstance(raw, Mapping) or not all(_valid(kind, raw.get(name)) for name, kind in _KINDS.items()):
            return _NO_TICKET
        values = {name: raw[name] for name in _KINDS if raw.get(name) is not None}
        return cls(**{**values, "history": tuple(Step(*step) for step in values.get("history", ()))})

    @classmethod
    def take(cls, headers: MutableMapping[str, Any]) -> Ticket:
        """Like :meth:`read`, and remove it from ``headers``."""
        ticket = cls.read(headers)
        headers.pop(HEADER, None)
        return ticket

    def write(self, headers: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``headers`` with this ticket in place of any other."""
        return {**headers, HEADER: {name: value for name in _KINDS if (value := getattr(self, name))}}

    @property
    def ends_at(self) -> float | None:
        """When the wait ends at the latest: ``defer_for`` or ``expires``, whichever is first."""
        return min((end for end in (self.deadline, self.expires) if end), default=None)

    def begin(self, at: float, defer_for: float | None, coalesced_as: str = "") -> Ticket:
        """Return the ticket of a task that waits from now on, at most ``defer_for`` seconds, unless it did already."""
        if self.since:
            return self
        deadline = at + defer_for if defer_for else 0.0
        return replace(self, since=at, deadline=deadline, coalesced_as=coalesced_as)

    def defer(self, at: float, cause: str = "") -> Ticket:
        """Return the ticket of the same task put aside; ``cause`` tells that, and why, it has failed."""
        return self._after(Step(at, "failed" if cause else "deferred", cause), resumed=0, died_at=0.0)

    def resume(self, epoch: int, at: float) -> Ticket:
        """Return the ticket of the same task on its way back to the origin queue."""
        return self._after(Step(at, "resumed"), resumed=epoch, died_at=0.0)

    def die(self, at: float, reason: str, cause: str = "") -> Ticket:
        """Return the ticket of the same task on its way to the dead-letter queue."""
        return self._after(Step(at, "dead", cause), reason=reason, resumed=0, died_at=at)

    def _after(self, step: Step, **changes: Any) -> Ticket:
        step = step._replace(at=round(step.at, 3))  # the header travels with every message
        return replace(self, history=(*self.history, step)[-MOST_STEPS:], **changes)


_NO_TICKET = Ticket()

assert _KINDS.keys() == {item.name for item in fields(Ticket)}, "every field of Ticket needs a kind"  # noqa: S101


def _valid(kind: str, value: object) -> bool:
    if value is None:
        return True
    if kind == _TEXT:
        return isinstance(value, str)
    if kind == _HISTORY:
        return isinstance(value, (list, tuple)) and len(value) <= MOST_STEPS and all(map(_is_step, value))
    if isinstance(value, bool) or not isinstance(value, int if kind == _COUNT else (int, float)):
        return False
    return 0 <= value < _MOST  # neither NaN nor infinity is


def _is_step(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != len(Step._fields) or None in value:
        return False
    return all(map(_valid, (_SECONDS, _TEXT, _TEXT), value))
