"""What an exception says about the dependency that was called.

``dependency_errors`` is the default of ``BreakerPolicy.classify``: the dependency is to blame when it
cannot be reached, does not answer in time, breaks the connection, or answers 5xx or 429. Everything
else (other 4xx, programming errors, file errors, a task that retries or rejects itself) says nothing.

``judge`` puts a policy's ``classify``, ``failures`` and ``ignore`` together into one ``Verdict``.

Client libraries are recognised by the names of their classes and by attributes, never imported: a user
who has none of them pays for none of them.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Union

from resilient_tasks.core.model import Outcome
from resilient_tasks.errors import ResilienceError

logger = logging.getLogger(__name__)

Classify = Callable[[BaseException], Outcome]
# Union, not "|": Callable[...] aliases do not support the operator on Python 3.10.
Matcher = Union[type[BaseException], Callable[[BaseException], bool]]  # noqa: UP007


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one finished call says about its dependency.

    Args:
        outcome: what is counted.
        cause: the exception's type or its HTTP status, never its text, which may hold secrets.
        retry_after: seconds the dependency asked to be left alone.
    """

    outcome: Outcome
    cause: str = ""
    retry_after: float | None = None


# --- the tables: package -> names of exception classes, subclasses included --------------------------

_BLAMES_DEPENDENCY: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"ClientConnectionError", "ClientPayloadError"}),
    "asyncio": frozenset({"TimeoutError", "IncompleteReadError"}),
    "billiard": frozenset({"SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError"}),
    "botocore": frozenset({"ConnectionError", "HTTPClientError"}),
    "concurrent": frozenset({"TimeoutError"}),
    "eventlet": frozenset({"Timeout"}),
    "gevent": frozenset({"Timeout"}),
    "http": frozenset({"BadStatusLine", "IncompleteRead"}),
    "httpcore": frozenset({"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"}),
    "httpx": frozenset({"TransportError"}),
    "redis": frozenset({"ConnectionError", "TimeoutError"}),
    "requests": frozenset({"ChunkedEncodingError", "ConnectionError", "RetryError", "Timeout"}),
    "smtplib": frozenset({"SMTPConnectError", "SMTPServerDisconnected"}),
    "socket": frozenset({"gaierror", "herror"}),
    "ssl": frozenset({"SSLError"}),
    "urllib3": frozenset(
        {
            "IncompleteRead",
            "MaxRetryError",
            "NewConnectionError",
            "ProtocolError",
            "ProxyError",
            "SSLError",
            "TimeoutError",
        }
    ),
    "valkey": frozenset({"ConnectionError", "TimeoutError"}),
}

_BLAMES_CALLER: dict[str, frozenset[str]] = {
    "httpx": frozenset({"LocalProtocolError", "UnsupportedProtocol"}),
    "redis": frozenset({"AuthenticationError"}),
    "valkey": frozenset({"AuthenticationError"}),
}

_CONTROL_FLOW: dict[str, frozenset[str]] = {
    "asyncio": frozenset({"CancelledError"}),
    "celery": frozenset({"Ignore", "Reject", "Retry"}),
}

_NETWORK_ERRORS = (
    "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
    "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "ESHUTDOWN", "ETIMEDOUT",
)  # fmt: skip
_NETWORK_ERRNOS = {getattr(errno, name) for name in _NETWORK_ERRORS if hasattr(errno, name)}  # not all exist everywhere

_MISTAKES_IN_CODE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)
_STATUS_ATTRIBUTES = ("status_code", "status", "http_status")
_SMTP_TRY_LATER = frozenset({"421", "451", "452", "454"})
_WRAPPED_AT_MOST = 3


def dependency_errors(exc: BaseException) -> Outcome:
    """Return FAILURE if ``exc`` is the dependency's fault, else IGNORED."""
    carried = _carried(exc)
    if carried is None or _is_control_flow(carried):
        return Outcome.IGNORED
    return _witness(carried)[0]


