"""Health checks: what :meth:`Breaker.probe` registers, and checks to choose from.

::

    payments.probe(http_check("https://pay.example/health"), timeout=5)

Each is a callable without arguments that returns if the dependency is healthy and raises
:class:`HealthCheckError` if it is not. They keep to the time limit of the probe that runs them.
An argument that is not allowed is a ``ConfigurationError`` as soon as the check is made.
"""

from __future__ import annotations

import asyncio
import base64
import http.client
import importlib.util
import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Annotated, Any
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pydantic import Field

from resilient_tasks.core.model import Snapshot, State, key_of
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.validation import Count, PositiveSeconds, check_fields

__all__ = [
    "Check", "HealthCheckError", "all_of", "any_of", "command_check", "consul_check", "grpc_check", "heartbeat",
    "http_check", "tcp_check",
]  # fmt: skip

LONGEST_RUN = 10.0  # seconds of one run, unless the user says otherwise
ACTIVE_INTERVAL = 10.0  # seconds
FAILURES_BEFORE_OPEN = 3
HEARTBEATS = "heartbeat"  # kind of the values in the store that keep the last heartbeat of a breaker
LONGEST_SILENCE = 7 * 24 * 3600.0  # seconds for which a heartbeat is kept
MOST_HANGING = 10  # runs of each member of all_of and any_of that may hang; beyond that no more are started

_LONGEST_CONSUL_ANSWER = 16 * 1024 * 1024  # bytes
_LONGEST_GRPC_SERVICE = 127  # bytes: its length then takes one byte
_PRINTABLE = frozenset(map(chr, range(0x21, 0x7F)))
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


# --- probes ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A breaker's health check; :meth:`Breaker.probe` explains the fields."""

    breaker: str
    function: Annotated[Callable[..., Any], Field(description="a function without arguments, or with a child's key")]
    timeout: PositiveSeconds | None = None
    interval: PositiveSeconds | None = None
    active: bool = False
    failures_before_open: Count | None = None
    successes_before_close: Count | None = None
    takes_key: bool = field(init=False)  # it checks one child after the other: a function with one argument, its key

    def __post_init__(self) -> None:
        object.__setattr__(self, "takes_key", _takes_one_argument(self.function))
        subject = f"probe of breaker {self.breaker!r}: "
        check_fields(self, subject)
        if self.failures_before_open is not None and not self.active:
            given = f"failures_before_open={self.failures_before_open!r}"
            raise ConfigurationError(f"{subject}{given}: allowed is None unless active=True")
        if self.timeout is not None and self.timeout > self._longest_run:
            longest = f"{self.interval or ACTIVE_INTERVAL:g} seconds"
            raise ConfigurationError(f"{subject}timeout={self.timeout!r}: allowed is up to the interval of {longest}")

    def of_child(self, name: str) -> Probe:
        """Return the probe of one child. It only replaces trials: healthy children may be many, and are not checked."""
        function = partial(self.function, unquote(key_of(name)))
        return replace(self, breaker=name, function=function, active=False, failures_before_open=None)

    @property
    def _longest_run(self) -> float:
        """Runs of one breaker do not overlap."""
        return self.interval or (ACTIVE_INTERVAL if self.active else math.inf)

    @property
    def limit(self) -> float:
        """Seconds that one run may take."""
        return self.timeout or min(LONGEST_RUN, self._longest_run)

    @property
    def failures_allowed(self) -> int:
        """Failed runs in a row that open the breaker."""
        return self.failures_before_open or FAILURES_BEFORE_OPEN

    def is_due(self, snapshot: Snapshot) -> bool:
        """Whether it should run now: if active while tasks are admitted, and in HALF_OPEN, spaced by the interval."""
        checked_at = -math.inf if snapshot.checked_at is None else snapshot.checked_at
        if snapshot.state is State.HALF_OPEN:
            return checked_at < self.turn_began(snapshot)
        if not self.active or snapshot.state not in (State.CLOSED, State.SHADOW):
            return False
        # A breaker that was never used must be created before its interval can begin.
        return snapshot.epoch == 0 or max(checked_at, snapshot.since) < self.turn_began(snapshot)

    def turn_began(self, snapshot: Snapshot) -> float:
        """Return the instant since when one worker of the fleet may run it once, on the store's clock.

        While tasks are admitted each breaker has instants of its own, so that many are not checked at once.
        """
        if snapshot.state is State.HALF_OPEN:
            return snapshot.now - (self.interval or 0.0)
        interval = self.interval or ACTIVE_INTERVAL
        own_share = zlib.crc32(self.breaker.encode()) / 2**32
        return snapshot.now - (snapshot.now - own_share * interval) % interval


