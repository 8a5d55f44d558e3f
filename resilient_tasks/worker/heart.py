"""``Heart``: the one thread of a worker's main process that keeps time.

It runs ticks outside the pool, so that a pool full of hanging tasks cannot starve them: when one
arrives on the control queue, and of its own accord when no tick of anybody has completed for three
intervals. Even while nothing seems due it runs one every few seconds, because a store that was away, or
has lost its data, does not know what waits. In between it tells the store what the gate has counted and
tries failed deferrals again, and looks after blocked queues.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

from resilient_tasks.errors import StoreError
from resilient_tasks.worker.deferred_tasks import RevokeRelay
from resilient_tasks.worker.tick import RECONCILE_INTERVAL, Tick, anything_due

if TYPE_CHECKING:
    from resilient_tasks.worker.deferral import Deferral
    from resilient_tasks.worker.gate import Gate
    from resilient_tasks.worker.holding import Holding
    from resilient_tasks.worker.overflow import Overflow
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Ticks may fail to complete for this many intervals before the workers start their own.
MISSED_TICKS = 3
#: Rounds per tick interval, for what should not wait for a tick.
ROUNDS = 4
#: Seconds between two declarations that this worker is alive and which breakers it defines.
DECLARING = 10.0
#: Seconds before a worker looks again for tasks to resume, if another was doing so.
REFILL_AGAIN = 0.005


class Heart:
    """Keeps time for one worker."""

    def __init__(self, runtime: Runtime, gate: Gate, deferral: Deferral, overflow: Overflow, holding: Holding) -> None:
        self._runtime = runtime
        self._gate = gate
        self._deferral = deferral
        self._overflow = overflow
        self._holding = holding
        self._woken = threading.Event()
        self._tick_wanted = False
        self._tick_missed = False  # it was to run one, and another worker was at a tick or filled slots
        self._room_found = False
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._tick: Tick | None = None
        self._name = ""
        self._revokes = RevokeRelay()
        self._idle_look_at = float("-inf")
        self._declare_at = float("-inf")
        self._took_over = False
        self._sender_seen = False
        self._due_since: float | None = None
        self._in_touch_since = time.monotonic()

    def start(self, consumer: Any) -> None:
        """Begin to beat, or go on with a consumer that has reconnected."""
        self._name = f"{consumer.hostname}:{os.getpid()}"  # two workers of one name are two
        if self._tick is None:
            self._tick = Tick(self._runtime, consumer, wake=self._hasten_tick)
        self._runtime.fleet.view.on_room = self.want_refill
        if self._thread is None or not self._thread.is_alive():
            self._stopping.clear()
            self._thread = threading.Thread(target=self._beat, name="resilient-tasks-heart", daemon=True)
            self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop after the round that is under way, if that takes no longer than ``timeout`` seconds."""
        self._stopping.set()
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)
        if self._tick is not None:
            self._tick.close()
            self._tick = None

    def want_tick(self) -> None:
        """Run a tick that somebody has sent, from any thread."""
        self._took_over = False
        self._sender_seen = True
        self._hasten_tick()

    def _hasten_tick(self) -> None:
        self._tick_wanted = True
        self._woken.set()

    def want_refill(self) -> None:
        """Resume tasks that wait for a slot, because one is free, from any thread."""
        self._room_found = True
        self._woken.set()

    def _beat(self) -> None:
        interval = self._runtime.settings.tick_interval
        while not self._stopping.is_set():
            self._woken.wait(interval / ROUNDS)
            self._woken.clear()
            try:
                self._round()
            except StoreError as exc:
                self._in_touch_since = time.monotonic()
                logger.debug("no tick: %s", exc)
            except Exception:
                logger.exception("tick failed; the next one tries again")

    def _round(self) -> None:
        self._refill()
        self._deferral.retry_held()
        self._deferral.denials.look()
        self._deferral.tell_suppressed()
        self._overflow.look()
        self._tell_store()
        if self._tick is None or self._stopping.is_set():
            return
        if self._is_time_to_tick():
            observed_for = time.monotonic() - self._in_touch_since
            self._tick_missed = not self._tick.run(observed_for=observed_for)

    def _is_time_to_tick(self) -> bool:
        """Whether somebody has sent a tick, none has completed for too long, or one was missed and not made up for."""
        wanted, missed = self._tick_wanted, self._tick_missed
        self._tick_wanted = self._tick_missed = False
        if wanted or (missed and self._nobody_ticked_for(self._runtime.settings.tick_interval / 2)):
            return True
        return self._overdue()

    def _refill(self) -> None:
        """Resume tasks into free slots, before anything else that may take time."""
        if self._tick is not None and (self._room_found or self._holds_few()):
            self._room_found = False
            if not self._tick.refill():  # another worker is at it, and may have looked before the slot was free
                self._stopping.wait(REFILL_AGAIN)
                self.want_refill()

    def _holds_few(self) -> bool:
        """Whether tasks wait that are over their workers' own limits, and this one has nearly run those it holds."""
        limited = (each for each in self._runtime.present() if each.policy.max_concurrency_per_worker is not None)
        return any(each.standing.snapshot.deferred and self._holding.wants_more(each) for each in limited)

    def _tell_store(self) -> None:
        ledger = self._runtime.fleet.ledger
        self._gate.tell_taken_up(ledger.taken_up)
        now = time.monotonic()
        if now >= self._declare_at:
            ledger.declare(self._runtime.breakers)
            ledger.attend(self._name)
            self._declare_at = now + DECLARING
            if self._sender_seen:
                self._sender_seen = False
                ledger.tick_sender_seen(self._runtime.tick_scope)
        self._revokes.pass_on(ledger, [breaker.name for breaker in self._runtime.present()])

    def _overdue(self) -> bool:
        """Whether no tick has completed for too long, whatever beat sends."""
        if not self._anything_due():
            self._due_since = None
            return self._time_for_an_idle_look() and self._nobody_ticked_for(RECONCILE_INTERVAL / 2)
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
        return any(anything_due(breaker, breaker.standing.snapshot, now) for breaker in self._runtime.present())

    def _time_for_an_idle_look(self) -> bool:
        now = time.monotonic()
        if now < self._idle_look_at:
            return False
        self._idle_look_at = now + RECONCILE_INTERVAL
        return True
