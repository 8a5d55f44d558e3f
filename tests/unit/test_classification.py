"""What exceptions say about the dependency, by the default rules and by a policy's own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import http.client
import logging
import pickle
import smtplib
import socket
import sqlite3
import ssl
import subprocess
import time
import urllib.error
from datetime import datetime, timezone
from email.message import Message
from typing import Any
from unittest import mock

import aiohttp
import gevent
import grpc
import httpx
import openai
import psycopg
import pytest
import redis
import requests
import sqlalchemy.exc
from billiard.exceptions import SoftTimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, Reject, Retry, WorkerShutdown

from resilient_tasks.core.classification import (
    attribute_to,
    attributed_to,
    dependency_errors,
    judge,
    judge_result,
    log_undecided,
)
from resilient_tasks.core.model import Outcome
from resilient_tasks.errors import BreakerOpenError

REQUEST: Any = httpx.Request("GET", "http://pay.example/")


def answer(status: int) -> Any:
    return httpx.Response(status, request=REQUEST)


def http_error(status: int, **headers: str) -> httpx.HTTPStatusError:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    response = httpx.Response(status, headers=sent, request=REQUEST)
    return httpx.HTTPStatusError("no", request=REQUEST, response=response)


def urllib_error(status: int) -> urllib.error.HTTPError:
    headers = Message()
    headers["Retry-After"] = "3"
    return urllib.error.HTTPError("http://pay.example/", status, "no", headers, None)


def grpc_error(code: grpc.StatusCode) -> grpc.RpcError:
    error: grpc.RpcError = grpc.RpcError("no")
    error.code = lambda: code
    return error


def sqlalchemy_error(original: Exception, *, invalidated: bool = False) -> Exception:
    """Return what SQLAlchemy makes of a driver's error."""
    base: Any = psycopg.Error if isinstance(original, psycopg.Error) else sqlite3.Error
    wrapped: Exception = sqlalchemy.exc.DBAPIError.instance(
        "SELECT 1", None, original, base, connection_invalidated=invalidated
    )
    wrapped.__cause__ = original
    return wrapped


def foreign(path: str, *bases: type[BaseException]) -> BaseException:
    """Return an instance of a library's exception class without the library."""
    module, _, name = path.rpartition(".")
    return type(name, bases or (Exception,), {"__module__": module})()


def carrying(attribute: str, value: object) -> Exception:
    error = Exception("no")
    setattr(error, attribute, value)
    return error


def judged(exc: BaseException, **settings: Any) -> Any:
    defaults = {"policy_classify": dependency_errors, "failures": (), "ignore": ()}
    return judge(**{**defaults, **settings}, exc=exc)


