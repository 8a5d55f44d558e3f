"""The circuit breaker pattern's textbook example, with real services.

Service A calls service B; B fails. A answers from another source, else from its cache, else fails at once; A does not
crash; its other APIs keep their speed; B is checked periodically and used again by itself.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resilient_tasks import BreakerOpenError
from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import Worker, start_beat, start_worker, wait_until
from workers.stack import FlakyService, start_service

MODULE = "tests.integration.textbook"
MANY = 40


class ServiceA:
    """Service A as its clients and its operator see it."""

    def __init__(self, project: ModuleType, worker: Worker) -> None:
        self.breaker = project.b
        self.resilience = project.resilience
        self.worker = worker
        self._tasks = project

    def look_up(self, item: str) -> Any:
        return self._tasks.look_up.delay(item).get(timeout=TIMEOUT)

    def source_of(self, item: str) -> tuple[Any, str]:
        """Look something up; return the answer and the fallback that gave it."""
        result = self._tasks.look_up.delay(item)
        return result.get(timeout=TIMEOUT), self.resilience.provenance(result.id).source

    def look_up_at_once(self, item: str, count: int) -> list[Any]:
        return [result.get(timeout=TIMEOUT) for result in [self._tasks.look_up.delay(item) for _ in range(count)]]

    def seconds_of_other_apis(self, *, beside: str) -> float:
        """Return how long forty other tasks take, with as many look-ups in between."""
        started, results = time.monotonic(), []
        for number in range(MANY):
            self._tasks.look_up.delay(beside)
            results.append(self._tasks.other_api.delay(number))
        assert [result.get(timeout=TIMEOUT) for result in results] == list(range(MANY))
        return time.monotonic() - started


@pytest.fixture
def b(tmp_path: Path) -> Iterator[FlakyService]:
    service = start_service(tmp_path)
    yield service
    service.program.stop()


@pytest.fixture
def a(_shop: Shop, b: FlakyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceA]:
    env = {
        "TEXTBOOK_B_URL": b.environment["ACCOUNTS_URL"],
        "TEXTBOOK_BROKER_URL": _shop.server.url(6),
        "TEXTBOOK_BACKEND_URL": _shop.server.url(7),
    }
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    project = importlib.import_module(MODULE)
    beat = start_beat(MODULE, directory=tmp_path, env=env)
    worker = start_worker(MODULE, name="a", directory=tmp_path, env=env, arguments=["--without-mingle"])
    yield ServiceA(project, worker.wait_until_ready())
    for program in (beat, worker):
        program.kill()
        print(f"--- {program.name}\n{program.output()}")
    project.resilience.fleet.close()


def _calls(b: FlakyService) -> int:
    return sum(b.stats()["accounts"]["calls"].values())


def _probes(b: FlakyService, health: str) -> int:
    return int(b.stats()["accounts"]["probes"].get(health, 0))


def test_the_textbook_example(a: ServiceA, b: FlakyService) -> None:
    assert {item: a.look_up(item) for item in "12"} == {
        item: f"accounts did GET /accounts/items/{item}" for item in "12"
    }
    with_b = a.seconds_of_other_apis(beside="2")
    wait_until(lambda: _calls(b) == 2 + MANY, timeout=TIMEOUT, what="all look-ups to have reached B")

    b.make("accounts", "hang")
    failures = a.breaker.policy.consecutive_failures
    assert a.look_up_at_once("1", failures) == ["1 from the other source"] * failures
    wait_until(lambda: a.breaker.state == "OPEN", timeout=TIMEOUT, what="A to give B up")
    before = _calls(b)
    assert a.source_of("1") == ("1 from the other source", "other_source")
    assert a.source_of("2") == ("accounts did GET /accounts/items/2", "cached")
    with pytest.raises(BreakerOpenError):
        a.look_up("3")
    wait_until(lambda: a.seconds_of_other_apis(beside="2") < 3 * with_b, timeout=TIMEOUT, what="the usual speed")
    wait_until(lambda: _probes(b, "hang") >= 3, timeout=TIMEOUT, what="B to be checked again and again")
    assert _calls(b) == before, "only by probes"

    b.make("accounts", "up")
    wait_until(lambda: a.breaker.state == "CLOSED", timeout=TIMEOUT, what="B to be used again")
    assert a.look_up("3") == "accounts did GET /accounts/items/3"
    assert a.worker.running
    assert _probes(b, "up") >= a.breaker.policy.trial_calls