def _takes_one_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a builtin, or no function
        return False
    return sum(each.default is each.empty and each.kind not in _VARIADIC for each in parameters) == 1


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a probe, as the checks inside see it."""

    ends_at: float  # on the monotonic clock
    last_heartbeat: Callable[[], float | None]  # seconds since the last one of the breaker; None: there was none


_run: ContextVar[Run | None] = ContextVar("resilient_tasks_health_check", default=None)


def run_probe(function: Callable[[], Any], run: Run) -> None:
    """Run a health check as part of ``run``; it raises what the check raises."""
    token = _run.set(run)
    try:
        run_check(function)
    finally:
        _run.reset(token)


def run_check(function: Callable[[], Any]) -> None:
    """Run a health check to its end, also one that is a coroutine function; it raises what the check raises."""
    result = function()
    if inspect.isawaitable(result):

        async def wait() -> None:
            await result

        asyncio.run(wait())


def _time_left() -> float:
    """Return the seconds that a check may take; one that the user calls by hand has those of a run."""
    run = _run.get()
    return LONGEST_RUN if run is None else max(0.001, run.ends_at - time.monotonic())


# --- checks ---------------------------------------------------------------------------------------------


class HealthCheckError(ConnectionError):
    """A health check has failed: a failure of the dependency, as any other connection error.

    Args:
        message: names the check, its target and what was found; it holds no secrets.
        status_code: of an HTTP answer.
        headers: of an HTTP answer; a ``Retry-After`` among them sets the open time.
    """

    def __init__(self, message: str, status_code: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.headers = headers


class Check:
    """A health check of the library's own."""

    def __init__(self, description: str, look: Callable[[], None]) -> None:
        self._description = description  # the call that made it, without secrets; it begins every message
        self._look = look  # raises if the dependency is not healthy

    def __repr__(self) -> str:
        return self._description

    def __call__(self) -> None:
        """Return if the dependency is healthy, else raise :class:`HealthCheckError`."""
        try:
            self._look()
        except HealthCheckError as error:
            raise HealthCheckError(f"{self}: {error}", error.status_code, error.headers) from error
        except TimeoutError as error:
            raise HealthCheckError(f"{self}: no answer in time") from error
        except OSError as error:
            raise HealthCheckError(f"{self}: {error.strerror or type(error).__name__}") from error