def judge(
    policy_classify: Classify,
    failures: Iterable[Matcher],
    ignore: Iterable[Matcher],
    exc: BaseException,
    *,
    clock: Callable[[], float] = time.time,
) -> Verdict:
    """Judge the exception that ended a guarded call, by a policy's three settings.

    ``ignore`` wins over ``failures``, which win over ``policy_classify``. A user's function that raises
    is logged once and the call says nothing; nothing is raised from here.

    Args:
        policy_classify: ``BreakerPolicy.classify``.
        failures: ``BreakerPolicy.failures``.
        ignore: ``BreakerPolicy.ignore``.
        exc: what the call raised; a Celery ``Retry`` is judged by the exception that it carries.
        clock: wall clock in seconds, for a ``Retry-After`` that is a date.
    """
    carried = _carried(exc)
    if carried is None or _is_control_flow(carried):
        return Verdict(Outcome.IGNORED, type(exc).__name__)
    outcome = _outcome(policy_classify, failures, ignore, carried)
    witness = _witness(carried)[1]
    return Verdict(outcome, _label(witness), _retry_after(witness, clock) if outcome is Outcome.FAILURE else None)


def _outcome(
    policy_classify: Classify, failures: Iterable[Matcher], ignore: Iterable[Matcher], exc: BaseException
) -> Outcome:
    asked: object = None
    try:
        for asked in ignore:
            if _matches(asked, exc):
                return Outcome.IGNORED
        for asked in failures:
            if _matches(asked, exc):
                return Outcome.FAILURE
        asked = policy_classify
        return Outcome(policy_classify(exc))
    except Exception as error:  # noqa: BLE001  a user's function may raise anything; it must not mask the task's own
        _log_once(asked, error)
        return Outcome.IGNORED


def _matches(matcher: Any, exc: BaseException) -> bool:
    return isinstance(exc, matcher) if isinstance(matcher, type) else bool(matcher(exc))


_logged: set[int] = set()


def _log_once(function: object, error: Exception) -> None:
    if id(function) not in _logged:
        _logged.add(id(function))
        logger.error("%r failed; calls that it cannot classify say nothing", function, exc_info=error)


# --- which exception speaks --------------------------------------------------------------------------


def _carried(exc: BaseException) -> BaseException | None:
    """Return the exception to judge: what a Celery ``Retry`` carries, otherwise ``exc`` itself."""
    if not _is_one_of(exc, {"celery": frozenset({"Retry"})}):
        return exc
    carried = _attribute(exc, "exc")
    # Retry keeps a picklable stand-in when it cannot keep the original, which Python still knows as the context.
    for original in (exc.__cause__, exc.__context__):
        if original is not None and carried is not None and _stands_for(carried, original):
            return original
    return carried if isinstance(carried, BaseException) else None


def _stands_for(stand_in: object, original: BaseException) -> bool:
    named = _attribute(stand_in, "exc_cls_name")
    return isinstance(original, type(stand_in)) or named == type(original).__name__


def _is_control_flow(exc: BaseException) -> bool:
    if isinstance(exc, ResilienceError) or _is_one_of(exc, _CONTROL_FLOW):
        return True
    return not isinstance(exc, Exception) and not _is_one_of(exc, _BLAMES_DEPENDENCY) and not _members(exc)


def _witness(exc: BaseException) -> tuple[Outcome, BaseException]:
    """Return what ``exc`` says, and the exception that says it: itself, its explicit cause or a group's member."""
    statements = _statements(exc, _WRAPPED_AT_MOST)
    blaming = [statement for statement in statements if statement[0] is Outcome.FAILURE]
    return (blaming or statements or [(Outcome.IGNORED, exc)])[0]


def _statements(exc: BaseException, depth: int) -> list[tuple[Outcome, BaseException]]:
    said = _says(exc)
    if said is not None:
        return [(said, exc)]
    if depth == 0 or isinstance(exc, _MISTAKES_IN_CODE):
        return []
    below = _members(exc) or ((exc.__cause__,) if exc.__cause__ is not None else ())
    return [statement for inner in below for statement in _statements(inner, depth - 1)]


