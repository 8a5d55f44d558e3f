"""What one exception of a client means for the dependency, by what such exceptions have in common.

Client libraries are never imported. In this order: the answer's status, an error code in it, codes of protocols
(gRPC, SQL, SMTP, FTP, AMQP), a network error of the operating system, then the name of the exception's class if that
is of the standard library or of an installed package, and last its text; not by the name of a user's own class.
Names, codes and texts are in ``client_errors.ini``.
"""

from __future__ import annotations

import errno
import importlib.util
import re
import sys
from collections.abc import Callable
from configparser import ConfigParser
from enum import Enum
from functools import lru_cache
from http import HTTPStatus
from importlib import resources

from resilient_tasks.core.answer import answered, attribute, codes_of, header_of, result_or_none, status_of, texts_of
from resilient_tasks.errors import ResilienceError


class Meaning(Enum):
    """What one exception means; what it wraps is looked at unless it is ``FAILED`` or ``CLEARED``."""

    FAILED = "the dependency has failed"
    CLEARED = "the dependency has answered, or was never asked"
    PROBABLY_CLEARED = "cleared, if nothing that it wraps says otherwise"
    RETRIED = "failed several times: what it wraps decides, if it wraps anything"


_TABLES = ConfigParser(delimiters="=", interpolation=None)
_TABLES.read_string((resources.files("resilient_tasks.core") / "client_errors.ini").read_text("utf-8"))


def _pattern(*places: tuple[str, str], flags: int = 0) -> re.Pattern[str]:
    return re.compile("|".join(_TABLES[section][name].replace("\n", "") for section, name in places), flags)


def _codes(name: str) -> frozenset[str]:
    return frozenset(_TABLES["codes"][name].split())


def _numbers(name: str) -> frozenset[int]:
    return frozenset(map(int, _codes(name)))


_FAILED_NAME = _pattern(("names", "overloaded"), ("names", "disconnected"))
_OVERLOADED_NAME = _pattern(("names", "overloaded"))
_CLEARED_NAME = _pattern(("names", "cleared"))
_THROTTLED_NAME = _pattern(("names", "throttled"))
_RETRIES = _pattern(("names", "retries"))
_FAILED_CODE = _pattern(("names", "overloaded"), ("names", "codes"))
_FAILED_CLASSES = {package: frozenset(names.split()) for package, names in _TABLES["classes"].items()}
_PACKAGES = frozenset(_TABLES["packages"]["known"].split())
_MISTAKES_IN_CODE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, SyntaxError,
    TypeError, UnicodeError,
)  # fmt: skip

_NETWORK_ERRNOS = {getattr(errno, name) for name in _codes("errno") if hasattr(errno, name)}  # not all exist everywhere
_GRPC_FAILURES = _codes("grpc")
_SQL_STATES = tuple(_codes("sql"))
_SQL_STATE = re.compile(r"[0-9A-Z]{5}")
_OF_MYSQL = range(1000, 5000)
_DATABASE_NUMBERS = _numbers("databases")
_CODES_BY_PACKAGE = {package: _numbers(package) for package in ("clickhouse_driver", "pymongo")}
_DATABASE_ERRORS = {"DBAPIError", "DatabaseError", "InterfaceError", "InternalError", "OperationalError"}
_SMTP_FAILURES, _FTP_FAILURES = _codes("smtp"), tuple(_codes("ftp"))
_AMQP_FAILURES, _CURL_FAILURES = _numbers("amqp"), _numbers("curl")

_PROXY_FAILURES = ("upstream connect error", "no healthy upstream")  # Envoy's and Istio's answers
_REDIS_REFUSALS = _pattern(("texts", "redis"))
_OF_THE_MESSAGE = _pattern(("texts", "of_the_message"))
_REFUSED_TEXT = _pattern(("texts", "refused"), flags=re.IGNORECASE)
_STATUS_IN_TEXT = _pattern(("texts", "status"), flags=re.IGNORECASE)
_FAILED_TEXT = _pattern(("texts", "failed"), flags=re.IGNORECASE)


def meaning_of(exc: BaseException) -> Meaning | None:
    """Return what one exception means by itself, whatever it wraps; None: nothing decides."""
    if isinstance(exc, ResilienceError):
        return Meaning.CLEARED
    for rule in _RULES:
        found = rule(exc)
        if found is not None:
            return found
    return None


def _by_answer(exc: BaseException) -> Meaning | None:
    """Decide by the answer's status, and an error code in it: AWS throttles with 400, streams break off after 200."""
    cause = exc.__cause__
    if cause is not None and _package(exc) == "aiohttp" and is_one_of(cause, _HTTP_PROCESSING):
        return Meaning.FAILED  # what the server has sent is no HTTP; the status of 400 is aiohttp's own
    found = _by_status(status_of(exc))
    if found is Meaning.FAILED:
        return found
    codes = [_words(code) for code in codes_of(exc)]
    refusals = [code for code in codes if _CLEARED_NAME.search(code)]
    names = [_words(cls.__name__) for cls in type(exc).__mro__ if _is_foreign(str(cls.__module__))] if found else []
    # the class may say so beside a status of 4xx: GitHub's rate limit comes with 403
    is_throttled = any(map(_THROTTLED_NAME.search, names))
    if is_throttled or any(_FAILED_CODE.search(code) for code in codes if code not in refusals):
        return Meaning.FAILED
    return found or (Meaning.PROBABLY_CLEARED if refusals else None)


