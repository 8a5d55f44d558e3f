"""Probes: a user's health check, run under a permit, in place of trials with real tasks."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from resilient_tasks.core.model import Outcome

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Probes of one breaker that hang for ever, beyond which this process starts no more of them.
MOST_ABANDONED = 10
#: Seconds after which a probe that hangs is no longer counted: others may come back before it does.
GIVEN_UP_AFTER = 300.0
#: Seconds a probe waits for the store to take its outcome before the next one.
PATIENCE = 5.0


class Prober:
    """Runs the probes of one worker, each breaker's in a thread of its own.

    A probe that overruns its time limit is abandoned: its permit runs out, which counts as a failure,
    and whatever it says later comes too late.
    """

    def __init__(self, runtime: Runtime, wake: Callable[[], None]) -> None:
        self._runtime = runtime
        self._wake = wake
        self._running: dict[str, list[_Probing]] = {}

    def start(self, breaker: Breaker) -> None:
        """Begin to probe a breaker that is HALF_OPEN, unless that is under way."""
        running = [one for one in self._running.get(breaker.name, []) if one.is_alive() and not one.is_given_up()]
        self._running[breaker.name] = running
        if any(not one.overrun() for one in running):
            return
        if len(running) >= MOST_ABANDONED:
            logger.error("%d probes of breaker %r hang; no more are started here", len(running), breaker.name)
            return
        probing = _Probing(self._runtime, breaker, self._wake)
        running.append(probing)
        probing.start()


class _Probing(threading.Thread):
    """Probes one breaker until it has left HALF_OPEN, one permit after the other."""

    def __init__(self, runtime: Runtime, breaker: Breaker, wake: Callable[[], None]) -> None:
        super().__init__(name=f"resilient-tasks-probe-{breaker.name}", daemon=True)
        self._runtime = runtime
        self._breaker = breaker
        self._wake = wake
        self._clock = runtime.fleet.view.clock
        self._deadline = self._clock() + breaker.probe_timeout

    def overrun(self) -> bool:
        """Whether the present probe has had its time."""
        return bool(self._clock() > self._deadline)

    def is_given_up(self) -> bool:
        """Whether it has hung for so long that it counts no more."""
        return bool(self._clock() > self._deadline + GIVEN_UP_AFTER)

    def run(self) -> None:
        try:
            while self._probe_once():
                self._deadline = self._clock() + self._breaker.probe_timeout
        finally:
            self._wake()

    def _probe_once(self) -> bool:
        """Make one trial; False when there are no more to make."""
        holder = f"probe:{uuid4()}"
        fleet, spec = self._runtime.fleet, self._breaker.spec
        grant = fleet.acquire(spec, holder, lease=self._breaker.probe_timeout)
        if not grant.trial:
            return False
        outcome, cause, retry_after = self._verdict()
        if self.overrun():
            return False
        fleet.reporter.settle(spec, holder, grant.snapshot.epoch, outcome, cause, retry_after, wait=PATIENCE)
        return outcome is Outcome.SUCCESS

    def _verdict(self) -> tuple[Outcome, str, float | None]:
        try:
            _call(self._breaker.probe_function)
        except BaseException as exc:  # noqa: BLE001 - a probe that raises anything has failed
            verdict = self._breaker.judge(exc)
            return Outcome.FAILURE, f"probe: {verdict.cause or type(exc).__name__}", verdict.retry_after
        return Outcome.SUCCESS, "", None


def _call(probe: Any) -> None:
    result = probe()
    if inspect.isawaitable(result):

        async def wait() -> None:
            await result

        asyncio.run(wait())