def _require(is_allowed: bool, argument: str, value: object, allowed: str) -> None:  # noqa: FBT001 - the condition
    if not is_allowed:
        raise ConfigurationError(f"{argument}={value!r}: allowed is {allowed}")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def http_check(
    url: str,
    expect: int | Collection[int] = range(200, 300),
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
) -> Check:
    """Make an HTTP request; the dependency is healthy if the answer's status is among those expected.

    A redirect is an answer like any other and is not followed: give the URL it leads to, or expect it.
    Proxies of the environment are not used. A ``Retry-After`` of the answer sets the breaker's open time.

    Args:
        url: ``http://`` or ``https://``; user and password in it are sent as basic authentication.
        expect: one status or several.
        method: of the request, which has no body.
        headers: of the request.
    """
    parts = _parts("http_check: url", url)
    statuses = expect if isinstance(expect, Collection) else (expect,)
    are_statuses = bool(statuses) and all(type(status) is int and 100 <= status <= 599 for status in statuses)  # noqa: PLR2004 - statuses of HTTP
    _require(are_statuses, "http_check: expect", expect, "a status from 100 to 599, or several: range(200, 300)")
    is_method = _is_text(method) and set(method) <= _TOKEN
    _require(is_method, "http_check: method", method, "the name of an HTTP method, such as 'GET' or 'HEAD'")
    if not isinstance(headers, (Mapping, type(None))):
        raise ConfigurationError("http_check: headers: allowed is a mapping of strings to strings")
    for name, value in (headers or {}).items():
        if not _is_text(name) or not set(name) <= _TOKEN or not isinstance(value, str) or not value.isprintable():
            raise ConfigurationError(f"http_check: header {name!r}: allowed are names and values of one line each")
    is_span = isinstance(statuses, range) and statuses.step == 1
    wanted = f"{min(statuses)}..{max(statuses)}" if is_span else ", ".join(map(str, sorted(statuses)))

    def look() -> None:
        response, _ = _ask(parts, method.upper(), headers or {})
        if response.status not in statuses:
            found = f"answered {response.status}, expected {wanted}"
            raise HealthCheckError(found, response.status, dict(response.headers))

    return Check(f"http_check({_shown(parts)!r})", look)


def tcp_check(host: str, port: int) -> Check:
    """Open a connection and close it again; the dependency is healthy if that succeeds.

    Args:
        host: name or address.
        port: from 1 to 65535.
    """
    _require(_is_text(host), "tcp_check: host", host, "a host name or address")
    is_port = type(port) is int and 1 <= port <= 65_535  # noqa: PLR2004 - the highest port
    _require(is_port, "tcp_check: port", port, "an integer from 1 to 65535")
    look = lambda: socket.create_connection((host, port), timeout=_time_left()).close()  # noqa: E731 - one call
    return Check(f"tcp_check({host!r}, {port})", look)


def _parts(argument: str, url: object) -> SplitResult:
    """Take an ``http://`` or ``https://`` URL apart."""
    try:
        parts = urlsplit(url if isinstance(url, str) else "")
        if parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0 and set(str(url)) <= _PRINTABLE:
            return parts
    except ValueError:
        pass
    shown = url.partition("?")[0] if isinstance(url, str) and "@" not in url else "..."  # no password, no query
    raise ConfigurationError(f"{argument}={shown!r}: allowed is http://host/path or https://host/path, in ASCII")


def _shown(parts: SplitResult) -> str:
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _ask(
    parts: SplitResult, method: str, headers: Mapping[str, str], longest_body: int = 0
) -> tuple[http.client.HTTPResponse, bytes]:
    """Make one request and return the answer, whatever its status, with so many bytes of its body."""
    kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=_time_left())
    target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
    user = unquote(parts.netloc.rpartition("@")[0]).encode()
    login = {"Authorization": f"Basic {base64.b64encode(user).decode()}"} if user else {}
    try:
        connection.request(method, target, headers={**login, "Connection": "close", **headers})
        response = connection.getresponse()
        return response, response.read(longest_body)
    except http.client.HTTPException as error:
        raise HealthCheckError(f"no valid answer ({type(error).__name__})") from error
    finally:
        connection.close()


def consul_check(service: str, address: str = "http://127.0.0.1:8500", token: str | None = None) -> Check:
    """Ask Consul; the dependency is healthy if at least one instance passes all its checks there.

    A Consul that does not answer is a failure, too: use ``any_of`` with a second opinion if that is too strict.

    Args:
        service: its name in Consul.
        address: URL of Consul's HTTP interface.
        token: for Consul's access control.
    """
    _require(_is_text(service), "consul_check: service", service, "the name of a service in Consul")
    is_token = token is None or (_is_text(token) and token.isascii() and token.isprintable())
    _require(is_token, "consul_check: token", "...", "a string of one line, or None")
    consul = _shown(_parts("consul_check: address", address))
    path = f"/v1/health/service/{quote(service, safe='')}?passing"
    url = _parts("consul_check: address", address.rstrip("/") + path)
    headers = {} if token is None else {"X-Consul-Token": token}

    def look() -> None:
        response, body = _ask(url, "GET", headers, _LONGEST_CONSUL_ANSWER)
        if response.status != http.HTTPStatus.OK:
            raise HealthCheckError(f"Consul at {consul} answered {response.status}")
        try:
            instances = json.loads(body)
        except ValueError as error:
            raise HealthCheckError("the answer is no JSON") from error
        if not isinstance(instances, list):
            raise HealthCheckError("the answer is no list of instances")
        if not instances:
            raise HealthCheckError(f"no instance passes its checks, says Consul at {consul}")

    return Check(f"consul_check({service!r})", look)