# what is in client_exceptions.jsonl is tried there
FAILURES = [
    ConnectionRefusedError(),
    ConnectionResetError(),
    BrokenPipeError(),
    TimeoutError(),
    socket.timeout(),  # noqa: UP041  the name under which it is raised
    asyncio.TimeoutError(),
    asyncio.IncompleteReadError(b"", 3),
    concurrent.futures.TimeoutError(),
    socket.gaierror(-2, "Name or service not known"),
    socket.herror(),
    ssl.SSLError(),
    ssl.SSLCertVerificationError(),
    OSError(errno.ENETUNREACH, "unreachable"),
    OSError(errno.EHOSTUNREACH, "unreachable"),
    OSError(errno.ETIMEDOUT, "late"),
    OSError("Multiple exceptions: [Errno 111] Connect call failed, [Errno 101] Network is unreachable"),
    http.client.RemoteDisconnected("gone"),
    http.client.BadStatusLine("?"),
    urllib.error.URLError(ConnectionRefusedError()),
    urllib.error.URLError(socket.gaierror(-2, "unknown")),
    urllib_error(502),
    smtplib.SMTPConnectError(421, b"busy"),
    smtplib.SMTPResponseException(451, b"try later"),
    SoftTimeLimitExceeded(),
    WorkerLostError(),
    gevent.Timeout(1),
    httpx.ConnectError("no"),
    httpx.ReadTimeout("late"),
    httpx.PoolTimeout("late"),
    httpx.RemoteProtocolError("broken"),
    http_error(500),
    http_error(503),
    http_error(429),
    redis.ConnectionError(),
    foreign("requests.exceptions.ChunkedEncodingError", OSError),
    foreign("urllib3.exceptions.MaxRetryError"),
    foreign("urllib3.exceptions.NewConnectionError"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientConnectorError(mock.Mock(), OSError("refused")),
    openai.APIConnectionError(request=REQUEST),
    requests.ReadTimeout(),
    requests.exceptions.RetryError(),
    grpc_error(grpc.StatusCode.UNAVAILABLE),
    grpc_error(grpc.StatusCode.DEADLINE_EXCEEDED),
    grpc_error(grpc.StatusCode.RESOURCE_EXHAUSTED),
    psycopg.OperationalError("connection refused"),
    psycopg.errors.AdminShutdown(),
    psycopg.errors.TooManyConnections(),
    sqlalchemy_error(psycopg.OperationalError("connection refused")),
    sqlalchemy_error(psycopg.InterfaceError("the connection is closed"), invalidated=True),
    sqlalchemy.exc.TimeoutError("QueuePool limit"),
    carrying("headers", {"x-envoy-overloaded": "true"}),
    RuntimeError("upstream connect error or disconnect/reset before headers. reset reason: overflow"),
    RuntimeError("no healthy upstream"),
    carrying("status_code", 503),
    carrying("status", 500),
    carrying("http_status", 429),
]

SAYS_NOTHING = [
    ValueError(),
    TypeError(),
    KeyError(),
    ZeroDivisionError(),
    AssertionError(),
    RuntimeError("?"),
    PermissionError(errno.EACCES, "not yours"),
    IsADirectoryError(),
    OSError(errno.ENOSPC, "disk full"),
    OSError("Multiple exceptions in my parser"),
    urllib.error.URLError("unknown url type: gopher"),
    urllib_error(404),
    smtplib.SMTPRecipientsRefused({}),
    smtplib.SMTPResponseException(550, b"no such mailbox"),
    httpx.UnsupportedProtocol("gopher"),
    httpx.LocalProtocolError("bad header"),
    http_error(400),
    http_error(404),
    http_error(408),
    http_error(302),
    redis.ResponseError("WRONGTYPE"),
    foreign("requests.exceptions.HTTPError", OSError),
    foreign("urllib3.exceptions.LocationParseError", ValueError),
    openai.AuthenticationError("who?", response=answer(401), body=None),
    grpc_error(grpc.StatusCode.NOT_FOUND),
    grpc_error(grpc.StatusCode.UNIMPLEMENTED),
    grpc_error(grpc.StatusCode.CANCELLED),
    psycopg.errors.UniqueViolation(),
    psycopg.errors.DeadlockDetected(),
    sqlalchemy_error(psycopg.errors.UniqueViolation()),
    sqlalchemy_error(sqlite3.OperationalError("no such table: orders")),
    requests.exceptions.MissingSchema(),
    aiohttp.InvalidURL("?"),
    foreign("mylib.ConnectionError"),
    carrying("status_code", 404),
    carrying("status", True),
    carrying("status", 1503),
    carrying("smtp_code", []),
    carrying("response", object()),
    BreakerOpenError("payments"),
    Ignore(),
    Reject(),
    KeyboardInterrupt(),
    SystemExit(1),
    WorkerShutdown(),
    GeneratorExit(),
    asyncio.CancelledError(),
]


def name_of(exc: BaseException) -> str:
    return f"{type(exc).__module__}.{type(exc).__name__}"


@pytest.mark.parametrize("exc", FAILURES, ids=name_of)
def test_the_dependency_has_failed(exc: BaseException) -> None:
    assert dependency_errors(exc) is Outcome.FAILURE
    assert judged(exc).outcome is Outcome.FAILURE


@pytest.mark.parametrize("exc", SAYS_NOTHING, ids=name_of)
def test_the_dependency_has_not_failed(exc: BaseException) -> None:
    assert dependency_errors(exc) is Outcome.IGNORED
    assert judged(exc).outcome is Outcome.IGNORED


# --- wrapped, carried, grouped ------------------------------------------------------------------------


def raised_from(outer: BaseException, cause: BaseException) -> BaseException:
    outer.__cause__ = cause
    return outer


def test_a_librarys_own_error_speaks_by_its_cause() -> None:
    wrapped = raised_from(
        foreign("payments.PaymentError"), raised_from(RuntimeError(), http_error(503, Retry_After="4"))
    )
    verdict = judged(wrapped)
    assert verdict.outcome is Outcome.FAILURE
    assert verdict.cause == "HTTP 503"
    assert verdict.retry_after == 4.0


def test_a_programming_error_is_one_wherever_it_came_from() -> None:
    assert dependency_errors(raised_from(KeyError("id"), ConnectionError())) is Outcome.IGNORED


def test_an_error_while_handling_another_counts_as_that_one_unless_it_decides_itself() -> None:
    for error, outcome in (
        (RuntimeError("in the handler"), Outcome.FAILURE),
        (foreign("payments.PaymentError"), Outcome.FAILURE),
        (KeyError("in the handler"), Outcome.IGNORED),
        (http_error(404), Outcome.IGNORED),
    ):
        error.__context__ = ConnectionError()
        assert dependency_errors(error) is outcome
    error = RuntimeError("in the handler")
    error.__context__, error.__suppress_context__ = ConnectionError(), True  # as "from None" does
    assert dependency_errors(error) is Outcome.IGNORED


def test_whatever_was_tried_several_times_decides() -> None:
    exhausted = foreign("tenacity.RetryError")
    assert dependency_errors(exhausted) is Outcome.FAILURE
    for cause, outcome in (
        (http_error(503), Outcome.FAILURE),
        (http_error(404), Outcome.IGNORED),
        (ValueError(), Outcome.IGNORED),
        (DeclinedError(), Outcome.IGNORED),
    ):
        assert dependency_errors(raised_from(foreign("tenacity.RetryError"), cause)) is outcome


def test_an_error_that_says_no_and_wraps_a_failure_is_a_failure() -> None:
    assert dependency_errors(raised_from(foreign("hvac.exceptions.InvalidRequest"), TimeoutError())) is Outcome.FAILURE


def test_one_dependency_error_in_a_group_is_enough() -> None:
    group_class = type("BaseExceptionGroup", (Exception,), {})
    group = group_class()
    group.exceptions = (ValueError(), http_error(404), ConnectionError())
    assert judged(group).outcome is Outcome.FAILURE
    assert judged(group).cause == "ConnectionError"
    group.exceptions = (ValueError(), http_error(404))
    assert judged(group).outcome is Outcome.IGNORED


def test_a_retry_counts_as_what_it_carries() -> None:
    assert judged(Retry(exc=httpx.ConnectError("no"))).outcome is Outcome.FAILURE
    assert judged(Retry(exc=ValueError())).outcome is Outcome.IGNORED
    assert judged(Retry()).outcome is Outcome.IGNORED
    assert judged(Retry(exc=BreakerOpenError("other"))).outcome is Outcome.IGNORED


def test_a_retry_that_cannot_pickle_its_exception_is_judged_by_the_original() -> None:
    with pytest.raises(TypeError):
        pickle.loads(pickle.dumps(http_error(503)))
    retry = Retry(exc=http_error(503))
    assert not isinstance(retry.exc, httpx.HTTPStatusError)
    retry.__context__ = http_error(503, Retry_After="7")  # as Python sets it inside "except"
    assert judged(retry).outcome is Outcome.FAILURE
    assert judged(retry).retry_after == 7.0


# --- what the user's own names say: nothing -----------------------------------------------------------


class PaymentTimeoutError(Exception):
    pass


class ServiceUnavailableError(PaymentTimeoutError, requests.ConnectionError):
    pass


def test_a_users_own_class_is_not_judged_by_its_name_but_by_its_bases_and_attributes() -> None:
    assert judged(PaymentTimeoutError()) == (Outcome.IGNORED, "PaymentTimeoutError", None, True)
    assert judged(PaymentTimeoutError("connection refused")).outcome is Outcome.IGNORED
    assert judged(ServiceUnavailableError()).outcome is Outcome.FAILURE
    error: Any = PaymentTimeoutError()
    error.status_code = "503 Service Unavailable"
    assert judged(error).outcome is Outcome.FAILURE


@pytest.mark.parametrize("exc", [PaymentTimeoutError(), RuntimeError("?"), subprocess.CalledProcessError(1, "x")])
def test_what_nothing_decides_is_undecided_until_the_policy_says_what_it_is(exc: Exception) -> None:
    assert judged(exc).undecided
    for settings in ({"failures": (Exception,)}, {"ignore": (Exception,)}, {"policy_classify": lambda _: "IGNORED"}):
        assert not judged(exc, **settings).undecided


@pytest.mark.parametrize("exc", [KeyError(), ValueError(), FileNotFoundError(2, "x"), http_error(404), Ignore()])
def test_mistakes_files_and_answers_are_decided(exc: Exception) -> None:
    assert not judged(exc).undecided


def test_what_is_undecided_is_logged_once_per_type(caplog: pytest.LogCaptureFixture) -> None:
    class UndecidedError(Exception):
        pass

    for name in ("payments", "mail"):
        log_undecided(name, UndecidedError("secret"))
    (line,) = caplog.messages
    assert "'payments'" in line
    assert "failures=(" in line
    assert "ignore=(" in line
    assert "secret" not in line


# --- which breaker's guard has counted it -----------------------------------------------------------------


def test_an_exception_is_attributed_to_the_breaker_that_has_counted_it_however_it_is_wrapped() -> None:
    inner = ConnectionError()
    attribute_to(inner, "mail")
    group = type("BaseExceptionGroup", (Exception,), {"exceptions": (inner,)})()
    for outer in (inner, raised_from(RuntimeError(), inner), RuntimeError("failed", inner), group, Retry(exc=inner)):
        assert attributed_to(outer) == "mail"
    assert attributed_to(ConnectionError()) is None
    later = http_error(503)  # of the fallback's own
    later.__context__ = inner
    assert attributed_to(later) is None


# --- Retry-After and cause ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry_After": "7"}, 7.0),
        ({"Retry_After": "0.5"}, 0.5),
        ({"Retry_After": "-3"}, 0.0),
        ({"Retry_After": "Wed, 21 Oct 2065 07:28:30 GMT", "Date": "Wed, 21 Oct 2065 07:28:00 GMT"}, 30.0),
        ({"Retry_After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"Retry_After": "Wed Oct 21 07:28:30 2065", "Date": "Wed, 21 Oct 2065 07:28:00 GMT"}, 30.0),
        ({"Retry_After": "Wed, 21 Oct 2065 07:28:30 -0000", "Date": "Wed, 21 Oct 2065 07:28:00 GMT"}, 30.0),
        ({"Retry_After": "soon"}, None),
        ({"Retry_After": "nan"}, None),
        ({"Retry_After": "inf"}, None),
        ({}, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert judged(http_error(503, **headers)).retry_after == seconds


@pytest.mark.parametrize("zone", [" 2065", " -0000", " GMT"])
def test_a_date_without_the_servers_own_counts_from_the_wall_clock_and_without_a_zone_is_utc(
    zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    text = f"Wed Oct 21 12:00:00{zone}" if zone == " 2065" else f"Wed, 21 Oct 2065 12:00:00{zone}"
    try:
        noon = datetime(2065, 10, 21, 12, 0, tzinfo=timezone.utc).timestamp()
        assert judged(http_error(429, Retry_After=text), clock=lambda: noon - 90).retry_after == 90.0
    finally:
        monkeypatch.undo()
        time.tzset()


def test_retry_after_of_a_client_error_says_nothing() -> None:
    assert judged(http_error(404, Retry_After="7")).retry_after is None


def test_headers_of_other_clients_are_found() -> None:
    assert judged(urllib_error(503)).retry_after == 3.0
    error = foreign("botocore.exceptions.ClientError")
    error.response = {"ResponseMetadata": {"HTTPStatusCode": 503, "HTTPHeaders": {"retry-after": "2"}}}  # type: ignore[attr-defined]
    assert judged(error) == judged(http_error(503, Retry_After="2"))


def test_the_cause_never_holds_an_exceptions_text() -> None:
    assert judged(ConnectionError("redis://:secret@host")).cause == "ConnectionError"
    assert judged(http_error(503)).cause == "HTTP 503"
    assert judged(ValueError("secret")).cause == "ValueError"


def test_an_exception_whose_attributes_raise_says_nothing() -> None:
    class NastyError(Exception):
        @property
        def response(self) -> object:
            raise RuntimeError("not set")

    assert judged(NastyError()).outcome is Outcome.IGNORED


# --- a policy's own rules -----------------------------------------------------------------------------


class DeclinedError(Exception):
    codes = ("declined",)


class OverdrawnError(DeclinedError):
    pass


def test_types_subclasses_and_predicates_decide() -> None:
    assert judged(OverdrawnError(), failures=(DeclinedError,)).outcome is Outcome.FAILURE
    assert judged(OverdrawnError(), failures=(lambda exc: "declined" in exc.codes,)).outcome is Outcome.FAILURE
    assert judged(ConnectionResetError(), ignore=(ConnectionError,)).outcome is Outcome.IGNORED
    assert judged(http_error(503), ignore=(lambda exc: exc.response.status_code == 503,)).outcome is Outcome.IGNORED


def test_ignore_wins_over_failures_and_failures_over_classify() -> None:
    assert judged(OverdrawnError(), failures=(DeclinedError,), ignore=(OverdrawnError,)).outcome is Outcome.IGNORED
    says_success = {"policy_classify": lambda _: Outcome.SUCCESS}
    assert judged(OverdrawnError(), **says_success).outcome is Outcome.SUCCESS
    assert judged(OverdrawnError(), failures=(DeclinedError,), **says_success).outcome is Outcome.FAILURE


def test_control_flow_is_no_failure_whatever_a_policy_says() -> None:
    for exc in (
        Ignore(),
        Reject(),
        Retry(),
        SystemExit(),
        KeyboardInterrupt(),
        asyncio.CancelledError(),
        BreakerOpenError("x"),
    ):
        assert judged(exc, failures=(BaseException,)).outcome is Outcome.IGNORED
    assert judged(Retry(exc=DeclinedError()), failures=(DeclinedError,)).outcome is Outcome.FAILURE


@pytest.mark.parametrize("setting", ["policy_classify", "failures", "ignore"])
def test_a_users_function_that_raises_is_logged_once(setting: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(exc: BaseException) -> Outcome:
        raise ZeroDivisionError

    given: Any = broken if setting == "policy_classify" else (broken,)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert judged(DeclinedError(), **{setting: given}).outcome is Outcome.IGNORED
    assert len(caplog.records) == 1
    assert "broken" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize("answer", [None, True, "FAILED", 3, "FAILURE"])
def test_a_classify_may_answer_in_plain_text_and_anything_else_counts_for_nothing(answer: Any) -> None:
    exc, expected = (DeclinedError(), "FAILURE") if answer == "FAILURE" else (ConnectionError(), "IGNORED")
    assert judged(exc, policy_classify=lambda _: answer).outcome == expected


# --- results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (Outcome.FAILURE, Outcome.FAILURE),
        ("FAILURE", Outcome.FAILURE),
        (Outcome.IGNORED, Outcome.IGNORED),
        (None, Outcome.SUCCESS),
        (True, Outcome.SUCCESS),
        ("invalid", Outcome.SUCCESS),
    ],
)
def test_a_classify_of_the_users_sees_values(answer: Any, outcome: Outcome) -> None:
    seen = []

    def classify(value: Any) -> Any:
        seen.append(value)
        return answer

    assert judge_result(dependency_errors, ConnectionError()).outcome is Outcome.SUCCESS
    assert judge_result(classify, {"status": "error"}).outcome is outcome
    assert seen == [{"status": "error"}]


def test_a_classify_for_exceptions_alone_does_no_harm_to_values(caplog: pytest.LogCaptureFixture) -> None:
    def classify(exc: Any) -> Outcome:
        return Outcome.FAILURE if exc.response.status_code > 0 else Outcome.IGNORED

    assert [judge_result(classify, "a value").outcome for _ in range(3)] == [Outcome.SUCCESS] * 3
    assert len(caplog.records) == 1
