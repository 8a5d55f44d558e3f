"""Decoding messages: what is no task's message, or cannot be decoded, is found here and dead-lettered whole.

It would end the worker in kombu or Celery. It lies in ``<namespace>.dead.undecodable``, or among the dead letters of
the breaker in whose deferred queue it was, where ``Resilience.dead_letters`` finds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from celery.exceptions import InvalidTaskError
from celery.utils.saferepr import saferepr
from kombu.exceptions import DecodeError

#: Stands where other queues' names have a breaker's.
UNDECODABLE = "undecodable"

_TEXT_OR_NOTHING = (str, type(None))
_SURROGATES = re.compile("[\ud800-\udfff]")

Decoded = TypeVar("Decoded")


def decode(decoder: Callable[..., Decoded], *args: Any) -> Decoded:
    """Return what a decoder of kombu's makes of ``args``; no code of ours may run inside it.

    Raises:
        DecodeError: it fails. The text names the class of its error, whose own text may hold secrets.
    """
    try:
        return decoder(*args)
    except Exception as exc:
        raise DecodeError(f"the message cannot be decoded: {type(exc).__name__}") from exc


def payload_of(message: Any) -> Any:
    """Return the decoded body of a message.

    Raises:
        DecodeError: it cannot be decoded.
    """
    return decode(getattr, message, "payload")


def task_fields(message: Any) -> Mapping[str, Any]:
    """Return the fields in which a message names its task: its headers, or the body of message protocol 1.

    Raises:
        DecodeError: the body cannot be decoded.
    """
    headers: Mapping[str, Any] = message.headers if isinstance(message.headers, dict) else {}
    if "task" in headers:
        return headers
    payload = payload_of(message)
    return payload if isinstance(payload, dict) else headers


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


def flaw_in_task(message: Any) -> str | None:
    """Say what keeps Celery from looking up a message's task; None if nothing does, or it is no task's.

    Celery looks a task up before it knows whose it is, and writes a FAILURE under the id of an unknown one.
    """
    if not isinstance(message.headers, dict):
        return None
    try:
        fields = task_fields(message)
    except DecodeError:  # Celery knows what to do
        return None
    if "task" not in fields:
        return None
    for name in ("task", "id"):
        if not isinstance(fields.get(name), str):
            return f"a task's {name} is text, not {saferepr(fields.get(name), maxlen=100)}"
    return None


def check_task(fields: Mapping[str, Any], payload: Any) -> None:
    """Refuse a message on which Celery's ``Request`` would fail, and the whole worker with it.

    Args:
        fields: the fields in which it names its task.
        payload: its decoded body.

    Raises:
        InvalidTaskError: one of them is of the wrong kind; Celery logs and rejects the message.
    """
    for name, accepts, allowed in _FIELDS:
        value = fields.get(name)
        if value is not None and not accepts(value):  # what has no id comes not so far
            raise InvalidTaskError(f"a task's {name} is {allowed}, not {saferepr(value, maxlen=100)}")
    if fields is not payload and not _is_call(payload):
        raise InvalidTaskError(f"a task's payload is [args, kwargs, options], not {saferepr(payload, maxlen=100)}")


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_id(value: Any) -> bool:
    return _is_text(value) and (value.isascii() or _SURROGATES.search(value) is None)  # it becomes part of a key


def _are_limits(value: Any) -> bool:
    if not value:
        return True
    pair = isinstance(value, (list, tuple)) and len(value) == 2  # noqa: PLR2004 - a pair
    return pair and all(isinstance(limit, (int, float, type(None))) for limit in value)


def _is_name(value: Any) -> bool:
    return not value or isinstance(value, str)


def _are_stamps(value: Any) -> bool:
    return not value or isinstance(value, dict)


def _are_texts(value: Any) -> bool:
    return not value or (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value))


_FIELDS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("id", _is_id, "text"),
    ("shadow", _is_name, "text or None"),
    ("eta", _is_text, "text or None"),
    ("expires", _is_text, "text or None"),
    ("timelimit", _are_limits, "two numbers or None"),
    ("stamps", _are_stamps, "an object or None"),
    ("stamped_headers", _are_texts, "a list of texts or None"),
)


def _is_call(payload: Any) -> bool:
    if isinstance(payload, dict):
        return "args" in payload  # of Celery 3
    if not isinstance(payload, (list, tuple)) or len(payload) != 3:  # noqa: PLR2004 - the three below
        return False
    args, kwargs, options = payload
    return isinstance(args, (list, tuple)) and isinstance(kwargs, dict) and isinstance(options, (dict, type(None)))
