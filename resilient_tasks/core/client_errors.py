"""What one exception of a client means for the dependency, by what such exceptions have in common.

Client libraries are never imported. In this order: the answer's status, an error code in it, codes of protocols
(gRPC, SQL, SMTP, FTP, AMQP), a network error of the operating system, then the name of the exception's class if that
is of the standard library or of an installed package, and last its text; not by the name of a user's own class.
"""

from __future__ import annotations

import errno
import importlib.util
import re
import sys
from collections.abc import Callable
from enum import Enum
from functools import lru_cache
from http import HTTPStatus

from resilient_tasks.core.answer import answered, attribute, codes_of, header_of, result_or_none, status_of, texts_of
from resilient_tasks.errors import ResilienceError


class Meaning(Enum):
    """What one exception means; what it wraps is looked at unless it is ``FAILED`` or ``CLEARED``."""

    FAILED = "the dependency has failed"
    CLEARED = "the dependency has answered, or was never asked"
    PROBABLY_CLEARED = "cleared, if nothing that it wraps says otherwise"
    RETRIED = "failed several times: what it wraps decides, if it wraps anything"


# --- names of classes, as words in lower case: "timed out error" ---------------------------------------

# A dependency that is asked for less, or has broken down. Error codes are matched with these, too.
_OVERLOADED = (
    r"throttl|too many requests|rate ?limit(?! config)|ratelimited|rate exceeded|slow ?down|overload|\bbusy\b"
    r"|retry after|(request|bandwidth|throughput) (limit )?exceeded|prior request not complete|resource exhausted"
    r"|unavailable|time ?out|timed out|deadline exceeded|server error|internal (server|service|failure)"
    r"|bad gateway|gateway time"
)
_DISCONNECTED = (
    r"connect(ions?|ed|or|ing)?\b|disconnect|network|unreachable|broken (pipe|resource)|(?<!web )\bsockets?\b"
    r"|proxy (error|exception)|transport (error|exception)|\bdns\b|name resol|unresolvable|\b(ssl|tls) error"
    r"|remote protocol|heartbeat|communication error|incomplete read|unexpected (close|eof)|closed by (peer|server)"
    r"|(worker|stream|server) lost|terminated by server|pool exhausted|server selection|coordination failure"
    r"|not available|time limit exceeded|\bdown\b|\bagain\b|shut ?down|bootstrapping|load in progress|http 5\d\d"
    r"|slot not covered|health check|unhealthy|not (leader|primary|controller|coordinator|enough replicas)"
    r"|no (brokers?|hosts?|nodes|servers?|responders?)\b"
    r"|(server|host|broker|node|leader|master|slave|primary|gateway|coordinator) not (found|available|ready)"
)
_FAILED_NAME = re.compile(f"{_OVERLOADED}|{_DISCONNECTED}")
_FAILED_CODE = re.compile(
    # the words alone, then in full: what AWS's SDKs and LLM APIs call throttling and errors of their own
    rf"{_OVERLOADED}|^(limit exceeded exception|transaction in progress exception|api error|internal( error)?)$"
)
_CLEARED_NAME = re.compile(
    r"(?<!server )(?<!host )(?<!broker )(?<!node )(?<!leader )(?<!master )(?<!slave )(?<!primary )(?<!gateway )"
    r"(?<!coordinator )not found"
    r"|invalid|illegal|improper|incompatible|\bbad (?!gateway|status)|auth|unsigned|forbidden|denied|permission"
    r"|credential|config|not exist|no such|unknown (?!host)|unsupported|not (supported|implemented|allowed)|validat"
    r"|conflict|already|duplicate|exists|integrity|constraint|programming|schema|syntax|arguments?\b|param|\bvalue\b"
    r"|decod|encod|pars(e|ing)|redirect|cancel|too (large|long|big)|wrong|missing|required|local protocol|by client"
    r"|closed ok|query error|warning|mismatch|misuse|data error|lock\b|content type|serializ"
    r"|unexpected frame|command|\bstate\b|mandatory|read only|referral|critical|package|host key"
    r"|busy resource|max retries exceeded"
)
_THROTTLED_NAME = re.compile(r"throttl|too many requests|rate ?limit")
_RETRIES = re.compile(r"\bretr(y|ies)\b")
_OVERLOADED_NAME = re.compile(_OVERLOADED)

