"""Which exceptions are the dependency's fault: it cannot be reached, does not answer in time, or answers 5xx.

Client libraries are recognised by the names of their classes and by attributes, never imported: a user
who has none of them pays for none of them.
"""

from __future__ import annotations

import errno
from contextlib import suppress

from resilient_tasks.core.answer import attribute, header_of, status_of, texts_of
from resilient_tasks.core.model import Outcome
from resilient_tasks.errors import ResilienceError

# --- the tables: package -> names of exception classes, subclasses included --------------------------

_BLAMES_DEPENDENCY: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"ClientConnectionError", "ClientPayloadError"}),
    "anthropic": frozenset({"APIConnectionError"}),
    "asyncio": frozenset({"TimeoutError", "IncompleteReadError"}),
    "asyncpg": frozenset({"CannotConnectNowError", "PostgresConnectionError", "TooManyConnectionsError"}),
    "billiard": frozenset({"SoftTimeLimitExceeded", "TimeLimitExceeded", "WorkerLostError"}),
    "botocore": frozenset({"ConnectionError", "HTTPClientError"}),
    "concurrent": frozenset({"TimeoutError"}),
    "eventlet": frozenset({"Timeout"}),
    "gevent": frozenset({"Timeout"}),
    "http": frozenset({"BadStatusLine", "IncompleteRead"}),
    "httpcore": frozenset({"NetworkError", "ProxyError", "RemoteProtocolError", "TimeoutException"}),
    "httpx": frozenset({"TransportError"}),
    "httpx2": frozenset({"TransportError"}),
    "openai": frozenset({"APIConnectionError"}),
    "psycopg_pool": frozenset({"PoolTimeout"}),
    "pymongo": frozenset({"AutoReconnect"}),
    "redis": frozenset({"ConnectionError", "TimeoutError"}),
    "requests": frozenset({"ChunkedEncodingError", "ConnectionError", "RetryError", "Timeout"}),
    "smtplib": frozenset({"SMTPConnectError", "SMTPServerDisconnected"}),
    "socket": frozenset({"gaierror", "herror"}),
    "sqlalchemy": frozenset({"DisconnectionError", "TimeoutError"}),
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
    "httpx2": frozenset({"LocalProtocolError", "UnsupportedProtocol"}),
    "redis": frozenset({"AuthenticationError"}),
    "valkey": frozenset({"AuthenticationError"}),
}

_CONTROL_FLOW: dict[str, frozenset[str]] = {
    "asyncio": frozenset({"CancelledError"}),
    "celery": frozenset({"Ignore", "Reject", "Retry"}),
}