_HTTP_PROCESSING = {"aiohttp": frozenset({"HttpProcessingError"})}


def _by_status(status: int | None) -> Meaning | None:
    if status is None or status < HTTPStatus.BAD_REQUEST:
        return None
    return _decided(status >= HTTPStatus.INTERNAL_SERVER_ERROR or status == HTTPStatus.TOO_MANY_REQUESTS)


def _by_proxy(exc: BaseException) -> Meaning | None:
    """Decide whether a proxy (Envoy, Istio) answered, because it did not get through or is overloaded itself."""
    texts = (text_of(exc), *texts_of(exc))
    is_proxy = header_of(exc, "x-envoy-overloaded") is not None or any(t.startswith(_PROXY_FAILURES) for t in texts)
    return Meaning.FAILED if is_proxy else None


def _by_grpc(exc: BaseException) -> Meaning | None:
    code = attribute(exc, "code")
    if not callable(code) or not is_one_of(exc, {"grpc": frozenset({"RpcError"})}):
        return None
    return _decided(attribute(answered(exc, "code"), "name") in _GRPC_FAILURES)


def _by_mail(exc: BaseException) -> Meaning | None:
    if is_one_of(exc, {"smtplib": frozenset({"SMTPConnectError"})}):
        return Meaning.FAILED  # whatever it says, it accepts no mail
    refused = attribute(exc, "recipients")
    codes = [attribute(exc, "smtp_code"), attribute(exc, "code") if _package(exc) == "aiosmtplib" else None]
    replies = [(code, attribute(exc, "smtp_error") or attribute(exc, "message")) for code in codes]
    if isinstance(refused, dict):  # smtplib: (code, text) by recipient
        replies += [reply for reply in refused.values() if isinstance(reply, tuple) and len(reply) == 2]
    elif not any(isinstance(code, int) for code in codes):
        return None
    texts = [(str(code), text.decode("latin-1") if isinstance(text, bytes) else str(text)) for code, text in replies]
    return _decided(any(code in _SMTP_FAILURES and not _OF_THE_MESSAGE.match(text) for code, text in texts))


def _by_file_transfer(exc: BaseException) -> Meaning | None:
    if not is_one_of(exc, {"ftplib": frozenset({"Error"})}):
        return None
    return _decided(text_of(exc).startswith(_FTP_FAILURES))


def _by_amqp(exc: BaseException) -> Meaning | None:
    code = attribute(exc, "reply_code") or attribute(exc, "code")
    if _package(exc) not in {"aiormq", "amqp", "pika"} or not isinstance(code, int) or code < 300:
        return None
    return _decided(code in _AMQP_FAILURES)


def _by_database(exc: BaseException) -> Meaning | None:
    """Decide whether the connection or the server has failed, not the statement."""
    has_failed = attribute(exc, "code") in _CODES_BY_PACKAGE.get(_package(exc), ())
    if has_failed or attribute(exc, "connection_invalidated") is True:  # the latter is SQLAlchemy's
        return Meaning.FAILED
    is_database_error = any(cls.__name__ in _DATABASE_ERRORS for cls in type(exc).__mro__)
    first = exc.args[0] if is_database_error and exc.args else None
    state = attribute(exc, "sqlstate") or attribute(exc, "pgcode") or first
    if isinstance(state, str) and _SQL_STATE.fullmatch(state) and state != "HY000":  # a "general error"
        return _decided(state.startswith(_SQL_STATES))
    if not is_database_error:
        return None
    number = attribute(exc, "errno") or (first[0] if first and isinstance(first, tuple) else first)
    if number in _DATABASE_NUMBERS or (isinstance(number, int) and number in _OF_MYSQL):
        return _decided(number in _DATABASE_NUMBERS)
    return _by_database_text(exc)


def _by_database_text(exc: BaseException) -> Meaning:
    if _package(exc) == "sqlite3" or _REFUSED_TEXT.search(text_of(exc)):
        return Meaning.CLEARED
    has_no_state = _package(exc) in {"psycopg", "psycopg2"} and type(exc).__name__ == "OperationalError"
    if has_no_state or _fails_by_text(exc):  # psycopg's server was not reached
        return Meaning.FAILED
    return _by_status_in_text(exc) or _by_class(exc) or Meaning.PROBABLY_CLEARED


def _by_redis(exc: BaseException) -> Meaning | None:
    return Meaning.FAILED if _is_foreign(str(type(exc).__module__)) and _REDIS_REFUSALS.match(text_of(exc)) else None