def grpc_check(target: str, service: str = "", *, tls: bool = False) -> Check:
    """Make a call of ``grpc.health.v1.Health``; the dependency is healthy if it says SERVING.

    It needs the extra ``resilient_tasks[grpc]``. Each call is made in a process of its own, because gRPC does not
    survive the forks of a worker's main process.

    Args:
        target: ``host:port``, or any other target that gRPC knows.
        service: full name of one service; empty: the server as a whole.
        tls: encrypt, and check the server's certificate by gRPC's own root certificates.
    """
    is_target = _is_text(target) and not target.startswith("-") and "\0" not in target
    _require(is_target, "grpc_check: target", target, "host:port")
    is_service = isinstance(service, str) and "\0" not in service and len(service.encode()) <= _LONGEST_GRPC_SERVICE
    _require(is_service, "grpc_check: service", service, f"a string of up to {_LONGEST_GRPC_SERVICE} bytes")
    if importlib.util.find_spec("grpc") is None:
        raise ConfigurationError("grpc_check needs grpcio: pip install 'resilient_tasks[grpc]'")
    program = f"{inspect.getsource(_print_grpc_health)}\n{_print_grpc_health.__name__}()"

    def look() -> None:
        timeout = _time_left()
        command = [sys.executable, "-c", program, target, service, "tls" if tls else "plain", str(timeout)]
        _, output = _run_program(command, timeout, wants_output=True)
        if output.strip() != "SERVING":
            raise HealthCheckError(f"said {output.strip() or 'nothing'}, expected SERVING")

    return Check(f"grpc_check({target!r}, {service!r})" if service else f"grpc_check({target!r})", look)


def _print_grpc_health() -> None:
    """Make the call, in a process that knows nothing of this package: request and answer have one field each."""
    import sys  # noqa: PLC0415 - the source of this function is a program

    import grpc  # noqa: PLC0415 - likewise

    target, service, transport, timeout = sys.argv[1:]
    is_tls, name = transport == "tls", service.encode()
    channel = grpc.secure_channel(target, grpc.ssl_channel_credentials()) if is_tls else grpc.insecure_channel(target)
    request = b"\x0a" + bytes([len(name)]) + name if name else b""  # field 1, a string
    with channel:
        try:
            answer = channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=float(timeout))
        except grpc.RpcError as error:
            print(error.code().name)  # noqa: T201 - how a program answers
            return
    number = answer[1] if answer[:1] == b"\x08" else 0  # field 1, an enum; left out if it is 0
    statuses = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
    print(statuses[number] if number < len(statuses) else f"status {number}")  # noqa: T201 - likewise


def command_check(argv: Sequence[str]) -> Check:
    """Run a program, without a shell; the dependency is healthy if it ends with exit code 0.

    Its output is thrown away. If it takes too long, it is killed with all that it has started. Arguments
    are never shown, since they may hold secrets.

    Args:
        argv: the program and its arguments, as a list.
    """
    is_list = isinstance(argv, (list, tuple)) and all(isinstance(argument, str) for argument in argv)
    is_command = is_list and bool(argv) and _is_text(argv[0]) and not any("\0" in argument for argument in argv)
    shown = argv if isinstance(argv, str) else type(argv).__name__
    _require(is_command, "command_check: argv", shown, "a list of strings, the program first; there is no shell")

    def look() -> None:
        code, _ = _run_program(argv, _time_left())
        if code != 0:
            raise HealthCheckError(f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}")

    return Check(f"command_check([{argv[0]!r}{', ...' if argv[1:] else ''}])", look)


