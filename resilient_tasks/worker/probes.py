"""Running probes: each in threads of its own, under its own time limit, so that one that hangs delays nothing else."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from functools import partial
from queue import Empty, SimpleQueue
from uuid import uuid4

from resilient_tasks.checks import HEARTBEATS, HealthCheckError, Probe, Run, run_probe
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, Snapshot, State
from resilient_tasks.dependency import Admitted, Dependency
from resilient_tasks.errors import StoreError
from resilient_tasks.guard import Scope
from resilient_tasks.store.base import Evidence

logger = logging.getLogger("resilient_tasks")

#: Runs of one breaker's probe that hang for ever, beyond which this process starts no more of them.
MOST_ABANDONED = 10
#: Seconds after which a run that hangs is no longer counted: others may come back before it does.
GIVEN_UP_AFTER = 300.0
#: Seconds a trial waits for the store to take its outcome before the next one; its permit lives as much longer.
SETTLE_TIMEOUT = 5.0


class Prober:
    """Runs the probes of one worker; ``wake`` asks for another tick at once, when a trial has been made."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._watching: dict[str, threading.Thread] = {}  # by breaker, the thread that watches its present run
        self._running: dict[str, list[tuple[threading.Thread, float]]] = {}  # by breaker, runs and when they began

    def start(self, breaker: Dependency, probe: Probe, snapshot: Snapshot) -> None:
        """Begin to run the probe of a breaker for which it is due, unless that is under way."""
        watching = self._watching.get(breaker.name)
        if watching is None or not watching.is_alive():
            args, name = (breaker, probe, snapshot), f"probe-{breaker.name}"
            thread = threading.Thread(target=self._work, args=args, name=name, daemon=True)
            self._watching[breaker.name] = thread
            thread.start()

    def _work(self, breaker: Dependency, probe: Probe, snapshot: Snapshot) -> None:
        """Make trials until the breaker has left HALF_OPEN; with an interval, and while it admits, one run in turn."""
        is_trial, store = snapshot.state is State.HALF_OPEN, breaker.fleet.store
        try:
            if is_trial and probe.interval is None:
                while self._make_trial(breaker, probe):
                    pass
            elif store.begin_health_check(breaker.spec, since=probe.turn_began(snapshot)):
                if is_trial:
                    self._make_trial(breaker, probe)
                else:
                    self._check_health(breaker, probe, snapshot.epoch)
        except StoreError as error:
            logger.debug("no health check of breaker %r: %s", breaker.name, error)

    def _make_trial(self, breaker: Dependency, probe: Probe) -> bool:
        """Make one trial; whether there may be another."""
        fleet, holder = breaker.fleet, f"probe:{uuid4()}"
        grant = fleet.acquire(breaker.spec, holder, lease=probe.limit + SETTLE_TIMEOUT)
        if not grant.trial:
            return False
        epoch = grant.snapshot.epoch
        verdict = self._verdict(breaker, probe, epoch)
        fleet.reporter.settle(breaker.spec, holder, epoch, verdict, wait=SETTLE_TIMEOUT)
        self._wake()
        return verdict.outcome is Outcome.SUCCESS

    def _check_health(self, breaker: Dependency, probe: Probe, epoch: int) -> None:
        """Run an active probe once and have the store count its verdict."""
        fleet, verdict = breaker.fleet, self._verdict(breaker, probe, epoch)
        evidence = Evidence(epoch, (), verdict.cause, verdict.retry_after)
        answer = fleet.store.report_health_check(
            breaker.spec, verdict.outcome, evidence, limit=probe.failures_allowed, jitter=random.random()
        )
        fleet.learn(answer)

    def _verdict(self, breaker: Dependency, probe: Probe, epoch: int) -> Verdict:
        """Run the probe under its time limit; a run that overruns is abandoned."""
        given_up = time.monotonic() - GIVEN_UP_AFTER
        before = self._running.get(breaker.name, ())
        running = [(thread, began) for thread, began in before if thread.is_alive() and began > given_up]
        self._running[breaker.name] = running
        if len(running) >= MOST_ABANDONED:
            logger.error("%d probes of breaker %r hang; no more are started here", MOST_ABANDONED, breaker.name)
            return _failure(f"{MOST_ABANDONED} earlier ones hang")
        verdicts: SimpleQueue[Verdict] = SimpleQueue()
        run = Run(time.monotonic() + probe.limit, partial(_last_heartbeat, breaker))
        thread = threading.Thread(
            target=lambda: verdicts.put(_run(breaker, probe, run, epoch)), name=f"probing-{breaker.name}", daemon=True
        )
        running.append((thread, time.monotonic()))
        thread.start()
        try:
            return verdicts.get(timeout=probe.limit)
        except Empty:
            return _failure(f"no answer within {probe.limit:g} s")


def _last_heartbeat(breaker: Dependency) -> float | None:
    kept = breaker.fleet.store.get(HEARTBEATS, breaker.name)
    return None if kept is None else kept[1]


def _run(breaker: Dependency, probe: Probe, run: Run, epoch: int) -> Verdict:
    permit = Admitted(breaker.name, epoch, trial=True, leased=True)  # guards inside share it
    try:
        with Scope([permit]):
            run_probe(probe.function, run)
    except HealthCheckError as error:  # one of the library's own: its text holds no secrets
        return _failure(str(error), breaker.judge(error).retry_after)
    except BaseException as error:  # noqa: BLE001 - a probe that raises anything has failed
        verdict = breaker.judge(error)
        return _failure(verdict.cause or type(error).__name__, verdict.retry_after)
    return Verdict(Outcome.SUCCESS)


def _failure(cause: str, retry_after: float | None = None) -> Verdict:
    return Verdict(Outcome.FAILURE, f"probe: {cause}", retry_after)
