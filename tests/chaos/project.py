"""The Celery project that chaos runs on: with ``CHAOS_PLAIN`` set, the same tasks as plain Celery has them.

Every task calls a dependency over HTTP and writes into the ledger what happens to it.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import httpx
from celery import Celery
from celery.signals import task_failure

from resilient_tasks import Resilience
from tests.chaos import traps
from tests.chaos.ledger import Event, Ledger
from workers.processes import LOCALHOST

PLAIN = bool(os.environ.get("CHAOS_PLAIN"))
LEDGER = Ledger(Path(os.environ["CHAOS_LEDGER"]))
PORTS: dict[str, int] = json.loads(os.environ["CHAOS_SERVICE_PORTS"])
CALL_TIMEOUT = 0.5

app = Celery("chaos", broker=os.environ["CHAOS_BROKER_URL"], backend=os.environ["CHAOS_BACKEND_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=json.loads(os.environ["CHAOS_TRANSPORT_OPTIONS"]),
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    worker_prefetch_multiplier=1,
)


def guarded_by(breaker: str, **options: Any) -> dict[str, Any]:
    """Return the task options that guard it; in plain Celery, those that come closest."""
    if PLAIN:
        return {
            "autoretry_for": (httpx.HTTPError,),
            "retry_backoff": 1,
            "retry_backoff_max": 4,
            "retry_jitter": True,
            "max_retries": None,
        }
    return {"breaker": breaker, **options}


if not PLAIN:
    resilience = Resilience(app, tick_interval=0.25)
    for name in ("payments", "accounts", "mail"):
        resilience.breaker(
            name,
            consecutive_failures=3,
            open_duration=0.5,
            max_open_duration=4,
            ramp=1.0,
            trial_timeout=2.0,
            overflow="block",  # no task may fail because the broker is full
        )
    traps.lay(Path(os.environ["CHAOS_TRAPS"]))
    traps.watch_moves(partial(LEDGER.note, Event.MOVED))


@lru_cache(maxsize=1)
def _client(pid: int) -> httpx.Client:
    """One per process: connections are not carried across a fork."""
    return httpx.Client(timeout=CALL_TIMEOUT, trust_env=False)


def call(dependency: str, task_id: str) -> None:
    """Call a dependency for a task, which has then done its work."""
    LEDGER.note(Event.BEGUN, task_id)
    url = f"http://{LOCALHOST}:{PORTS[dependency]}/{dependency}/{task_id}"
    _client(os.getpid()).get(url).raise_for_status()
    LEDGER.note(Event.DONE, task_id)


def last_known(task_id: str) -> str:
    """Answer in the place of a task whose dependency is unavailable."""
    LEDGER.note(Event.DONE, task_id)
    return "last known"


@app.task(**guarded_by("payments"))
def charge(task_id: str) -> None:
    """Wait for a dependency that is unavailable."""
    call("payments", task_id)


@app.task(**guarded_by("accounts", fallback=last_known))
def balance(task_id: str) -> str:
    """Do without it."""
    call("accounts", task_id)
    return "fresh"


@app.task(**guarded_by("payments"))
def invoice(task_id: str) -> None:
    """Depend on two, one of them inside the body."""
    if PLAIN:
        call("mail", task_id)
    else:
        with resilience.breakers["mail"].guard():
            call("mail", task_id)


@app.task
def tally(task_id: str) -> None:
    """Depend on nothing."""
    LEDGER.note(Event.BEGUN, task_id)
    LEDGER.note(Event.DONE, task_id)


@task_failure.connect
def _note_failure(task_id: str, **_: Any) -> None:
    LEDGER.note(Event.FAILED, task_id)