def _members(exc: BaseException) -> tuple[BaseException, ...]:
    is_group = any(cls.__name__ == "BaseExceptionGroup" for cls in type(exc).__mro__)
    return tuple(_attribute(exc, "exceptions") or ()) if is_group else ()


# --- what one exception says -------------------------------------------------------------------------


def _says(exc: BaseException) -> Outcome | None:
    status = _status(exc)
    if status is not None and status >= 400:
        return Outcome.FAILURE if status >= 500 or status == 429 else Outcome.IGNORED
    if isinstance(exc, ResilienceError) or _is_one_of(exc, _BLAMES_CALLER):
        return Outcome.IGNORED
    if isinstance(exc, (ConnectionError, TimeoutError)) or _is_one_of(exc, _BLAMES_DEPENDENCY):
        return Outcome.FAILURE
    if str(_attribute(exc, "smtp_code")) in _SMTP_TRY_LATER or _is_network_error(exc):
        return Outcome.FAILURE
    return None


def _is_network_error(exc: BaseException) -> bool:
    if not isinstance(exc, OSError):
        return False
    if exc.errno is None:
        # urllib's URLError keeps the socket's error as its reason; asyncio joins several refusals in a text.
        reason = _attribute(exc, "reason")
        if isinstance(reason, BaseException) and reason is not exc:
            return _says(reason) is Outcome.FAILURE
        return type(exc) is OSError and str(exc).startswith("Multiple exceptions: [Errno ")
    return exc.errno in _NETWORK_ERRNOS


def _is_one_of(exc: BaseException, names_by_package: dict[str, frozenset[str]]) -> bool:
    return any(cls.__name__ in names_by_package.get(cls.__module__.partition(".")[0], ()) for cls in type(exc).__mro__)


def _status(exc: BaseException) -> int | None:
    """Return the HTTP status that ``exc`` reports, from its response or from itself."""
    response = _attribute(exc, "response")
    if isinstance(response, dict):  # botocore
        return _as_status(_metadata(response).get("HTTPStatusCode"))
    for source in (response, exc):
        for name in _STATUS_ATTRIBUTES:
            status = _as_status(_attribute(source, name))
            if status is not None:
                return status
    return None


def _as_status(value: object) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and 100 <= value <= 599 else None


def _metadata(response: dict[str, Any]) -> dict[str, Any]:
    metadata = response.get("ResponseMetadata")
    return metadata if isinstance(metadata, dict) else {}


def _label(exc: BaseException) -> str:
    status = _status(exc)
    return f"HTTP {status}" if status is not None and status >= 400 else type(exc).__name__


# --- Retry-After -------------------------------------------------------------------------------------


def _retry_after(exc: BaseException, clock: Callable[[], float]) -> float | None:
    """Return the seconds of a ``Retry-After`` header; a date counts from the response's own ``Date``."""
    response = _attribute(exc, "response")
    headers = _metadata(response).get("HTTPHeaders") if isinstance(response, dict) else _attribute(response, "headers")
    if headers is None:
        headers = _attribute(exc, "headers")
    text = _header(headers, "Retry-After")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        until = _timestamp(text)
        if until is None:
            return None
        answered = _timestamp(_header(headers, "Date"))
        seconds = until - (clock() if answered is None else answered)
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _header(headers: Any, name: str) -> str | None:
    for spelling in (name, name.lower()):
        try:
            value = headers.get(spelling)
        except Exception:  # noqa: BLE001  whatever they are, these are no headers
            return None
        if isinstance(value, (str, int, float)):
            return str(value).strip()
    return None


def _timestamp(date: str | None) -> float | None:
    try:
        return parsedate_to_datetime(date).timestamp() if date else None
    except (TypeError, ValueError, OverflowError):
        return None


def _attribute(source: object, name: str) -> Any:
    try:
        return getattr(source, name, None)
    except Exception:  # noqa: BLE001  a property may raise anything
        return None
