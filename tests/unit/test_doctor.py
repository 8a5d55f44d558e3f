"""The doctor's checks, each on a deployment with just that wrong."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.core.memory import ServerFacts
from resilient_tasks.operations.doctor import CHECKS, Deployment, Level, TaskFacts, WorkerFacts, examine
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec
from resilient_tasks.worker.bootsteps import rules_of

PAYMENTS, TIMED = Spec("payments"), Spec("payments", BreakerPolicy(slow_call_duration=2.0))
RULES = rules_of(PAYMENTS)
STORE = ServerFacts("store", (7, 0, 15), "redis", "noeviction", maxmemory=10**9, persistent=True)
BROKER = replace(STORE, role="broker")
WORKER = WorkerFacts("celery@one", "1.0", "resilient.control", clock_ahead=0.1, policies={"payments": RULES})
TASK = TaskFacts("charge", ("payments",), defers=True, acks_late=True, time_limit=30.0)
UNBOUNDED = replace(TASK, time_limit=None)
SOUND = Deployment(
    version="1.0",
    control_queue="resilient.control",
    tasks=(TASK,),
    breakers=(PAYMENTS,),
    oldest_waits={"payments": 12.0},
    store=STORE,
    broker=BROKER,
    visibility_timeout=3600.0,
    undecided={},
    clock_ahead=0.1,
    tick_age=1.0,
    tick_sender_age=2.0,
    orphans={},
    workers=(WORKER,),
)


def worker(**facts: Any) -> dict[str, Any]:
    return {"workers": (WORKER, replace(WORKER, name="celery@two", **facts))}


def test_a_sound_deployment_is_well() -> None:
    findings = examine(SOUND)
    assert {finding.level for finding in findings} == {Level.OK}
    assert [finding.check for finding in findings] == list(CHECKS)
    said = {finding.check: finding.what for finding in findings}
    assert (said["store"], said["workers"]) == ("Redis 7.0.15", "1 worker answered")
    assert said["ticks"] == "the last has completed 1 s ago, beat was seen 2 s ago"


@pytest.mark.parametrize(
    ("check", "level", "said", "wrong"),
    [
        ("store", "error", "Redis 6.0.16", {"store": replace(STORE, version=(6, 0, 16))}),
        ("store", "error", "refused", {"store": None, "store_trouble": "refused"}),
        ("broker", "error", "refused", {"broker": None, "broker_trouble": "refused"}),
        ("maxmemory-policy", "error", "allkeys-lru", {"broker": replace(BROKER, policy="allkeys-lru")}),
        ("maxmemory-policy", "warning", "volatile-lru", {"store": replace(STORE, policy="volatile-lru", maxmemory=0)}),
        ("maxmemory", "warning", "the store has no", {"store": replace(STORE, maxmemory=0)}),
        ("persistence", "warning", "broker keeps nothing", {"broker": replace(BROKER, persistent=False)}),
        ("ticks", "error", "the last: 5 min ago", {"tick_age": 300.0}),
        ("ticks", "error", "the last: never", {"tick_age": math.inf}),
        ("ticks", "warning", "last seen: 5 min ago; workers run them", {"tick_sender_age": 300.0}),
        ("ticks", "warning", "last seen: never", {"tick_sender_age": math.inf}),
        ("ticks", "warning", "task our tick sends ticks that do not expire", {"lasting_ticks": ("our tick",)}),
        ("workers", "error", "no worker answers", {"workers": ()}),
        ("control queue", "error", "from other.control", worker(control_queue="other.control")),
        ("control queue", "error", "it takes none", worker(control_queue=None)),
        ("rights", "error", "refuses worker celery@two the queue a.b: 403", worker(refused={"a.b": "403"})),
        ("pools", "warning", "celery@two cannot add a slot", worker(can_grow=False)),
        ("versions", "error", "celery@two runs without", worker(version=None)),
        ("versions", "warning", "0.9, here it is 1.0", worker(version="0.9")),
        (
            "policies",
            "warning",
            "payments otherwise: window",
            worker(policies={"payments": {**RULES, "window": 1}}),
        ),
        ("clocks", "warning", "celery@two is 1 min ahead of", worker(clock_ahead=60.0)),
        ("clocks", "warning", "this machine is 1 min behind", {"clock_ahead": -60.0}),
        ("undefined breakers", "warning", "2 tasks wait for breaker mail", {"orphans": {"mail": 2}}),
        (
            "undefined breakers",
            "warning",
            "name breaker payments, which no worker",
            {"workers": (replace(WORKER, policies={}),)},
        ),
        ("definitions", "error", "charge is not guarded", {"mistakes": ("charge is not guarded",)}),
        ("definitions", "warning", "fallbak= is no", {"doubts": (("charge: fallbak= is no option", "why", "advice"),)}),
        ("undecided exceptions", "warning", "payments end with", {"undecided": {"payments": ["DeclinedError"]}}),
        ("hanging calls", "warning", "charge: no time limit, and breaker payments", {"tasks": (UNBOUNDED,)}),
        ("acks_late", "warning", "charge may be deferred", {"tasks": (replace(TASK, acks_late=False),)}),
        ("results", "warning", "no result backend", {"keeps_results": False}),
        ("result_expires", "error", "waited 12 s", {"result_expires": 10.0}),
        ("trial_timeout", "warning", "is 10 s", {"breakers": (Spec("payments", BreakerPolicy(trial_timeout=10.0)),)}),
        ("visibility_timeout", "warning", "is 20 s", {"visibility_timeout": 20.0}),
        ("prefetch", "warning", "multiplier is 0", {"prefetch_multiplier": 0}),
    ],
)
def test_a_check_finds_what_is_wrong(check: str, level: str, said: str, wrong: dict[str, Any]) -> None:
    found = [finding for finding in examine(replace(SOUND, **wrong)) if finding.check == check]
    assert [finding.level for finding in found] == [level]
    assert said in found[0].what
    assert found[0].why
    assert found[0].advice


@pytest.mark.parametrize(
    "fine",
    [
        {"store": replace(STORE, version=(8, 1), product="valkey")},
        {"result_expires": 0.0},
        {"tasks": (replace(TASK, defers=False, acks_late=False),)},
        {
            "tasks": (UNBOUNDED,),
            "breakers": (TIMED,),
            "workers": (replace(WORKER, policies={"payments": rules_of(TIMED)}),),
        },
        {"breakers": (PAYMENTS, replace(PAYMENTS, name="stock"))},  # of guards in a web process: no worker need know it
        {"broker": None, "visibility_timeout": None},  # RabbitMQ
        {"tick_age": 15.0, "tick_sender_age": 50.0},
        {"tick_age": 90.0, "tick_sender_age": 90.0, "tick_interval": 10.0},
    ],
)
def test_what_is_fine_is_left_alone(fine: dict[str, Any]) -> None:
    assert {finding.level for finding in examine(replace(SOUND, **fine))} == {Level.OK}


def test_every_check_has_its_broken_deployment() -> None:
    [mark] = [mark for mark in test_a_check_finds_what_is_wrong.pytestmark if mark.name == "parametrize"]
    assert {case[0] for case in mark.args[1]} == set(CHECKS)


def test_the_docs_list_every_check() -> None:
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")
    assert re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) == list(CHECKS)


def test_clocks_are_unknown_while_no_worker_can_be_asked() -> None:
    levels = {finding.check: finding.level for finding in examine(replace(SOUND, workers=()))}
    assert levels["clocks"] is Level.UNKNOWN


def test_what_cannot_be_found_out_is_unknown_and_no_error() -> None:
    nothing = Deployment(
        version="1.0", control_queue="resilient.control", store_trouble="refused", broker_trouble="refused"
    )
    levels = {finding.check: finding.level for finding in examine(nothing)}
    assert {check for check, level in levels.items() if level is Level.ERROR} == {"store", "broker"}
    assert {check for check, level in levels.items() if level is Level.UNKNOWN} == {
        "maxmemory-policy", "maxmemory", "persistence", "ticks", "workers", "control queue", "rights", "pools",
        "versions", "policies", "clocks", "undefined breakers", "undecided exceptions", "result_expires",
        "visibility_timeout",
    }  # fmt: skip


DATABASE_SCHEDULER = """
import django
from django.conf import settings
from django.core.management import call_command
from resilient_tasks.operations.doctor import _lasting_ticks

DATABASE = "django_celery_beat.schedulers:DatabaseScheduler"
assert _lasting_ticks(DATABASE) == (), "Django is not set up"
databases = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
settings.configure(INSTALLED_APPS=["django_celery_beat"], DATABASES=databases, USE_TZ=True)
django.setup()
assert _lasting_ticks(DATABASE) == (), "there is no table"
call_command("migrate", verbosity=0)
from django_celery_beat.models import IntervalSchedule, PeriodicTask

every = IntervalSchedule.objects.create(every=1, period="seconds")
tick = {"task": "resilient_tasks.tick", "interval": every}
PeriodicTask.objects.create(name="lasting", **tick)
PeriodicTask.objects.create(name="switched off", enabled=False, **tick)
PeriodicTask.objects.create(name="brief", expire_seconds=1, **tick)
PeriodicTask.objects.create(name="another task", task="report", interval=every)
assert _lasting_ticks(DATABASE) == _lasting_ticks("django") == ("lasting",)
assert _lasting_ticks("celery.beat:PersistentScheduler") == ()
"""


def test_ticks_of_a_database_scheduler_that_do_not_expire_are_found() -> None:
    subprocess.run([sys.executable, "-c", DATABASE_SCHEDULER], check=True, timeout=120)
