"""Schedulers that keep their entries in a database: django-celery-beat and redbeat, as real beats run them."""

from __future__ import annotations

import itertools
import json
import math
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from resilient_tasks import Resilience
from resilient_tasks.worker.context import runtime_of
from workers.processes import PROJECT, Program, Server, start_beat, start_valkey, start_worker, wait_until

MODULE = "tests.integration.timetable"
SCHEDULERS = {
    "django": "django_celery_beat.schedulers:DatabaseScheduler",
    "redbeat": "redbeat.RedBeatScheduler",
}
TIMEOUT = 120.0  # seconds; what is waited for comes true in a second or two on an idle machine
ENTRY = "resilient-tasks-tick"
SENT = f"Sending due task {ENTRY}"

MIGRATE = "django.core.management.call_command('migrate', verbosity=0)"
ADD_BY_HAND = {
    "django": (
        "from django_celery_beat.models import IntervalSchedule, PeriodicTask; "
        "second = IntervalSchedule.objects.create(every=1, period='seconds'); "
        "PeriodicTask.objects.create(name='by hand', task='resilient_tasks.tick', interval=second)"
    ),
    "redbeat": (
        "from celery.schedules import schedule; from redbeat import RedBeatSchedulerEntry; "
        "RedBeatSchedulerEntry('by hand', 'resilient_tasks.tick', schedule(1), app=timetable.app).save()"
    ),
}


class Timetable:
    """The project with a server of its own, and what its beat does there."""

    def __init__(self, kind: str, server: Server, directory: Path) -> None:
        self.kind = kind
        self.client = redis.Redis.from_url(server.url(), decode_responses=True)
        self.directory = directory
        self.database = directory / "database"
        self.env = {
            "TIMETABLE_URL": server.url(),
            "TIMETABLE_SCHEDULER": SCHEDULERS[kind],
            "TIMETABLE_DATABASE": str(self.database),
        }
        self._count = itertools.count(1)
        self._programs: list[Program] = []
        self.app = Celery("timetable", broker=server.url(), set_as_current=False)
        self.resilience = Resilience(self.app, store_timeout=20)
        self.payments = self.resilience.breaker("payments", open_duration=0.5, open_jitter=0.0)
        self.run(MIGRATE)

    def run(self, code: str) -> None:
        """Run some Python in the project."""
        command = [sys.executable, "-c", f"import django.core.management; import {MODULE} as timetable; {code}"]
        subprocess.run(command, cwd=PROJECT, env={**os.environ, **self.env}, check=True)

    def beat(self) -> Program:
        beat = start_beat(MODULE, name=f"beat{next(self._count)}", directory=self.directory, env=self.env)
        self._programs.append(beat)
        return beat

    def worker(self) -> Program:
        name = f"worker{next(self._count)}"
        worker = start_worker(MODULE, name=name, directory=self.directory, env=self.env, pool="solo")
        self._programs.append(worker)
        return worker.wait_until_ready()

    def ticks(self) -> int:
        return int(self.client.llen("resilient.control"))

    def beat_has_looked(self, times: int) -> None:
        """Wait until beat has looked so often whether anything is due."""
        seen_at = -math.inf
        for _ in range(times):
            wait_until(partial(self._looked_after, seen_at), timeout=TIMEOUT, what="beat to look")
            seen_at = self._seen_at()

    def _looked_after(self, moment: float) -> bool:
        return self._seen_at() > moment + 0.2  # it looks no more often than every half second

    def _seen_at(self) -> float:
        age = self.resilience.fleet.ledger.tick_sender_age(runtime_of(self.app).tick_scope)
        return -math.inf if age is None else time.monotonic() - age

    def entry(self) -> dict[str, Any]:
        """Return the entry as the scheduler keeps it: name of the task, queue and expiry."""
        if self.kind == "redbeat":
            definition = json.loads(self.client.hget(f"redbeat:{ENTRY}", "definition") or "")
            options = definition["options"]
            return {"task": definition["task"], "queue": options["queue"], "expires": options["expires"]}
        with sqlite3.connect(self.database) as connection:
            columns = "task, queue, expire_seconds"
            table = "django_celery_beat_periodictask"
            [row] = connection.execute(f"SELECT {columns} FROM {table} WHERE name = ?", (ENTRY,))
        return dict(zip(("task", "queue", "expires"), row, strict=True))

    def stop(self) -> None:
        for program in self._programs:
            program.stop()  # or redbeat keeps its lock
            print(f"--- {program.name}\n{program.output()}")
        self.resilience.fleet.close()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    return wait_until(condition, timeout=TIMEOUT, what=what)


@pytest.fixture(params=list(SCHEDULERS))
def timetable(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Timetable]:
    server = start_valkey(tmp_path / "server")
    timetable = Timetable(request.param, server, tmp_path)
    yield timetable
    timetable.stop()
    server.stop()


def test_ticks_wait_for_no_more_than_there_is_to_do(timetable: Timetable) -> None:
    beat = timetable.beat()
    timetable.beat_has_looked(times=3)
    assert timetable.ticks() == 0
    assert SENT not in beat.output()
    assert timetable.entry() == {
        "task": "resilient_tasks.tick",
        "queue": "resilient.control",
        "expires": 2 if timetable.kind == "django" else 1.5,  # the one keeps whole seconds
    }
    lines = len(beat.output().splitlines())
    timetable.beat_has_looked(times=3)
    assert len(beat.output().splitlines()) == lines, "it logs nothing while nothing is due"

    timetable.payments.trip(reason="test")
    wait_for(lambda: timetable.ticks() == 3, "ticks, of which no worker takes any")
    timetable.beat_has_looked(times=3)
    assert timetable.ticks() == 3
    assert all(json.loads(tick)["headers"]["expires"] for tick in timetable.client.lrange("resilient.control", 0, -1))

    timetable.worker()
    wait_for(lambda: timetable.payments.snapshot().state == "CLOSED", "the breaker to heal")
    wait_for(lambda: timetable.ticks() == 0, "the worker to take all ticks")
    assert "Traceback" not in beat.output()


def test_a_beat_that_starts_again_finds_its_one_entry(timetable: Timetable) -> None:
    timetable.beat()
    timetable.beat_has_looked(times=1)
    first = timetable.entry()
    timetable.stop()
    timetable.run(ADD_BY_HAND[timetable.kind])
    beat = timetable.beat()
    beat.wait_for_output("beat ignores the entry 'by hand'", timeout=TIMEOUT)
    timetable.payments.trip(reason="test")
    beat.wait_for_output(SENT, timeout=TIMEOUT)
    timetable.beat_has_looked(times=3)
    assert timetable.entry() == first
    assert "Sending due task by hand" not in beat.output()
