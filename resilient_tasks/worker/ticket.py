"""``Ticket``: what a deferred message says about itself, in one header of its own.

The header travels with the message, so that counting attempts and finding the way back need no
store. The worker takes it off before the task runs: a task's ``request.headers`` are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

HEADER = "x-resilient-tasks"

_MOST = 1e17  # no time and no count of ours comes near
_TEXT, _SECONDS, _COUNT = "text", "seconds", "count"
_KINDS = {
    "breaker": _TEXT, "origin": _TEXT, "reason": _TEXT, "exchange": _TEXT, "routing_key": _TEXT,
    "since": _SECONDS, "attempted_at": _SECONDS, "not_before": _SECONDS, "deadline": _SECONDS,
    "attempts": _COUNT, "resumed": _COUNT,
}  # fmt: skip


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
        resumed: epoch of the breaker in which it was last resumed; the ramp lets it pass.
        exchange: the exchange it was sent to, where resuming it goes another way.
        routing_key: what it was sent with, likewise.
    """

    breaker: str = ""
    origin: str = ""
    reason: str = ""
    since: float = 0.0
    attempts: int = 0
    attempted_at: float = 0.0
    not_before: float = 0.0
    deadline: float = 0.0
    resumed: int = 0
    exchange: str = ""
    routing_key: str = ""

    @classmethod
    def read(cls, headers: object) -> Ticket:
        """Return the ticket in ``headers``; an empty one if there is none or it makes no sense."""
        raw = headers.get(HEADER) if isinstance(headers, Mapping) else None
        if raw is None:  # nearly every message there is
            return _NO_TICKET
        if not isinstance(raw, Mapping) or not all(_valid(kind, raw.get(name)) for name, kind in _KINDS.items()):
            return _NO_TICKET
        return cls(**{name: raw[name] for name in _KINDS if raw.get(name) is not None})

    @classmethod
    def take(cls, headers: MutableMapping[str, Any]) -> Ticket:
        """Like :meth:`read`, and remove it from ``headers``."""
        ticket = cls.read(headers)
        headers.pop(HEADER, None)
        return ticket

    def write(self, headers: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``headers`` with this ticket in place of any other."""
        return {**headers, HEADER: {name: value for name, value in asdict(self).items() if value}}

    def resume(self, epoch: int) -> Ticket:
        """Return the ticket of the same task on its way back to the origin queue."""
        return replace(self, resumed=epoch)


_NO_TICKET = Ticket()

assert _KINDS.keys() == {item.name for item in fields(Ticket)}, "every field of Ticket needs a kind"  # noqa: S101


def _valid(kind: str, value: object) -> bool:
    if value is None:
        return True
    if kind == _TEXT:
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if kind == _COUNT else (int, float)):
        return False
    return 0 <= value < _MOST  # neither NaN nor infinity is
