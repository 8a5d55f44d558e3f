"""The catalogue of health checks, each against a real server, socket or program."""

from __future__ import annotations

import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest

from resilient_tasks import ConfigurationError
from resilient_tasks.checks import (
    MOST_HANGING,
    HealthCheckError,
    Run,
    all_of,
    any_of,
    command_check,
    consul_check,
    grpc_check,
    heartbeat,
    http_check,
    run_probe,
    tcp_check,
)
from resilient_tasks.core.classification import dependency_errors, judge
from resilient_tasks.core.model import Outcome
from tests.support.doubles import wait_until
from tests.support.health_server import HealthServer, start_health_server

BRIEF = 0.2  # seconds; what must run out does so quickly


def within(seconds: float, last_heartbeat: Callable[[], float | None] = lambda: None) -> Run:
    return Run(time.monotonic() + seconds, last_heartbeat)


def failure(check: Any, run: Run | None = None) -> HealthCheckError:
    with pytest.raises(HealthCheckError) as raised:
        run_probe(check, run or within(30))
    return raised.value


def ok() -> None:
    pass


# --- http ---------------------------------------------------------------------------------------------


class Service:
    """An HTTP service that answers by path, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.asked: list[tuple[str, str, dict[str, str]]] = []
        self.wakes = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                service.asked.append((self.command, self.path, dict(self.headers)))
                if self.path == "/hangs":
                    service.wakes.wait(60)
                    return
                status, headers, body = service.answers.get(self.path, (200, {}, b""))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_HEAD = answer  # noqa: N815 - http.server looks for these names

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.wakes.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


@pytest.fixture
def silence() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_http_asks_what_it_was_configured_to(service: Service) -> None:
    http_check(f"{service.url}/health?deep=1", method="head", headers={"X-Team": "shop"})()
    method, path, headers = service.asked[0]
    assert (method, path, headers["X-Team"]) == ("HEAD", "/health?deep=1", "shop")


def test_http_sends_user_and_password_and_shows_neither(service: Service) -> None:
    service.answers["/?key=s3cret"] = (500, {}, b"")
    check = http_check(f"http://ada:pa%20ss@127.0.0.1:{service.port}/?key=s3cret")
    message = str(failure(check))
    assert service.asked[0][2]["Authorization"] == "Basic YWRhOnBhIHNz"
    assert message == f"http_check('http://127.0.0.1:{service.port}/'): answered 500, expected 200..299"
    assert repr(check) == f"http_check('http://127.0.0.1:{service.port}/')"


@pytest.mark.parametrize(
    ("status", "expect", "wanted"),
    [
        (404, range(200, 300), "200..299"),
        (302, range(200, 300), "200..299"),
        (200, 204, "204"),
        (500, [204, 200], "200, 204"),
        (201, range(200, 300, 2), "200, 202"),
        (204, range(200, 300), ""),
        (302, 302, ""),
        (401, {200, 401}, ""),
    ],
)
def test_http_fails_on_any_status_but_those_expected(service: Service, status: int, expect: Any, wanted: str) -> None:
    service.answers["/"] = (status, {"Location": f"{service.url}/elsewhere"}, b"")
    if wanted:
        assert f"answered {status}, expected {wanted}" in str(failure(http_check(service.url, expect)))
    else:
        http_check(service.url, expect)()
    assert [path for _, path, _ in service.asked] == ["/"]


def test_http_brings_back_retry_after(service: Service) -> None:
    service.answers["/"] = (503, {"Retry-After": "17"}, b"")
    verdict = judge(dependency_errors, (), (), failure(http_check(service.url)))
    assert (verdict.outcome, verdict.cause, verdict.retry_after) == (Outcome.FAILURE, "HTTP 503", 17.0)


def test_http_says_what_went_wrong_on_the_way(service: Service, refusing: int, silence: int) -> None:
    assert str(failure(http_check(f"http://127.0.0.1:{refusing}/x"))).endswith("/x'): Connection refused")
    assert str(failure(http_check(f"http://127.0.0.1:{silence}/"), within(BRIEF))).endswith("no answer in time")
    assert str(failure(http_check(f"{service.url}/hangs"), within(BRIEF))).endswith("no answer in time")
    assert "SSL" in str(failure(http_check(f"https://127.0.0.1:{service.port}/")))


def test_http_does_not_take_everything_for_an_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def babble() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"220 mail.example ESMTP\r\n\r\n")

        threading.Thread(target=babble, daemon=True).start()
        check = http_check(f"http://127.0.0.1:{listener.getsockname()[1]}/")
        assert "no valid answer (BadStatusLine)" in str(failure(check))


# --- tcp ----------------------------------------------------------------------------------------------


def test_tcp(silence: int, refusing: int) -> None:
    tcp_check("127.0.0.1", silence)()
    assert str(failure(tcp_check("127.0.0.1", refusing))) == f"tcp_check('127.0.0.1', {refusing}): Connection refused"
    assert "tcp_check('no.such.host.invalid', 80): " in str(failure(tcp_check("no.such.host.invalid", 80)))


# --- grpc ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def health_server() -> Iterator[HealthServer]:
    with start_health_server() as server:
        yield server


def test_grpc(health_server: HealthServer) -> None:
    target = health_server.target
    health_server.set("", "SERVING")
    health_server.set("shop.Payments", "SERVING")
    grpc_check(target)()
    grpc_check(target, "shop.Payments")()

    health_server.set("shop.Payments", "NOT_SERVING")
    message = str(failure(grpc_check(target, "shop.Payments")))
    assert message == f"grpc_check('{target}', 'shop.Payments'): said NOT_SERVING, expected SERVING"
    health_server.set("shop.Payments", "UNKNOWN")
    assert "said UNKNOWN" in str(failure(grpc_check(target, "shop.Payments")))
    assert "said NOT_FOUND" in str(failure(grpc_check(target, "unknown")))


def test_grpc_says_what_went_wrong_on_the_way(refusing: int, silence: int) -> None:
    assert "said UNAVAILABLE" in str(failure(grpc_check(f"127.0.0.1:{refusing}")))
    assert "said UNAVAILABLE" in str(failure(grpc_check(f"127.0.0.1:{refusing}", tls=True)))
    assert "no answer in time" in str(failure(grpc_check(f"127.0.0.1:{silence}"), within(BRIEF)))


def test_grpc_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'resilient_tasks\[grpc\]'"):
        grpc_check("localhost:50051")


# --- command ------------------------------------------------------------------------------------------


def test_command() -> None:
    command_check([sys.executable, "-c", ""])()
    check = command_check([sys.executable, "-c", "raise SystemExit(3)", "--password=s3cret"])
    assert str(failure(check)) == f"command_check([{sys.executable!r}, ...]): ended with exit code 3"
    killed = command_check([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert "was killed by signal 9" in str(failure(killed))
    assert "No such file or directory" in str(failure(command_check(["/no/such/program"])))


def test_a_command_that_takes_too_long_is_killed_with_all_that_it_has_started(tmp_path: Any) -> None:
    started = tmp_path / "started"
    check = command_check(["sh", "-c", f"sleep 60 & echo $! > {started}; wait"])

    def is_killed_after_it_has_begun() -> bool:
        assert "no answer in time" in str(failure(check, within(1)))
        return bool(started.exists() and started.read_text())

    wait_until(is_killed_after_it_has_begun)
    pid = int(started.read_text())
    wait_until(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


# --- heartbeat ----------------------------------------------------------------------------------------


def test_heartbeat() -> None:
    run_probe(heartbeat(30), within(30, lambda: 29.9))
    assert str(failure(heartbeat(30), within(30, lambda: 31.25))) == "heartbeat(ttl=30): the last report is 31.2 s old"
    assert str(failure(heartbeat(0.5), within(30, lambda: None))) == "heartbeat(ttl=0.5): no heartbeat was reported"


def test_a_heartbeat_belongs_to_a_breaker() -> None:
    outcome: list[BaseException] = []

    def alone() -> None:
        try:
            heartbeat(30)()
        except ConfigurationError as error:
            outcome.append(error)

    thread = threading.Thread(target=alone)  # a context without any probe
    thread.start()
    thread.join()
    assert "give it to the breaker's probe()" in str(outcome[0])


# --- consul -------------------------------------------------------------------------------------------


def test_consul(service: Service) -> None:
    path = "/v1/health/service/pay%2Fments?passing"
    check = consul_check("pay/ments", address=f"{service.url}/", token="t0ken")
    service.answers[path] = (200, {}, b'[{"Service": {"ID": "payments-1"}}]')
    check()
    assert (service.asked[0][1], service.asked[0][2]["X-Consul-Token"]) == (path, "t0ken")

    service.answers[path] = (200, {}, b"[]")
    message = str(failure(check))
    assert message == f"consul_check('pay/ments'): no instance passes its checks, says Consul at {service.url}/"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ((403, {}, b"Permission denied"), "answered 403"),
        ((200, {}, b"<html>"), "no JSON"),
        ((200, {}, b'{"error": 1}'), "no list of instances"),
    ],
)
def test_consul_may_be_unwell_itself(service: Service, answer: Any, found: str) -> None:
    service.answers["/v1/health/service/payments?passing"] = answer
    assert found in str(failure(consul_check("payments", address=service.url)))


# --- all_of, any_of -----------------------------------------------------------------------------------


def test_all_of(silence: int, refusing: int) -> None:
    well, ill = tcp_check("127.0.0.1", silence), tcp_check("127.0.0.1", refusing)
    all_of(well, ok)()
    assert str(failure(all_of(well, ill))) == f"{ill!r}: Connection refused"
    assert repr(all_of(well, ok)) == f"all_of({well!r}, ok)"


def test_any_of(silence: int, refusing: int) -> None:
    well, ill = tcp_check("127.0.0.1", silence), tcp_check("127.0.0.1", refusing)
    any_of(ill, well)()

    def rude() -> None:
        raise ValueError("with a s3cret")

    message = str(failure(any_of(ill, rude)))
    assert f"{ill!r}: Connection refused" in message
    assert "rude: ValueError" in message
    assert "s3cret" not in message


def test_the_first_to_decide_is_enough(service: Service, refusing: int) -> None:
    slow, ill = http_check(f"{service.url}/hangs"), tcp_check("127.0.0.1", refusing)
    any_of(slow, ok)()
    assert "refused" in str(failure(all_of(slow, ill)))
    assert not service.wakes.is_set(), "the slow one has not been waited for"


def test_members_share_the_time_limit_and_the_heartbeat(service: Service) -> None:
    slow = http_check(f"{service.url}/hangs")
    assert "no answer in time" in str(failure(all_of(slow, ok), within(BRIEF)))
    run_probe(all_of(heartbeat(30), any_of(heartbeat(30), slow)), within(30, lambda: 1.0))


def test_members_run_side_by_side_and_may_be_coroutine_functions() -> None:
    meeting = threading.Barrier(3)

    async def well() -> None:
        meeting.wait(60)

    async def ill() -> None:
        raise OSError("down")

    run_probe(all_of(*[lambda: meeting.wait(60)] * 2, well), within(30))
    assert "ill: OSError" in str(failure(all_of(ok, ill)))


def test_members_that_hang_are_not_piled_up() -> None:
    released = threading.Event()
    check = all_of(lambda: released.wait(60))
    for _ in range(MOST_HANGING):
        assert "no answer in time" in str(failure(check, within(0.001)))
    assert f"{MOST_HANGING} earlier checks hang" in str(failure(check, within(0.001)))
    released.set()
    wait_until(lambda: not any(thread.is_alive() for thread in vars(check)["_threads"]))
    run_probe(check, within(30))


# --- errors -------------------------------------------------------------------------------------------


def test_the_error_is_attributed_to_the_dependency_and_survives_pickle() -> None:
    error = HealthCheckError("http_check('http://b/'): answered 503", 503, {"Retry-After": "5"})
    assert dependency_errors(error) is Outcome.FAILURE
    restored = pickle.loads(pickle.dumps(error))
    assert (str(restored), restored.status_code, restored.headers) == (str(error), 503, {"Retry-After": "5"})


BAD: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (http_check, ("ftp://host/",), r"http_check: url='ftp://host/': allowed is http://"),
    (http_check, ("http:///path",), "url='http:///path'"),
    (http_check, ("http://host:0/",), "url="),
    (http_check, ("http://host:99999/",), "url="),
    (http_check, ("http://host/a b",), "url="),
    (http_check, ("http://host/\r\nX: y",), "url="),
    (http_check, ("http://höst/",), "in ASCII"),
    (http_check, (None,), "url="),
    (http_check, ("http://h/", 99), "expect=99: allowed is a status"),
    (http_check, ("http://h/", True), "expect=True"),
    (http_check, ("http://h/", []), "expect="),
    (http_check, ("http://h/", "200"), "expect='200'"),
    (http_check, ("http://h/", range(600, 700)), "expect="),
    (http_check, ("http://h/", 200, "GET\r\n"), "method="),
    (http_check, ("http://h/", 200, 7), "method=7"),
    (http_check, ("http://h/", 200, "GET", "X: y"), "headers"),
    (http_check, ("http://h/", 200, "GET", {"X": "y\r\nZ: 1"}), "header 'X'"),
    (http_check, ("http://h/", 200, "GET", {"X Y": "y"}), "header 'X Y'"),
    (http_check, ("http://h/", 200, "GET", {"X": 1}), "header 'X'"),
    (tcp_check, ("", 80), "host=''"),
    (tcp_check, ("host", 0), "port=0: allowed is an integer from 1 to 65535"),
    (tcp_check, ("host", "80"), "port='80'"),
    (grpc_check, ("",), "target=''"),
    (grpc_check, ("host:1", "s" * 128), "service="),
    (command_check, ("ls -l",), "argv='ls -l': allowed is a list of strings"),
    (command_check, ([],), "argv="),
    (command_check, (["ls", 1],), "argv="),
    (command_check, (["ls", "\0"],), "argv="),
    (heartbeat, (0,), "ttl=0"),
    (heartbeat, (float("nan"),), "ttl=nan"),
    (heartbeat, (8 * 24 * 3600,), "up to 604800"),
    (heartbeat, ("30",), "ttl='30'"),
    (consul_check, ("",), "service=''"),
    (consul_check, ("s", "consul:8500"), "address='consul:8500'"),
    (consul_check, ("s", "http://c", "a\nb"), "token"),
    (all_of, (), "all_of"),
    (any_of, (ok, "http://host/"), "any_of"),
]


@pytest.mark.parametrize(("function", "arguments", "message"), BAD)
def test_mistakes_are_found_at_once(function: Callable[..., Any], arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        function(*arguments)


def test_mistakes_show_no_secrets() -> None:
    for make in (
        lambda: http_check("ftp://ada:s3cret@host/"),
        lambda: http_check("ftp://host/?key=s3cret"),
        lambda: http_check("http://h/", headers={"Authorization": "s3cret\n"}),
        lambda: consul_check("s", token="s3cret\n"),
        lambda: command_check(["pg_isready", "s3cret\0"]),
    ):
        with pytest.raises(ConfigurationError) as raised:
            make()
        assert "s3cret" not in str(raised.value)
