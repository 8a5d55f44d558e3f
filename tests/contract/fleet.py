"""What the processes of a fleet do in the tests of ``test_fleet.py``. They share a server, nothing else."""

from __future__ import annotations

import os
import signal
import time
from multiprocessing.synchronize import Barrier
from typing import Any

from resilient_tasks.core.model import Calls, Outcome, Verb
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.redis import RedisStore

TRIAL_CALLS = 3
BUSY = Spec("busy", BreakerPolicy(minimum_calls=10, open_duration=60.0))
ON_TRIAL = Spec("on trial", BreakerPolicy(trial_calls=TRIAL_CALLS, open_duration=0.001))
ONE_AT_A_TIME = Spec("one at a time", BreakerPolicy(trial_calls=1, open_duration=0.1, open_jitter=0.0))
WIDE = Spec("wide", BreakerPolicy(window=3600.0))
FAILURE = (Calls(Outcome.FAILURE, 1),)


def open_store(url: str) -> RedisStore:
    return RedisStore(url, namespace="fleet", timeout=20.0)


def call_a_dead_service(url: str, begin: Barrier, calls: Any) -> None:
    """Call until refused; every call fails."""
    store = open_store(url)
    begin.wait()
    while (grant := store.acquire(BUSY, f"process {os.getpid()}", lease=60)).admitted:
        with calls.get_lock():
            calls.value += 1
        store.record(BUSY, Evidence(grant.snapshot.epoch, FAILURE))


def count_failures(url: str) -> None:
    """Report 1000 failures, some one by one and some in batches."""
    store = open_store(url)
    epoch = store.read([WIDE])[0].epoch
    for _ in range(200):
        store.record(WIDE, Evidence(epoch, FAILURE))
    for _ in range(80):
        store.record(WIDE, Evidence(epoch, (Calls(Outcome.FAILURE, 10),)))


def make_trials(url: str, count: int, in_flight: Any, most_in_flight: Any) -> None:
    """Make trials that say nothing, so that the breaker stays HALF_OPEN and all permits are used again."""
    store = open_store(url)
    done = 0
    while done < count:
        grant = store.acquire(ON_TRIAL, f"{os.getpid()}:{done}", lease=60)
        if not grant.trial:
            continue
        with in_flight.get_lock():
            in_flight.value += 1
            most_in_flight.value = max(most_in_flight.value, in_flight.value)
        time.sleep(0.001)
        with in_flight.get_lock():
            in_flight.value -= 1
        store.settle(ON_TRIAL, f"{os.getpid()}:{done}", Outcome.IGNORED, Evidence(grant.snapshot.epoch, ()))
        done += 1


def take_a_permit_and_die(url: str, lease: float) -> None:
    store = open_store(url)
    while not store.acquire(ONE_AT_A_TIME, "dead", lease=lease).trial:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def heal(url: str, lease: float) -> None:
    """Ask for permits all the time until the breaker is closed."""
    store = open_store(url)
    while True:
        grant = store.acquire(ONE_AT_A_TIME, f"process {os.getpid()}", lease=lease)
        if grant.trial:
            evidence = Evidence(grant.snapshot.epoch, ())
            store.settle(ONE_AT_A_TIME, f"process {os.getpid()}", Outcome.SUCCESS, evidence)
        elif grant.admitted:
            return
        time.sleep(0.002)


def isolate(url: str) -> None:
    open_store(url).command(BUSY, Verb.ISOLATE, reason="maintenance", actor="ada")


def is_refused(url: str) -> None:
    """Exit with an error unless the breaker refuses."""
    grant = open_store(url).acquire(BUSY, "newcomer", lease=1)
    raise SystemExit(0 if not grant.admitted and grant.snapshot.reason == "maintenance" else 1)


def listen(url: str, ready: Any, received: Any) -> None:
    """Send on what is published, until a breaker is isolated."""
    changes = open_store(url).changes(timeout=60)
    next(changes)
    ready.release()
    for snapshot in changes:
        if snapshot is not None:
            received.put((snapshot.name, snapshot.state.value, snapshot.version))
            if snapshot.state.value == "FORCED_OPEN":
                return