_POSTGRES_ERRORS = dict.fromkeys(("psycopg", "psycopg2"), frozenset({"OperationalError"}))

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
_GRPC_FAILURES = frozenset(
    {"DATA_LOSS", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN"}
)
# PostgreSQL's: connection exceptions, insufficient resources, and a server that shuts down or starts.
_SQL_STATES = ("08", "53", "57P01", "57P02", "57P03")
_PROXY_FAILURES = ("upstream connect error", "no healthy upstream")  # Envoy's and Istio's answers
_SMTP_TRY_LATER = frozenset({"421", "451", "452", "454"})
_WRAPPED_AT_MOST = 3


def carried_by(exc: BaseException) -> BaseException | None:
    """Return the exception to judge: what a Celery ``Retry`` carries, otherwise ``exc`` itself."""
    if not _is_one_of(exc, {"celery": frozenset({"Retry"})}):
        return exc
    carried = attribute(exc, "exc")
    # Retry keeps a picklable stand-in when it cannot keep the original, which Python still knows as the context.
    for original in (exc.__cause__, exc.__context__):
        if original is not None and carried is not None and _stands_for(carried, original):
            return original
    return carried if isinstance(carried, BaseException) else None


def _stands_for(stand_in: object, original: BaseException) -> bool:
    named = attribute(stand_in, "exc_cls_name")
    return isinstance(original, type(stand_in)) or named == type(original).__name__


def blame(exc: BaseException, breaker: str) -> None:
    """Note that a guard of ``breaker`` has counted ``exc`` as a failure: guards of others around it need not."""
    with suppress(AttributeError):  # of a class that has no room for it
        exc._resilient_tasks_blames = breaker  # type: ignore[attr-defined]  # noqa: SLF001 - a note of our own


def blamed_on(exc: BaseException) -> str | None:
    """Return the breaker whose guard has counted ``exc``, or what it was explicitly raised from, as a failure."""
    inner: BaseException | None = carried_by(exc)
    for _ in range(_WRAPPED_AT_MOST):
        if inner is None:
            break
        blamed: str | None = attribute(inner, "_resilient_tasks_blames")
        if blamed is not None:
            return blamed
        inner = inner.__cause__
    return None


def is_control_flow(exc: BaseException) -> bool:
    """Whether ``exc`` is Celery's, asyncio's, the interpreter's or our own way to end a call: it blames nobody."""
    if isinstance(exc, ResilienceError) or _is_one_of(exc, _CONTROL_FLOW):
        return True
    return not isinstance(exc, Exception) and not _is_one_of(exc, _BLAMES_DEPENDENCY) and not _members(exc)


def witness(exc: BaseException) -> tuple[Outcome, BaseException]:
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
    return tuple(attribute(exc, "exceptions") or ()) if is_group else ()


# --- what one exception says -------------------------------------------------------------------------


def _says(exc: BaseException) -> Outcome | None:
    status = status_of(exc)
    if status is not None and status >= 400:
        return Outcome.FAILURE if status >= 500 or status == 429 else Outcome.IGNORED
    if isinstance(exc, ResilienceError) or _is_one_of(exc, _BLAMES_CALLER):
        return Outcome.IGNORED
    if isinstance(exc, (ConnectionError, TimeoutError)) or _is_one_of(exc, _BLAMES_DEPENDENCY):
        return Outcome.FAILURE
    if any(blames(exc) for blames in (_is_network_error, _is_mail_error, _is_database_error, answered_by_proxy)):
        return Outcome.FAILURE
    return _says_grpc(exc)


def _says_grpc(exc: BaseException) -> Outcome | None:
    code = attribute(exc, "code")
    if not callable(code) or not _is_one_of(exc, {"grpc": frozenset({"RpcError"})}):
        return None
    return Outcome.FAILURE if attribute(code(), "name") in _GRPC_FAILURES else Outcome.IGNORED


def _is_mail_error(exc: BaseException) -> bool:
    return str(attribute(exc, "smtp_code")) in _SMTP_TRY_LATER


def _is_database_error(exc: BaseException) -> bool:
    """Whether a database driver says that the connection, not the statement, is what failed."""
    if attribute(exc, "connection_invalidated") is True:  # SQLAlchemy
        return True
    if not _is_one_of(exc, _POSTGRES_ERRORS):
        return False
    state = attribute(exc, "sqlstate") or attribute(exc, "pgcode")
    return state is None or str(state).startswith(_SQL_STATES)


def answered_by_proxy(exc: BaseException) -> bool:
    """Whether a proxy on the way (Envoy, Istio) answered, because it did not get through or is overloaded itself."""
    try:
        if header_of(exc, "x-envoy-overloaded") is not None:
            return True
        return any(text.startswith(_PROXY_FAILURES) for text in (str(exc), *texts_of(exc)))
    except Exception:  # noqa: BLE001  whatever a foreign ``__str__`` does
        return False


def _is_network_error(exc: BaseException) -> bool:
    if not isinstance(exc, OSError):
        return False
    if exc.errno is None:
        # urllib's URLError keeps the socket's error as its reason; asyncio joins several refusals in a text.
        reason = attribute(exc, "reason")
        if isinstance(reason, BaseException) and reason is not exc:
            return _says(reason) is Outcome.FAILURE
        return type(exc) is OSError and str(exc).startswith("Multiple exceptions: [Errno ")
    return exc.errno in _NETWORK_ERRNOS


def _is_one_of(exc: BaseException, names_by_package: dict[str, frozenset[str]]) -> bool:
    return any(cls.__name__ in names_by_package.get(cls.__module__.partition(".")[0], ()) for cls in type(exc).__mro__)
