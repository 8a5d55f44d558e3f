"""Running probes: each in threads of its own, under its own time limit, so that one that hangs delays nobody."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from resilient_tasks.checks import HEARTBEATS, HealthCheckError, Run, run_probe
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, Snapshot, State
from resilient_tasks.dependency import Pass
from resilient_tasks.errors import StoreError
from resilient_tasks.guard import Scope, within
from resilient_tasks.store.base import Evidence

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.fleet import Fleet
    from resilient_tasks.probing import Probe
    from resilient_tasks.worker.context import Runtime

logger = logging.getLogger("resilient_tasks")

#: Runs of one breaker's probe that hang for ever, beyond which this process starts no more of them.
MOST_ABANDONED = 10
#: Seconds after which a run that hangs is no longer counted: others may come back before it does.
GIVEN_UP_AFTER = 300.0
#: Seconds a trial waits for the store to take its outcome before the next one; its permit lives as much longer.
PATIENCE = 5.0


class Finding(NamedTuple):
    """What one run of a probe has found."""

    outcome: Outcome
    cause: str = ""
    retry_after: float | None = None


class Prober:
    """Runs the probes of one worker.

    Args:
        runtime: the app's runtime.
        wake: asks for another tick at once, when a trial has been made.
    """

    def __init__(self, runtime: Runtime, wake: Callable[[], None]) -> None:
        self._runtime = runtime
        self._wake = wake
        self._lanes: dict[str, _Lane] = {}

    def start(self, breaker: Dependency, probe: Probe, snapshot: Snapshot) -> None:
        """Begin to run the probe of a breaker for which it is due, unless that is under way."""
        lane = self._lanes.setdefault(breaker.name, _Lane())
        if lane.is_busy():
            return
        probing = _Probing(self._runtime.fleet, breaker, probe, lane, self._wake)
        work = probing.make_trials if snapshot.state is State.HALF_OPEN else probing.check_health
        lane.occupy(threading.Thread(target=work, args=(snapshot,), name=f"probe-{breaker.name}", daemon=True))


@dataclass
class _Lane:
    """The threads of one breaker's probe: one that watches the present run, and those whose runs hang."""

    watching: threading.Thread | None = None
    running: list[tuple[threading.Thread, float]] = field(default_factory=list)  # a run, and when it began

    def is_busy(self) -> bool:
        return self.watching is not None and self.watching.is_alive()

    def occupy(self, thread: threading.Thread) -> None:
        self.watching = thread
        thread.start()

    def run(self, work: Callable[[], None], name: str) -> bool:
        """Start a run; False if too many hang already."""
        given_up = time.monotonic() - GIVEN_UP_AFTER
        self.running = [(thread, began) for thread, began in self.running if thread.is_alive() and began > given_up]
        if len(self.running) >= MOST_ABANDONED:
            return False
        thread = threading.Thread(target=work, name=name, daemon=True)
        self.running.append((thread, time.monotonic()))
        thread.start()
        return True


@dataclass
class _Probing:
    """What the thread does that watches the runs of one breaker's probe."""

    fleet: Fleet
    breaker: Dependency
    probe: Probe
    lane: _Lane
    wake: Callable[[], None]

    def make_trials(self, half_open: Snapshot) -> None:
        """Make trials until the breaker has left HALF_OPEN; with an interval, one trial if it is our turn."""
        if self.probe.interval is None:
            while self._make_trial():
                pass
        elif self._is_our_turn(half_open):
            self._make_trial()

    def check_health(self, admitting: Snapshot) -> None:
        """Run an active probe once, if it is our turn, and have the store count what it found."""
        if not self._is_our_turn(admitting):
            return
        finding = self._find_out(admitting.epoch)
        evidence = Evidence(admitting.epoch, (), finding.cause, finding.retry_after)
        try:
            answer = self.fleet.store.report_health_check(
                self.breaker.spec, finding.outcome, evidence, limit=self.probe.failures_allowed, jitter=random.random()
            )
        except StoreError as error:
            logger.debug("a health check of breaker %r does not count: %s", self.breaker.name, error)
        else:
            self.fleet.learn(answer)

    def _is_our_turn(self, snapshot: Snapshot) -> bool:
        try:
            return self.fleet.store.begin_health_check(self.breaker.spec, since=self.probe.turn_began(snapshot))
        except StoreError as error:
            logger.debug("no health check of breaker %r: %s", self.breaker.name, error)
            return False

    def _make_trial(self) -> bool:
        """Make one trial; whether there may be another."""
        holder = f"probe:{uuid4()}"
        grant = self.fleet.acquire(self.breaker.spec, holder, lease=self.probe.limit + PATIENCE)
        if not grant.trial:
            return False
        finding = self._find_out(grant.snapshot.epoch)
        told = self.breaker.spec, holder, grant.snapshot.epoch, Verdict(*finding)
        self.fleet.reporter.settle(*told, wait=PATIENCE)
        self.wake()
        return finding.outcome is Outcome.SUCCESS

    def _find_out(self, epoch: int) -> Finding:
        """Run the probe under its time limit; a run that overruns is abandoned."""
        findings: SimpleQueue[Finding] = SimpleQueue()
        run = Run(time.monotonic() + self.probe.limit, self._last_heartbeat)
        if not self.lane.run(lambda: findings.put(self._run(run, epoch)), f"probing-{self.breaker.name}"):
            logger.error("%d probes of breaker %r hang; no more are started here", MOST_ABANDONED, self.breaker.name)
            return Finding(Outcome.FAILURE, f"probe: {MOST_ABANDONED} earlier ones hang")
        try:
            return findings.get(timeout=self.probe.limit)
        except Empty:
            return Finding(Outcome.FAILURE, f"probe: no answer within {self.probe.limit:g} s")

    def _run(self, run: Run, epoch: int) -> Finding:
        permit = Pass(self.breaker.name, epoch, trial=True, leased=True)  # guards inside share it
        try:
            with within(Scope([permit])):
                run_probe(self.probe.function, run)
        except HealthCheckError as error:  # one of the library's own: its text holds no secrets
            return Finding(Outcome.FAILURE, f"probe: {error}", self.breaker.judge(error).retry_after)
        except BaseException as error:  # noqa: BLE001 - a probe that raises anything has failed
            verdict = self.breaker.judge(error)
            return Finding(Outcome.FAILURE, f"probe: {verdict.cause or type(error).__name__}", verdict.retry_after)
        return Finding(Outcome.SUCCESS)

    def _last_heartbeat(self) -> float | None:
        kept = self.fleet.store.get(HEARTBEATS, self.breaker.name)
        return None if kept is None else kept[1]