def _by_curl(exc: BaseException) -> Meaning | None:
    if _package(exc) != "pycurl":
        return None
    return _by_status_in_text(exc) or _decided(bool(exc.args) and exc.args[0] in _CURL_FAILURES)


def _by_system(exc: BaseException) -> Meaning | None:
    if isinstance(exc, (ConnectionError, TimeoutError)):
        return Meaning.FAILED
    if isinstance(exc, EOFError):  # ftplib's, paramiko's and pipes' has no text; that of a file or a terminal has one
        return Meaning.FAILED if not exc.args or _fails_by_text(exc) else None
    if not isinstance(exc, OSError) or (type(exc) is not OSError and exc.errno is None):
        return None
    if exc.errno is not None:
        return Meaning.FAILED if exc.errno in _NETWORK_ERRNOS else None
    # a text alone: asyncio joins several refusals in one, http.client has a proxy's status there
    is_refused = text_of(exc).startswith("Multiple exceptions: [Errno ")
    return Meaning.FAILED if is_refused or _fails_by_text(exc) else _by_status_in_text(exc)


def _by_class(exc: BaseException) -> Meaning | None:
    return next(filter(None, (_by_name(str(cls.__module__), cls.__name__) for cls in type(exc).__mro__)), None)


@lru_cache(maxsize=4096)
def _by_name(module: str, name: str) -> Meaning | None:
    if not _is_foreign(module):
        return None
    if name in _FAILED_CLASSES.get(module.partition(".")[0], ()):
        return Meaning.FAILED
    words = _words(name)
    if _CLEARED_NAME.search(words):
        return Meaning.PROBABLY_CLEARED
    if _RETRIES.search(words) and not _OVERLOADED_NAME.search(words):
        return Meaning.RETRIED
    return Meaning.FAILED if _FAILED_NAME.search(words) else None


def _by_text(exc: BaseException) -> Meaning | None:
    if not _is_foreign(str(type(exc).__module__)) or type(exc) in {Exception, RuntimeError}:
        return None
    text = text_of(exc)
    if _REFUSED_TEXT.search(text):
        return Meaning.CLEARED
    begins_with_status = _by_status(int(text[:3])) if re.match(r"\d{3}\b", text) else None
    return begins_with_status or (Meaning.FAILED if _FAILED_TEXT.search(text) else None)


def _by_status_in_text(exc: BaseException) -> Meaning | None:
    if isinstance(exc, ValueError) or not _is_foreign(str(type(exc).__module__)):
        return None
    found = _STATUS_IN_TEXT.search(text_of(exc))
    return _by_status(int(found[1] or found[2])) if found else None


def _by_other(exc: BaseException) -> Meaning | None:
    return Meaning.PROBABLY_CLEARED if isinstance(exc, (ValueError, OSError)) else None


_RULES: tuple[Callable[[BaseException], Meaning | None], ...] = (
    _by_mail, _by_file_transfer, _by_amqp, _by_database, _by_answer, _by_proxy, _by_grpc, _by_redis,
    _by_curl, _by_system, lambda exc: Meaning.CLEARED if isinstance(exc, _MISTAKES_IN_CODE) else None,
    _by_status_in_text, _by_class, _by_text, _by_other,
)  # fmt: skip


def _decided(has_failed: bool) -> Meaning:  # noqa: FBT001 - the answer itself
    return Meaning.FAILED if has_failed else Meaning.CLEARED


def _fails_by_text(exc: BaseException) -> bool:
    return _FAILED_TEXT.search(text_of(exc)) is not None


def text_of(exc: BaseException) -> str:
    """Return the beginning of an exception's text; "" if it has none, or its ``__str__`` raises."""
    return str(result_or_none(lambda: str(exc)[:500]) or "")


def _package(exc: BaseException) -> str:
    return str(type(exc).__module__).partition(".")[0]


def is_one_of(exc: BaseException, names_by_package: dict[str, frozenset[str]]) -> bool:
    """Whether a class of ``exc`` has one of these names, in that package."""
    classes = [(str(cls.__module__).partition(".")[0], cls.__name__) for cls in type(exc).__mro__]
    return any(name in names_by_package.get(package, ()) for package, name in classes)


@lru_cache(maxsize=1024)
def _words(name: str) -> str:
    """Return ``HTTPReadTimeoutError``, ``READ_TIMEOUT`` or ``read-timeout`` in words: "http read timeout error"."""
    return " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)).lower()


@lru_cache(maxsize=1024)
def _is_foreign(module: str) -> bool:
    """Whether a module is of the standard library or of an installed package, not the user's own."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names or top in _PACKAGES:
        return True
    found = sys.modules.get(top)  # an exception that has crossed a process may be of a module that is not imported here
    if found is None:
        spec = importlib.util.find_spec(top) if top else None
        places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    else:
        places = [attribute(found, "__file__"), *(attribute(found, "__path__") or ())]
    return any(re.search(r"[/\\](site|dist)-packages[/\\]", str(place)) for place in places)
