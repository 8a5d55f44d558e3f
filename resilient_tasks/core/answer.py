"""What an exception of a client carries: the server's answer, and the exceptions that it wraps."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from itertools import islice
from typing import Any

_BEGINNING = 100  # bytes of a body
_STATUS_ATTRIBUTES = (
    "status_code", "status", "http_status", "http_status_code", "http_code", "httpcode", "errcode", "code"
)  # fmt: skip
_ANSWERS = ("response", "resp", "meta")  # where clients keep the whole answer
# Packages whose ``code`` is that of another protocol.
_OTHER_CODES = frozenset({"aiormq", "aiosmtplib", "amqp", "clickhouse_connect", "clickhouse_driver", "pika", "pymongo"})
_CODE_ATTRIBUTES = ("code", "type", "error_code", "error_type", "errorCode", "status", "grpc_status_code")
_BODIES = ("response", "body", "error", "errors", "details")
_CODE_KEYS = ("code", "Code", "type", "status", "reason", "error")
# Where clients keep what they wrap, if not in ``args`` or ``__dict__``: class attributes and properties.
_WRAPPING_ATTRIBUTES = ("reason", "orig", "original_exception", "inner_exception", "exceptions", "errors")
_STATUS_LINE = re.compile(r"[1-5]\d\d( .*)?")
_CODE = re.compile(r"[\w.:-]{2,100}")
_UNWRAPPED_AT_MOST = 50  # exceptions looked at in one tree, and members of one list


def status_of(exc: BaseException) -> int | None:
    """Return the HTTP status that ``exc`` reports, from its response or from itself."""
    response = attribute(exc, "response")
    if isinstance(response, dict) and "ResponseMetadata" in response:  # botocore
        return _as_status(_metadata(response).get("HTTPStatusCode"))
    answers = [attribute(exc, name) for name in _ANSWERS]
    responses = [held for held in exc.args if attribute(held, "status_code") is not None]
    for source in [given for given in (*answers, exc, *responses) if given is not None]:
        for name in _STATUS_ATTRIBUTES:
            if name == "code" and str(type(exc).__module__).partition(".")[0] in _OTHER_CODES:
                continue
            value = attribute(source, name)
            if value is not None and (status := _as_status(value)) is not None:
                return status
    return None


def _as_status(value: object) -> int | None:
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    if isinstance(value, str):
        value = int(value[:3]) if _STATUS_LINE.fullmatch(value) else None
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599 else None


def codes_of(exc: BaseException) -> Iterator[str]:
    """Yield what may be an error code: words without blanks that ``exc`` or the body of its answer names so."""
    for name in _CODE_ATTRIBUTES:
        yield from _as_code(attribute(exc, name))
    for name in _BODIES:
        body = attribute(exc, name)
        if name == "response" and not isinstance(body, dict):  # slack_sdk's; a property may read from the network
            body = (attribute(body, "__dict__") or {}).get("data")
        for part in islice(body, _UNWRAPPED_AT_MOST) if isinstance(body, (list, tuple)) else (body,):
            yield from _codes_in(part)


def _codes_in(body: object) -> Iterator[str]:
    """Yield the codes of a decoded body, and of the error in it: ``{"error": {"type": "overloaded_error"}}``."""
    if isinstance(body, dict):
        for part in (body, body.get("error"), body.get("Error")):
            if isinstance(part, dict):
                for key in _CODE_KEYS:
                    yield from _as_code(part.get(key))
    elif body is not None:
        for key in _CODE_KEYS:
            yield from _as_code(attribute(body, key))


def _as_code(value: object) -> Iterator[str]:
    text = value.name if isinstance(value, Enum) else value
    if isinstance(text, str) and _CODE.fullmatch(text):
        yield text


def header_of(exc: BaseException, name: str) -> str | None:
    response = attribute(exc, "response")
    is_botocore = isinstance(response, dict)
    headers = _metadata(response).get("HTTPHeaders") if is_botocore else attribute(response, "headers")
    headers = attribute(exc, "headers") if headers is None else headers
    found = result_or_none(lambda: [headers.get(spelling) for spelling in (name, name.lower())])  # or no headers at all
    return next((str(value).strip() for value in found or () if isinstance(value, (str, int, float))), None)


def _metadata(response: dict[str, Any]) -> dict[str, Any]:
    metadata = response.get("ResponseMetadata")
    return metadata if isinstance(metadata, dict) else {}


def retry_after_of(exc: BaseException, clock: Callable[[], float]) -> float | None:
    """Return the seconds of a ``Retry-After`` header; a date counts from the response's own ``Date``, if it has one."""
    text = header_of(exc, "Retry-After")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        until = _timestamp(text)
        if until is None:
            return None
        answered = _timestamp(header_of(exc, "Date"))
        seconds = until - (clock() if answered is None else answered)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def texts_of(exc: BaseException) -> list[str]:
    """Return the beginnings of what the server has said, as far as that has been read: a body, gRPC's details."""
    # requests and httpx: their public ``content`` would read a stream from the network
    body = attribute(attribute(exc, "response"), "_content")
    details = answered(exc, "details")
    said = [body[:_BEGINNING].decode("latin-1")] if isinstance(body, bytes) else []
    return [*said, details] if isinstance(details, str) else said


def _timestamp(date: str | None) -> float | None:
    try:
        moment = parsedate_to_datetime(date or "")
        # RFC 9110, 5.6.7: a date without a zone, as asctime writes it, is UTC
        return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def result_or_none(function: Callable[[], Any]) -> Any:
    """Return what a function returns; None if it raises: what clients have made may raise anything."""
    try:
        return function()
    except Exception:  # noqa: BLE001  see above
        return None


def attribute(source: object, name: str) -> Any:
    """Return an attribute of whatever a client has made; None if it has none, or its property raises."""
    return result_or_none(lambda: getattr(source, name, None))


def answered(source: object, name: str) -> Any:
    """Return what a method without arguments returns; None if there is none, or it raises."""
    method = attribute(source, name)
    return result_or_none(method) if callable(method) else None


def unwrapped(exc: BaseException, opens: Callable[[BaseException], bool] = lambda _: True) -> Iterator[BaseException]:
    """Yield ``exc`` and the exceptions that it wraps, the outermost first, each once.

    Wrapped is what it was raised from, or else what was being handled when it was raised (unless ``from None``),
    the members of a group, and what it holds in ``args`` and in attributes, lists and dictionaries included.
    ``opens`` says whether to go on to what an exception wraps; it is called after that was yielded.
    """
    seen, waiting = {id(exc)}, deque([exc])
    while waiting:
        current = waiting.popleft()
        yield current
        inside = [inner for inner in _wrapped_by(current) if id(inner) not in seen]
        if inside and opens(current):
            for inner in inside:
                if id(inner) not in seen and len(seen) < _UNWRAPPED_AT_MOST:
                    seen.add(id(inner))
                    waiting.append(inner)


def _wrapped_by(exc: BaseException) -> Iterator[BaseException]:
    raised_in = None if exc.__suppress_context__ else exc.__context__
    yield from _exceptions_in(exc.__cause__ or raised_in)
    for value in (*exc.args, *vars(exc).values(), *(attribute(exc, name) for name in _WRAPPING_ATTRIBUTES)):
        yield from _exceptions_in(value)


def _exceptions_in(value: object) -> Iterator[BaseException]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)
    return (one for one in islice(values, _UNWRAPPED_AT_MOST) if isinstance(one, BaseException))