def _run_program(command: Sequence[str], timeout: float, *, wants_output: bool = False) -> tuple[int, str]:
    """Run a program; return its exit code and, if wanted, its output."""
    with subprocess.Popen(  # noqa: S603 - no shell, and the user's own program or ours
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if wants_output else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError from error
    return process.returncode, output or ""


def heartbeat(ttl: float) -> Check:
    """Expect reports: the dependency is healthy if ``breaker.heartbeat()`` was called in the last ``ttl`` seconds.

    Silence is failure, also from the beginning, and after the store has lost its data.

    Args:
        ttl: longest silence in seconds, up to seven days.
    """
    is_ttl = isinstance(ttl, (int, float)) and not isinstance(ttl, bool) and 0 < ttl <= LONGEST_SILENCE
    _require(is_ttl, "heartbeat: ttl", ttl, f"a positive number of seconds up to {LONGEST_SILENCE:g}")

    def look() -> None:
        run = _run.get()
        if run is None:
            raise ConfigurationError("a heartbeat belongs to a breaker: give it to the breaker's probe()")
        age = run.last_heartbeat()
        if age is None:
            raise HealthCheckError("no heartbeat was reported")
        if age > ttl:
            raise HealthCheckError(f"the last report is {age:.1f} s old")

    return Check(f"heartbeat(ttl={ttl:g})", look)


# --- several checks as one ------------------------------------------------------------------------------


def all_of(*checks: Callable[[], Any]) -> Check:
    """Run several checks side by side; the dependency is healthy if all succeed. The first failure decides.

    Args:
        checks: checks of this package or functions of one's own, coroutine functions too.
    """
    return _Combined("all_of", checks)


def any_of(*checks: Callable[[], Any]) -> Check:
    """Run several checks side by side; the dependency is healthy if one succeeds. The first success decides.

    Args:
        checks: checks of this package or functions of one's own, coroutine functions too.
    """
    return _Combined("any_of", checks)


class _Combined(Check):
    def __init__(self, name: str, functions: tuple[Callable[[], Any], ...]) -> None:
        for function in functions or (None,):
            if not callable(function):
                raise ConfigurationError(f"{name}({function!r}): allowed are one or more checks or functions")
        super().__init__(f"{name}({', '.join(map(_name_of, functions))})", self._all if name == "all_of" else self._any)
        self._functions = functions
        self._threads: list[threading.Thread] = []

    def __call__(self) -> None:
        self._look()  # its errors name the member that has failed

    def _all(self) -> None:
        for failure in filter(None, self._answers()):
            raise failure

    def _any(self) -> None:
        failures = []
        for failure in self._answers():
            if failure is None:
                return
            failures.append(str(failure))
        raise HealthCheckError("; ".join(failures))

    def _answers(self) -> Iterator[HealthCheckError | None]:
        """Run all side by side; yield the failure of each, None for success, as they end."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MOST_HANGING * len(self._functions):
            raise HealthCheckError(f"{self}: {len(self._threads)} earlier checks hang")
        answers: SimpleQueue[HealthCheckError | None] = SimpleQueue()
        for function in self._functions:
            arguments = (_put_failure, function, answers)
            thread = threading.Thread(target=copy_context().run, args=arguments, name=f"{function}", daemon=True)
            self._threads.append(thread)
            thread.start()
        for _ in self._functions:
            try:
                failure = answers.get(timeout=_time_left())
            except Empty:
                failure = HealthCheckError(f"{self}: no answer in time")
            yield failure


def _put_failure(function: Callable[[], Any], answers: SimpleQueue[HealthCheckError | None]) -> None:
    failure = None
    try:
        run_check(function)
    except HealthCheckError as error:
        failure = error
    except BaseException as error:  # noqa: BLE001 - a check that raises anything has failed
        failure = HealthCheckError(f"{_name_of(function)}: {type(error).__name__}")
    answers.put(failure)


def _name_of(function: Callable[[], Any]) -> str:
    return getattr(function, "__qualname__", repr(function))