# Classes whose names do not say what they mean.
_FAILED_CLASSES: dict[str, frozenset[str]] = {
    "aiohttp": frozenset({"ClientPayloadError"}),
    "azure": frozenset({"ServiceRequestError", "ServiceResponseError"}),
    "botocore": frozenset({"HTTPClientError", "ResponseStreamingError"}),
    "cassandra": frozenset({"ReadFailure", "WriteFailure"}),
    "http": frozenset({"BadStatusLine"}),
    "imaplib": frozenset({"abort"}),
    "kazoo": frozenset({"SessionExpiredError"}),
    "pika": frozenset({"IncompatibleProtocolError"}),  # of a connection that is lost at its very beginning
    "neo4j": frozenset({"SessionExpired"}),
    "redis": frozenset({"InvalidResponse", "OutOfMemoryError", "ReadOnlyError"}),
    "requests": frozenset({"ChunkedEncodingError"}),
    "socket": frozenset({"gaierror", "herror"}),
    "websocket": frozenset({"WebSocketAddressException"}),
    "websockets": frozenset({"InvalidMessage"}),
    "urllib": frozenset({"ContentTooShortError"}),
    "urllib3": frozenset({"ProtocolError"}),
}
# Clients that are known wherever their files are, and those whose classes name a module that cannot be imported.
_PACKAGES = frozenset(
    re.findall(
        r"\w+",
        """
    aiohttp aiokafka aiomysql aiormq aiosmtplib amqp anthropic anyio asyncmy asyncpg asyncssh azure billiard boto3
    botocore boxsdk braintree cassandra celery cimpl clickhouse_connect clickhouse_driver cohere confluent_kafka
    consul couchbase discord django docker dropbox elastic_transport elasticsearch eventlet exchangelib
    facebook_business firebase_admin geopy gevent google googleapiclient gql groq grpc h11 h2 httpcore httplib2
    httpx httpx2 huggingface_hub hvac ibm_db imapclient influxdb influxdb_client jira jwt kafka kazoo kombu
    kubernetes langchain_core ldap ldap3 litellm mariadb minio mistralai motor msal mysql MySQLdb nats neo4j
    niquests openai opensearchpy oracledb paramiko paypalrestsdk peewee pg8000 pika praw prawcore psycopg psycopg2
    psycopg_pool pycurl pyhive pymemcache pymongo pymssql pymysql pyodbc pysolr python_http_client qdrant_client
    redis replicate requests sendgrid simple_salesforce slack_sdk snowflake sqlalchemy square stripe telegram
    temporalio tenacity thrift tornado tortoise trino trio tweepy twilio twisted urllib3 valkey websocket websockets
    zeep zenpy zmq
    """,
    )
)
_MISTAKES_IN_CODE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, NameError, NotImplementedError, SyntaxError,
    TypeError, UnicodeError,
)  # fmt: skip

# --- codes of protocols --------------------------------------------------------------------------------

_NETWORK_ERRORS = (
    "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN",
    "ENETRESET", "ENETUNREACH", "ENOTCONN", "EPIPE", "ESHUTDOWN", "ETIMEDOUT",
)  # fmt: skip
_NETWORK_ERRNOS = {getattr(errno, name) for name in _NETWORK_ERRORS if hasattr(errno, name)}  # not all exist everywhere

