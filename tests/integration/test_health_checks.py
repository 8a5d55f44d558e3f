"""Health checks by real workers: two of them and beat, shared by all tests of this module; each has its own breaker."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.core.model import State
from tests.integration.conftest import TIMEOUT, Shop
from tests.support.health_server import HealthServer, start_health_server
from workers.processes import Program, Worker


class Service:
    """What the clinic looks at: an HTTP service that also plays Consul, a gRPC service, a file."""

    def __init__(self, file: Path, grpc: HealthServer) -> None:
        self.status = 200
        self.instances: list[str] = ["ward-1"]
        self.file = file
        self.grpc = grpc
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_consul = self.path == "/v1/health/service/ward?passing" and self.headers["X-Consul-Token"] == "t0ken"
                self.answer(200 if is_consul else service.status, json.dumps(service.instances).encode())

            def do_HEAD(self) -> None:
                self.answer(204 if self.headers["X-Ward"] == "7" else 404, b"")

            def answer(self, status: int, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        self.get_well()

    def get_well(self) -> None:
        self.instances = ["ward-1"]
        self.grpc.set("clinic.Ward", "SERVING")
        self.file.touch()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


class Clinic(Shop):
    """The clinic with its workers and its service."""

    service: Service
    workers: list[Worker]
    timekeeper: Program

    def asked(self, dependency: str) -> list[float]:
        """When a dependency was checked, in order."""
        return [float(at) for at in self.side.lrange(f"asked:{dependency}", 0, -1)]

    def wait_for(self, breaker: str, state: State) -> None:
        """Wait until a breaker is in ``state``."""
        self.wait(lambda: getattr(self, breaker).snapshot().state is state, f"{breaker} to be {state}")

    def wait_for_looks(self, dependency: str, more: int) -> None:
        """Wait until a dependency has been checked so many times more."""
        so_far = len(self.asked(dependency))
        self.wait(lambda: len(self.asked(dependency)) >= so_far + more, f"{dependency} to be checked")

    def announcements(self, breaker: str, text: str) -> list[str]:
        """What all workers have logged about those transitions of a breaker whose lines contain a text."""
        lines = [line for worker in self.workers for line in worker.output().splitlines()]
        return [line for line in lines if f"breaker {breaker}: " in line and text in line]

    def wait_for_announcement(self, breaker: str, text: str) -> None:
        """Wait until such a line is there."""
        self.wait(lambda: self.announcements(breaker, text), f"{breaker} to be announced: {text}")


@pytest.fixture(scope="module")
def grpc_health() -> Iterator[HealthServer]:
    with start_health_server() as server:
        yield server


@pytest.fixture(scope="module")
def clinic(_shop: Shop, grpc_health: HealthServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    directory: Path = tmp_path_factory.mktemp("clinic")
    service = Service(directory / "well", grpc_health)
    env = {
        "CLINIC_SERVICE": f"127.0.0.1:{service.http.server_port}",
        "CLINIC_GRPC": grpc_health.target,
        "CLINIC_FILE": str(service.file),
    }
    os.environ.update(env)
    clinic = Clinic(_shop.server, directory, module="tests.integration.clinic")
    clinic.env.update(env)
    clinic.service = service
    clinic.clear()
    clinic.remote.heartbeat()
    clinic.timekeeper = clinic.beat()
    clinic.workers = [clinic.worker(), clinic.worker()]
    yield clinic
    clinic.stop()
    service.stop()


def test_an_active_check_opens_before_any_task_has_failed(clinic: Clinic) -> None:
    assert clinic.treat.delay(0).get(timeout=TIMEOUT) == 0
    opened = ""
    while "answered 503, expected 200..299" not in opened:  # a machine that is too slow to answer opens it as well
        clinic.service.status = 200
        clinic.wait_for("web", State.CLOSED)
        before = len(clinic.announcements("web", "CLOSED -> OPEN"))
        clinic.service.status = 503
        clinic.wait(lambda: len(clinic.announcements("web", "CLOSED -> OPEN")) > before, "it to open")  # noqa: B023
        [opened] = clinic.announcements("web", "CLOSED -> OPEN")[before:]
    assert "health check failed 2 times in a row, last: probe: http_check('http://127.0.0.1:" in opened
    clinic.wait_until_known("web")
    results = [clinic.treat.delay(number) for number in range(5)]
    clinic.wait(lambda: clinic.waiting("web") == 5, "all to wait")
    assert (clinic.web.snapshot().failures, clinic.side.get("treated")) == (0, "1")
    assert len(clinic.announcements("web", "CLOSED -> OPEN")) == before + 1

    clinic.service.status = 200
    clinic.wait(lambda: all(result.state == "SUCCESS" for result in results), "all to finish")
    assert clinic.web.snapshot().failures == 0


ILL: list[tuple[Callable[[Service], object], str]] = [
    (lambda service: service.grpc.set("clinic.Ward", "NOT_SERVING"), "'clinic.Ward'): said NOT_SERVING"),
    (lambda service: service.instances.clear(), "consul_check('ward'): no instance passes its checks"),
    (lambda service: service.file.unlink(), "command_check(['test', ...]): ended with exit code 1"),
]


def test_the_whole_catalogue_works_inside_a_worker(clinic: Clinic) -> None:
    clinic.thorough.trip(reason="test")
    clinic.wait_for_announcement("thorough", "-> CLOSED: 1 of 1 trials succeeded")
    for fall_ill, found in ILL:
        fall_ill(clinic.service)
        clinic.thorough.trip(reason="test")
        clinic.wait(lambda: found in clinic.thorough.snapshot().reason, found)  # noqa: B023 - called at once
        clinic.service.get_well()
        clinic.wait_for("thorough", State.CLOSED)


def test_so_many_probes_in_a_row_close_it_with_time_between_them(clinic: Clinic) -> None:
    assert clinic.asked("convalescent") == [], "it is not active"
    clinic.set_health("convalescent", "down")
    clinic.convalescent.trip(reason="test")
    clinic.wait_for_looks("convalescent", more=2)
    clinic.wait_for_announcement("convalescent", "1 of 6 trials failed, last: probe: ConnectionError")

    clinic.set_health("convalescent", "up")
    clinic.wait_for_announcement("convalescent", "-> CLOSED: 6 of 6 trials succeeded")
    first, *_, last = clinic.asked("convalescent")[-6:]
    assert last - first > 2 * clinic.INTERVAL, "two workers took turns"


def test_silence_opens_and_a_heartbeat_closes(clinic: Clinic) -> None:
    def heals() -> bool:
        clinic.remote.heartbeat()
        return clinic.remote.snapshot().state is State.CLOSED

    clinic.wait(heals, "the heartbeat to be received")
    silent_since = clinic.remote.snapshot().epoch
    clinic.wait(lambda: clinic.remote.snapshot().epoch > silent_since, "silence to be noticed")
    found = "CLOSED -> OPEN: health check failed 1 times in a row, last: probe: heartbeat(ttl=3): the last report is "
    clinic.wait_for_announcement("remote", found)
    clinic.wait(heals, "the heartbeat to be received again")


def test_a_check_that_hangs_delays_no_other(clinic: Clinic) -> None:
    clinic.set_health("comatose", "hang")
    found = "CLOSED -> OPEN: health check failed 3 times in a row, last: probe: no answer within 0.4 s"
    clinic.wait_for_announcement("comatose", found)
    clinic.wait_for_looks("lively", more=3)
    clinic.wait(lambda: clinic.lively.snapshot().failed_checks == 0, "none of them to have failed")
    clinic.set_health("comatose", "up")
    clinic.wait_for("comatose", State.CLOSED)


def test_an_operator_is_obeyed(clinic: Clinic) -> None:
    clinic.set_health("lively", "down")
    clinic.lively.shadow(reason="first week")
    clinic.wait(lambda: clinic.lively.snapshot().would_open, "it to report that it would have opened")
    assert clinic.lively.snapshot().state is State.SHADOW

    clinic.open("lively")
    looks = len(clinic.asked("lively"))
    clinic.wait_for_looks("comatose", more=3)
    assert len(clinic.asked("lively")) <= looks + 1, "one may have been under way"
    assert clinic.lively.snapshot().state is State.FORCED_OPEN

    clinic.lively.reset()
    clinic.wait_for("lively", State.OPEN)
    clinic.set_health("lively", "up")
    clinic.wait_for("lively", State.CLOSED)


def test_workers_check_without_beat(clinic: Clinic) -> None:
    clinic.timekeeper.stop()
    clinic.wait_for_looks("lively", more=5)
