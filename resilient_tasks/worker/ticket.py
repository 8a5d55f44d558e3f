"""``Ticket``: what a deferred message says about itself, in one header of its own.

The header travels with the message, so that counting attempts and finding the way back need no
store. The worker takes it off before the task runs: a task's ``request.headers`` are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple

from pydantic import Field, Strict, TypeAdapter, ValidationError

HEADER = "x-resilient-tasks"

#: Seconds between the runs of a task whose body is refused: twice as many each time.
SHORTEST_BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0
#: Latest steps that a ticket remembers.
MOST_STEPS = 16

_MOST = 10**17  # no time and no count of ours comes near
_Text = Annotated[str, Strict()]
_Seconds = Annotated[float, Field(ge=0, lt=_MOST, allow_inf_nan=False, strict=True)]
_Count = Annotated[int, Field(ge=0, lt=_MOST, strict=True)]


class Step(NamedTuple):
    """One step of a task's way.

    Args:
        at: when, in seconds on the store's clock.
        what: ``"deferred"``, ``"failed"``, ``"resumed"`` or ``"dead"``.
        cause: what the failure was, e.g. ``"ReadTimeout"``.
    """

    at: _Seconds
    what: _Text
    cause: _Text = ""


@dataclass(frozen=True, slots=True)
class Ticket:
    """What the header says. Seconds are on the store's clock; 0 means "not set"."""

    breaker: _Text = ""  # the one the task waits, or waited, for
    origin: _Text = ""  # name of the queue it came from and goes back to
    reason: _Text = ""  # why it was deferred, or dead-lettered
    since: _Seconds = 0.0  # when it was first deferred
    attempts: _Count = 0  # dependency failures of its own that counted so far
    attempted_at: _Seconds = 0.0  # when it last failed
    not_before: _Seconds = 0.0  # earliest time to resume it
    deadline: _Seconds = 0.0  # end of its ``defer_for``
    expires: _Seconds = 0.0  # end of its ``expires``
    died_at: _Seconds = 0.0  # when it was dead-lettered
    resumed: _Count = 0  # epoch of the breaker in which it was last resumed; the ramp lets it pass
    exchange: _Text = ""  # what it was sent to, where resuming it goes another way
    routing_key: _Text = ""  # what it was sent with, likewise
    coalesced_as: _Text = ""  # what it has in common with those of which only the latest runs
    expiration: _Count = 0  # AMQP's property, ms: kept here, because the broker would drop a waiting message
    trace: _Text = ""  # ``traceparent`` of its first run, or of its first refusal, where somebody traces
    teller: _Text = ""  # name of the worker that has reported its deferral to monitors; "" if none has
    history: Annotated[tuple[Step, ...], Field(max_length=MOST_STEPS)] = ()  # its latest steps, oldest first

    @classmethod
    def read(cls, headers: object) -> Ticket:
        """Return the ticket in ``headers``; an empty one if there is none or it makes no sense."""
        raw = headers.get(HEADER) if isinstance(headers, Mapping) else None
        if raw is None:  # nearly every message there is
            return _NO_TICKET
        try:
            return _DECODER.validate_python(raw)
        except ValidationError:
            return _NO_TICKET

    @classmethod
    def take(cls, headers: MutableMapping[str, Any]) -> Ticket:
        """Like :meth:`read`, and remove it from ``headers``."""
        ticket = cls.read(headers)
        headers.pop(HEADER, None)
        return ticket

    def write(self, headers: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``headers`` with this ticket in place of any other."""
        return {**headers, HEADER: {name: value for name in _FIELDS if (value := getattr(self, name))}}

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

    def back_off(self) -> float:
        """Return for how many seconds to defer a task that is refused again and again, each time inside its body."""
        deferrals = sum(step.what == "deferred" for step in self.history)
        return float(min(SHORTEST_BACK_OFF * 2**deferrals, LONGEST_BACK_OFF))

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
_FIELDS = tuple(field.name for field in fields(Ticket))
_DECODER = TypeAdapter(Ticket)
