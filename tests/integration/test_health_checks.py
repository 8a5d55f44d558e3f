"""Health checks by real workers: two of them and beat, shared by all tests of this module; each has its own breaker."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.core.model import State
from tests.integration.conftest import Shop
from workers.processes import Program, Worker


class Service:
    """An HTTP service that is well or not."""

    def __init__(self) -> None:
        self.status = 200
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(service.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()


class Clinic(Shop):
    """The clinic with its workers and its service."""

    service: Service
    workers: list[Worker]
    timekeeper: Program

    def asked(self, patient: str) -> list[float]:
        """When a patient was looked after, in order."""
        return [float(at) for at in self.side.lrange(f"asked:{patient}", 0, -1)]

    def wait_for(self, breaker: str, state: State) -> str:
        """Wait until a breaker is in ``state`` and return the reason."""
        subject = getattr(self, breaker)
        self.wait(lambda: subject.snapshot().state is state, f"{breaker} to be {state}")
        return str(subject.snapshot().reason)

    def wait_for_looks(self, patient: str, more: int) -> None:
        """Wait until a patient has been looked after so many times more."""
        so_far = len(self.asked(patient))
        self.wait(lambda: len(self.asked(patient)) >= so_far + more, f"{patient} to be looked after")

    def announcements(self, breaker: str) -> list[str]:
        """What all workers have logged about the transitions of a breaker."""
        lines = [line for worker in self.workers for line in worker.output().splitlines()]
        return [line for line in lines if f"breaker {breaker}: " in line]


@pytest.fixture(scope="module")
def clinic(_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    service = Service()
    os.environ["CLINIC_SERVICE"] = f"127.0.0.1:{service.server.server_port}"
    directory: Path = tmp_path_factory.mktemp("clinic")
    clinic = Clinic(_shop.server, directory, module="tests.integration.clinic")
    clinic.env["CLINIC_SERVICE"] = os.environ["CLINIC_SERVICE"]
    clinic.service = service
    clinic.clear()
    clinic.remote.heartbeat()
    clinic.timekeeper = clinic.beat()
    clinic.workers = [clinic.worker(), clinic.worker()]
    yield clinic
    clinic.stop()
    service.server.shutdown()
    service.server.server_close()


def test_an_active_check_opens_before_any_task_has_failed(clinic: Clinic) -> None:
    assert clinic.treat.delay(0).get(timeout=60) == 0
    clinic.service.status = 503
    reason = clinic.wait_for("web", State.OPEN)
    results = [clinic.treat.delay(number) for number in range(5)]
    clinic.wait(lambda: clinic.waiting("web") == 5, "all to wait")
    snapshot = clinic.web.snapshot()
    assert reason.startswith("health check failed 2 times in a row, last: probe: http_check('http://127.0.0.1:")
    assert "answered 503, expected 200..299" in reason
    assert (snapshot.failures, clinic.side.get("treated")) == (0, "1")
    opened = [line for line in clinic.announcements("web") if "CLOSED -> OPEN" in line]
    assert len(opened) == 1

    clinic.service.status = 200
    clinic.wait(lambda: all(result.state == "SUCCESS" for result in results), "all to finish")
    assert clinic.web.snapshot().failures == 0


def test_so_many_probes_in_a_row_close_it_with_time_between_them(clinic: Clinic) -> None:
    assert clinic.asked("convalescent") == [], "it is not active"
    clinic.set_health("convalescent", "down")
    clinic.convalescent.trip(reason="test")
    clinic.wait_for_looks("convalescent", more=2)
    assert "1 of 4 trials failed, last: probe: ConnectionError" in "".join(clinic.announcements("convalescent"))

    clinic.set_health("convalescent", "up")
    assert clinic.wait_for("convalescent", State.CLOSED) == "4 of 4 trials succeeded"
    last = clinic.asked("convalescent")[-4:]
    gaps = [later - earlier for earlier, later in pairwise(last)]
    assert min(gaps) > clinic.INTERVAL / 5, "two workers took turns"


def test_silence_opens_and_a_heartbeat_closes(clinic: Clinic) -> None:
    def heals() -> bool:
        clinic.remote.heartbeat()
        return clinic.remote.snapshot().state is State.CLOSED

    clinic.wait(heals, "the heartbeat to be heard")
    silent_since = clinic.remote.snapshot().epoch
    clinic.wait(lambda: clinic.remote.snapshot().epoch > silent_since, "silence to be noticed")
    opened = [line for line in clinic.announcements("remote") if "CLOSED -> OPEN" in line]
    found = "health check failed 1 times in a row, last: probe: heartbeat(ttl=3): the last report is "
    assert found in "".join(opened)
    clinic.wait(heals, "the heartbeat to be heard again")


def test_a_check_that_hangs_delays_no_other(clinic: Clinic) -> None:
    clinic.set_health("comatose", "hang")
    clinic.wait_for_looks("comatose", more=1)
    before = len(clinic.asked("lively"))
    reason = clinic.wait_for("comatose", State.OPEN)
    assert reason == "health check failed 3 times in a row, last: probe: no answer within 0.4 s"
    assert len(clinic.asked("lively")) - before >= 2
    clinic.wait_for_looks("lively", more=3)
    assert clinic.lively.snapshot().failed_checks == 0
    clinic.set_health("comatose", "up")
    clinic.wait_for("comatose", State.CLOSED)


def test_an_operator_is_obeyed(clinic: Clinic) -> None:
    clinic.set_health("lively", "down")
    clinic.lively.shadow(reason="first week")
    clinic.wait(lambda: clinic.lively.snapshot().would_open, "it to tell that it would have opened")
    assert clinic.lively.snapshot().state is State.SHADOW

    clinic.lively.isolate(reason="maintenance")
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
