"""Reading messages: our deferral header, and what kombu and Celery make of the rest.

The deferral header travels with the message, so that counting attempts and finding the way back need no store.
The worker removes it before the task runs: a task's ``request.headers`` are what they were.

What is no task's message, or cannot be decoded, would end the worker in kombu or Celery. It is dead-lettered whole: in
``<namespace>.dead.undecodable``, or in the dead-letter queue of the breaker in whose deferred queue it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, NamedTuple, TypeVar

from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from kombu.exceptions import DecodeError
from pydantic import BaseModel, ConfigDict, Field, Strict, TypeAdapter, ValidationError

HEADER = "x-resilient-tasks"
#: Replaces a breaker's name in the name of the queue for what cannot be decoded.
UNDECODABLE = "undecodable"

#: Seconds between the runs of a task whose body is refused: twice as many each time.
SHORTEST_BACK_OFF, LONGEST_BACK_OFF = 0.5, 30.0
#: Latest steps that an envelope remembers.
MOST_STEPS = 16

_MOST = 10**17  # no time and no count of ours comes near
_Text = Annotated[str, Strict()]
_Seconds = Annotated[float, Field(ge=0, lt=_MOST, allow_inf_nan=False, strict=True)]
_Limit = float | None
_Count = Annotated[int, Field(ge=0, lt=_MOST, strict=True)]

_OBJECT, _TEXT = (dict, type(None)), (str, type(None))

Decoded = TypeVar("Decoded")


class Step(NamedTuple):
    """One step of a task's way."""

    at: _Seconds  # on the store's clock
    what: _Text  # "deferred", "failed", "resumed" or "dead"
    cause: _Text = ""  # what the failure was, e.g. "ReadTimeout"