_GRPC_FAILURES = frozenset(
    {"DATA_LOSS", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "UNKNOWN"}
)
# Connection exceptions, insufficient resources, a statement timeout, a server that shuts down, starts or has crashed,
# its system errors, and ODBC's timeouts.
_SQL_STATES = ("08", "53", "57014", "57P01", "57P02", "57P03", "58000", "58030", "HYT0")
_SQL_STATE = re.compile(r"[0-9A-Z]{5}")
_MYSQL_NUMBERS = {
    0, 1040, 1041, 1042, 1043, 1047, 1053, 1077, 1079, 1129, 1152, 1158, 1159, 1160, 1161, 1184, 1203, 1218, 1927, 3024,
    2001, 2002, 2003, 2004, 2005, 2006, 2009, 2011, 2012, 2013, 2024, 2026, 2055,
}  # fmt: skip
_OF_MYSQL = range(1000, 5000)
# SQL Server's: of its client library, and Azure's of a service that is busy or moves.
_DATABASE_NUMBERS = _MYSQL_NUMBERS | {20002, 20003, 20004, 20006, 20009, 20047, 10928, 10929, 40197, 40501, 40613}
_CODES_BY_PACKAGE = {
    "clickhouse_driver": frozenset({159, 160, 202, 209, 210, 279, 999}),
    "pymongo": frozenset({6, 7, 50, 89, 91, 189, 262, 9001, 10107, 11600, 11602, 13435, 13436}),
}
_DATABASE_ERRORS = {"DBAPIError", "DatabaseError", "InterfaceError", "InternalError", "OperationalError"}
_REDIS_REFUSALS = re.compile(r"CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|NOREPLICAS|OOM|READONLY|TRYAGAIN")
# RFC 5321: 421 the service is not available, 451 a local error in processing, 452 insufficient storage; RFC 4954: 454 a
# temporary failure of authentication. 450 is about a mailbox, 550 to 559 are the sender's to fix. What is greylisted
# or over quota comes as 451 and 452, too: an enhanced status (RFC 3463) decides, if its subject is neither 3 nor 4.
_SMTP_FAILURES = frozenset({"421", "451", "452", "454", "-1"})  # -1: what came was no reply
_OF_THE_MESSAGE = re.compile(r"\s*[45]\.[12567]\.\d")
_FTP_FAILURES = ("421", "425", "426", "451", "452")  # RFC 959, likewise; 450 is about a file
_AMQP_FAILURES = frozenset({320, 506, 541})  # connection forced (a shutdown), resource error, internal error
_CURL_FAILURES = frozenset({5, 6, 7, 18, 28, 35, 52, 55, 56, 92})

_PROXY_FAILURES = ("upstream connect error", "no healthy upstream")  # Envoy's and Istio's answers
_REFUSED_TEXT = re.compile(
    r"authentication failed|pg_hba|access denied|login failed|permission denied|does not exist|redirects", re.IGNORECASE
)
_STATUS_IN_TEXT = re.compile(
    r"\bHTTP[ /:]*(\d{3})\b|\b(?:status|response|status code|response code|failed:|error:|too many)[ :=]+(\d{3})\b",
    re.IGNORECASE,
)
_FAILED_TEXT = re.compile(
    r"(can.?t|could not|cannot|unable to|failed to) (connect|be connected|resolve|translate host|reach)"
    r"|connection (to .{1,80} |was |is |already |has been |attempt )?"
    r"(refused|reset|closed|lost|failed|dropped|aborted|broken|timed ?out)"
    r"|closed (the )?connection|packet sequence|connection failure|link failure|gone away|empty response|-ERR EOF"
    r"|lost connection|no connection|not connected"
    r"|\btime(d)?[ -]?out|connection not available|disconnected|too many (clients|connections)"
    r"|shutting down|starting up|temporarily unavailable|unreachable"
    r"|protocol banner|session not active|connect failed|socket is closed"
    r"|transport failure|connections are down|resolution failure|(leader|coordinator|broker) not available|not leader"
    r"|ORA-(0311[34]|03135|125\d\d|0103[34]|01089)|DPY-(1001|4005|4011|4024|600[0-6])",
    re.IGNORECASE,
)


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
