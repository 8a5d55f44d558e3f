"""``Heart``: the one thread of a worker's main process that keeps time.

It runs ticks outside the pool, so that a pool full of hanging tasks cannot starve them: when one
arrives on the control queue, and of its own accord when no tick of anybody has completed for three
intervals. Even while nothing seems due it runs one every few seconds, because a store that was away, or
has lost its data, does not know what waits. In between it tells the store what the gate has counted and
tries failed deferrals again, and looks after blocked queues.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from resilient_tasks.errors import StoreError
from resilient_tasks.worker.revokes import Hearing
from resilient_tasks.worker.tick import STOCKTAKING, Tick, anything_due

if TYPE_CHECKING:
    from resilient_tasks.worker.deferral import Deferral
    from resilient_tasks.worker.gate import Gate
    from resilient_tasks.worker.overflow import Overflow
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Ticks may fail to complete for this many intervals before the workers start their own.
MISSED_TICKS = 3
#: Rounds per tick interval, for what should not wait for a tick.
ROUNDS = 4
#: Seconds between two declarations that this worker is alive and which breakers it defines.
DECLARING = 10.0


class Heart:
    """Keeps time for one worker."""

    def __init__(self, runtime: Runtime, gate: Gate, deferral: Deferral, overflow: Overflow) -> None:
        self._runtime = runtime
        self._gate = gate
        self._deferral = deferral
        self._overflow = overflow
        self._wanted = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._tick: Tick | None = None
        self._revokes = Hearing()
        self._idle_look_at = float("-inf")
        self._declare_at = float("-inf")
        self._took_over = False
        self._due_since: float | None = None
        self._in_touch_since = time.monotonic()

    def start(self, consumer: Any) -> None:
        """Begin to beat, or go on with a consumer that has reconnected."""
        if self._tick is None:
            self._tick = Tick(self._runtime, consumer, wake=self._wanted.set)
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(target=self._beat, name="resilient-tasks-heart", daemon=True)
            self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop after the round that is under way, if that takes no longer than ``timeout`` seconds."""
        self._stopping.set()
        self._wanted.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if self._tick is not None:
            self._tick.close()
            self._tick = None

    def want_tick(self) -> None:
        """Run a tick that somebody has sent, from any thread."""
        self._took_over = False
        self._wanted.set()

    def _beat(self) -> None:
        interval = self._runtime.settings.tick_interval
        while not self._stopping.is_set():
            wanted = self._wanted.wait(interval / ROUNDS)
            self._wanted.clear()
            try:
                self._round(wanted)
            except StoreError as exc:
                self._in_touch_since = time.monotonic()
                logger.debug("no tick: %s", exc)
            except Exception:
                logger.exception("tick failed; the next one tries again")

    def _round(self, wanted: bool) -> None:  # noqa: FBT001 - private
        self._deferral.retry_held()
        self._deferral.tell_suppressed()
        self._overflow.look()
        self._tell_store()
        if self._tick is not None and not self._stopping.is_set() and (wanted or self._overdue()):
            self._tick.run(observed_for=time.monotonic() - self._in_touch_since)

    def _tell_store(self) -> None:
        ledger = self._runtime.fleet.ledger
        self._gate.tell_taken_up(ledger.taken_up)
        now = time.monotonic()
        if now >= self._declare_at:
            ledger.declare(self._runtime.breakers)
            self._declare_at = now + DECLARING
        self._revokes.pass_on(ledger, self._runtime.breakers)

    def _overdue(self) -> bool:
        """Whether no tick has completed for too long, whatever beat sends."""
        if not self._anything_due():
            self._due_since = None
            return self._time_for_an_idle_look() and self._nobody_ticked_for(STOCKTAKING / 2)
        now = time.monotonic()
        if self._due_since is None:
            self._due_since = now
        patience = (1 if self._took_over else MISSED_TICKS) * self._runtime.settings.tick_interval
        if now - self._due_since <= patience or not self._nobody_ticked_for(patience):
            return False
        self._took_over = True  # from now on at full pace, until somebody sends ticks again
        return True

    def _nobody_ticked_for(self, seconds: float) -> bool:
        age = self._runtime.fleet.ledger.last_tick_age(self._runtime.tick_scope)
        return age is None or age > seconds

    def _anything_due(self) -> bool:
        now = self._runtime.fleet.view.server_now()
        breakers = self._runtime.breakers.values()
        return any(anything_due(breaker, breaker.standing.snapshot, now) for breaker in breakers)

    def _time_for_an_idle_look(self) -> bool:
        now = time.monotonic()
        if now < self._idle_look_at:
            return False
        self._idle_look_at = now + STOCKTAKING
        return True