@dataclass(frozen=True, slots=True)
class Envelope:
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
    trace: _Text = ""  # ``traceparent`` of its first run, or of its first refusal, where calls are traced
    # name of the worker that has reported its deferral to monitors; "" if none has; in the header it is ``teller``
    reported_by: Annotated[_Text, Field(alias="teller")] = ""
    history: Annotated[tuple[Step, ...], Field(max_length=MOST_STEPS)] = ()  # its latest steps, oldest first

    @classmethod
    def read(cls, headers: object) -> Envelope:
        """Return the envelope in ``headers``; an empty one if there is none or it is invalid."""
        raw = headers.get(HEADER) if isinstance(headers, dict) else None
        if raw is None:  # nearly every message there is
            return _NO_ENVELOPE
        try:
            return _DECODER.validate_python(raw)
        except ValidationError:
            return _NO_ENVELOPE

    @classmethod
    def take(cls, headers: MutableMapping[str, Any]) -> Envelope:
        """Like :meth:`read`, and remove it from ``headers``."""
        return cls.read({HEADER: headers.pop(HEADER, None)})

    def write(self, headers: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``headers`` with this envelope in place of any other."""
        known = ((_IN_HEADER.get(name, name), getattr(self, name)) for name in _FIELDS)
        return {**headers, HEADER: {name: value for name, value in known if value}}

    @property
    def ends_at(self) -> float | None:
        """When the wait ends at the latest: ``defer_for`` or ``expires``, whichever is first."""
        return min((end for end in (self.deadline, self.expires) if end), default=None)

    def begin(self, at: float, defer_for: float | None, coalesced_as: str = "") -> Envelope:
        """Return the envelope of a task that waits from now on, ``defer_for`` seconds at most, unless it did."""
        if self.since:
            return self
        deadline = at + defer_for if defer_for else 0.0
        return replace(self, since=at, deadline=deadline, coalesced_as=coalesced_as)

    def defer(self, at: float, cause: str = "") -> Envelope:
        return self._after(Step(at, "failed" if cause else "deferred", cause), resumed=0, died_at=0.0)

    def back_off(self) -> float:
        """Return for how many seconds to defer a task that is refused again and again, each time inside its body."""
        deferrals = sum(step.what == "deferred" for step in self.history)
        return float(min(SHORTEST_BACK_OFF * 2**deferrals, LONGEST_BACK_OFF))

    def resume(self, epoch: int, at: float) -> Envelope:
        return self._after(Step(at, "resumed"), resumed=epoch, died_at=0.0)

    def dead_letter(self, at: float, reason: str, cause: str = "") -> Envelope:
        return self._after(Step(at, "dead", cause), reason=reason, resumed=0, died_at=at)

    def _after(self, step: Step, **changes: Any) -> Envelope:
        step = step._replace(at=round(step.at, 3))  # the header travels with every message
        return replace(self, history=(*self.history, step)[-MOST_STEPS:], **changes)


_NO_ENVELOPE = Envelope()
_FIELDS = tuple(field.name for field in fields(Envelope))
_IN_HEADER = {"reported_by": "teller"}  # names of fields on the wire that are not those of the class
_DECODER = TypeAdapter(Envelope)


def without_envelope(headers: Mapping[str, Any]) -> dict[str, Any]:
    headers = dict(headers)
    Envelope.take(headers)
    return headers


# --- the rest of a message ------------------------------------------------------------------------------


def decode(decoder: Callable[..., Decoded], *args: Any) -> Decoded:
    """Return what a decoder of kombu's makes of ``args``, or raise DecodeError; no code of ours may run inside it.

    The error's text names the class of the decoder's error, whose own text may hold secrets.
    """
    try:
        return decoder(*args)
    except Exception as exc:
        raise DecodeError(f"the message cannot be decoded: {type(exc).__name__}") from exc


def decode_raw(decoder: Callable[[bytes], Any], text: bytes) -> dict[str, Any]:
    """Return the object in a Redis list of which kombu makes a message, or raise DecodeError."""
    raw = decode(decoder, text)
    match raw:
        case {"body": str(), "properties": {"delivery_tag": str(), "delivery_info": {"exchange": _, "routing_key": _}}}:
            texts = (raw.get("content-type"), raw.get("content-encoding"))
            if isinstance(raw.get("headers"), _OBJECT) and all(isinstance(each, _TEXT) for each in texts):
                return dict(raw)
    raise DecodeError("it is no message of kombu's")


def payload_of(message: Any) -> Any:
    return decode(getattr, message, "payload")


def task_fields(message: Any) -> Mapping[str, Any]:
    """Return the fields in which a message names its task: its headers, or the body of message protocol 1."""
    headers: Mapping[str, Any] = message.headers if isinstance(message.headers, dict) else {}
    if "task" in headers:
        return headers
    payload = payload_of(message)
    return payload if isinstance(payload, dict) else headers


def flaw_in_task(message: Any) -> str | None:
    """Say what keeps Celery from looking up a message's task; None if nothing does, or it is no task's.

    Celery looks a task up before it knows whose it is, and writes a FAILURE under the id of an unknown one.
    """
    try:
        fields = task_fields(message) if isinstance(message.headers, dict) else {}
    except DecodeError:  # Celery handles it
        return None
    wrong = [name for name in ("task", "id") if "task" in fields and not isinstance(fields.get(name), str)]
    return f"a task's {wrong[0]} is text, not {saferepr(fields.get(wrong[0]), maxlen=100)}" if wrong else None


class _TaskFields(BaseModel):
    """What Celery's ``Request`` needs of a message's fields."""

    model_config = ConfigDict(strict=True)

    id: str = Field(min_length=1)  # without lone surrogates: it becomes part of a key
    shadow: str | None = None
    eta: str | None = None
    expires: str | None = None
    timelimit: Annotated[list[_Limit], Field(min_length=2, max_length=2)] | tuple[_Limit, _Limit] | None = None
    stamps: dict[Any, Any] | None = None
    stamped_headers: list[str] | tuple[str, ...] | None = None


def check_task(fields: Mapping[str, Any], payload: Any) -> None:
    """Raise InvalidTaskError for a message on which Celery's ``Request`` would fail, and the whole worker with it.

    ``fields`` are those in which it names its task, ``payload`` is its decoded body. Celery logs and rejects it.
    """
    try:
        _TaskFields.model_validate(fields)
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        name, value = wrong["loc"][0], saferepr(wrong["input"], maxlen=100)
        raise InvalidTaskError(f"a task's {name} is {value}: {wrong['msg']}") from None
    match payload:
        case [list() | tuple(), dict(), dict() | None]:
            return
        case {"args": _}:  # of Celery 3
            return
    if fields is not payload:
        raise InvalidTaskError(f"a task's payload is [args, kwargs, options], not {saferepr(payload, maxlen=100)}")
