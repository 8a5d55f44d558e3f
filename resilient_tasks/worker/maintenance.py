"""``Maintenance``: the one thread of a worker's main process that runs ticks.

It runs them outside the pool, so that a pool full of hanging tasks cannot starve them: when one arrives on the control
queue, and of its own accord when no worker has completed a tick for three intervals. Even while nothing seems due it
runs one every few seconds, because a store that was unavailable, or has lost its data, does not know what waits. In
between it reports to the store what the gate has counted, tries failed deferrals again, and looks after blocked queues.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import random
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from resilient_tasks.core.model import ADMITTING, Snapshot, State, is_child
from resilient_tasks.core.pace import PORTIONS
from resilient_tasks.errors import StoreError
from resilient_tasks.store.background import PeriodicThread
from resilient_tasks.store.ledger import Wait
from resilient_tasks.worker.celery_internals import Events
from resilient_tasks.worker.deferred_tasks import PAGE, DeferredTasks, Resumer, RevokeRelay, no_limit
from resilient_tasks.worker.probes import Prober
from resilient_tasks.worker.queues import Entry, Move

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.admission import Gate
    from resilient_tasks.worker.compensation import Holding, Overflow
    from resilient_tasks.worker.context import Runtime
    from resilient_tasks.worker.deferral import Deferral

logger = logging.getLogger("resilient_tasks")

#: Ticks may fail to complete for this many intervals before the workers start their own.
MISSED_TICKS = 3
#: Runs of the thread per tick interval, for what should not wait for a tick.
RUNS_PER_TICK = 4
#: Seconds between two declarations that this worker is alive and which breakers it defines.
DECLARING = 10.0
#: Seconds before a worker looks again for tasks to resume, if another was doing so.
REFILL_AGAIN = 0.005


class Maintenance:
    """Runs ticks, and what should not wait for them, in one worker."""

    def __init__(self, runtime: Runtime, gate: Gate, deferral: Deferral, overflow: Overflow, holding: Holding) -> None:
        self._runtime = runtime
        self._gate = gate
        self._deferral = deferral
        self._overflow = overflow
        self._holding = holding
        self._thread = PeriodicThread("maintenance", self._run, runtime.settings.tick_interval / RUNS_PER_TICK)
        self._tick_wanted = False
        self._tick_missed = False  # it was to run one, and another worker was at a tick or filled slots
        self._room_found = False
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
        """Start, or go on with a consumer that has reconnected."""
        self._name = f"{consumer.hostname}:{os.getpid()}"  # two workers of one name are two
        if self._tick is None:
            self._tick = Tick(self._runtime, consumer, wake=self._hasten_tick, room=self._holding.room)
        self._runtime.fleet.view.on_room = self.want_refill
        self._thread.start()

    def stop(self, timeout: float = 5.0) -> None:
        """Stop after the run that is under way, if that takes no longer than ``timeout`` seconds."""
        self._thread.stop(timeout)
        if self._tick is not None:
            self._tick.close()
            self._tick = None

    def want_tick(self) -> None:
        """Run a tick that was sent, from any thread."""
        self._took_over = False
        self._sender_seen = True
        self._hasten_tick()

    def _hasten_tick(self) -> None:
        self._tick_wanted = True
        self._thread.wake()

    def want_refill(self) -> None:
        """Resume tasks that wait for a slot, because one is free, from any thread."""
        self._room_found = True
        self._thread.wake()

    def _run(self, stopped: threading.Event) -> float | None:
        try:
            again = self._refill()
            self._deferral.retry_held()
            self._deferral.denials.look()
            self._deferral.log_suppressed()
            self._overflow.look()
            self._report_to_store()
            if self._tick is not None and not stopped.is_set() and self._is_time_to_tick():
                observed_for = time.monotonic() - self._in_touch_since
                self._tick_missed = not self._tick.run(observed_for=observed_for)
        except StoreError:
            self._in_touch_since = time.monotonic()
            raise
        return again

    def _is_time_to_tick(self) -> bool:
        """Whether a tick was sent, or missed and not made up for, or none has completed for too long."""
        now, interval = time.monotonic(), self._runtime.settings.tick_interval
        wanted, missed = self._tick_wanted, self._tick_missed
        self._tick_wanted = self._tick_missed = False
        if wanted or (missed and self._no_tick_for(interval / 2)):
            return True
        at = self._runtime.fleet.view.server_now()
        if not any(anything_due(each, each.cached_state.snapshot, at) for each in self._runtime.present()):
            self._due_since = None
            if now < self._idle_look_at:
                return False
            self._idle_look_at = now + RECONCILE_INTERVAL
            return self._no_tick_for(RECONCILE_INTERVAL / 2)
        self._due_since = self._due_since or now
        timeout = (1 if self._took_over else MISSED_TICKS) * interval
        if now - self._due_since <= timeout or not self._no_tick_for(timeout):
            return False
        self._took_over = True  # from now on at full pace, until ticks are sent again
        return True

    def _refill(self) -> float | None:
        """Resume tasks, before anything else that may take time; return after how many seconds to resume more."""
        if self._tick is None:
            return None
        wanted, self._room_found = self._room_found or self._holds_few(), False
        paced = self._paced(self._tick.not_due)
        if not (wanted or paced):
            return None
        again = self._tick.refill(paced)
        self._room_found |= wanted and again is None  # another worker is at it, and may have looked too early
        return REFILL_AGAIN if self._room_found else again

    def _paced(self, not_due: Collection[str]) -> list[Dependency]:
        """Return breakers whose waiting tasks are resumed between ticks, too: no children, there may be many."""
        cached = [(breaker, breaker.cached_state.snapshot) for breaker in self._runtime.breakers.values()]
        waiting = (each for each, snapshot in cached if snapshot.deferred and snapshot.state in ADMITTING)
        return list(itertools.islice((each for each in waiting if each.name not in not_due), MOST_PACED))

    def _holds_few(self) -> bool:
        """Whether tasks wait that are over their workers' own limits, and this one has nearly run those it holds."""
        if all(each.policy.max_concurrency_per_worker is None for each in self._runtime.breakers.values()):
            return False
        limited = (each for each in self._runtime.present() if each.policy.max_concurrency_per_worker is not None)
        return any(each.cached_state.snapshot.deferred and self._holding.wants_more(each) for each in limited)

    def _report_to_store(self) -> None:
        ledger = self._runtime.fleet.ledger
        self._gate.report_taken_up(ledger.taken_up)
        now = time.monotonic()
        if now >= self._declare_at:
            ledger.declare(self._runtime.breakers)
            ledger.attend(self._name, [queue.name for queue in self._runtime.app.amqp.queues.consume_from.values()])
            self._declare_at = now + DECLARING
            if self._sender_seen:
                self._sender_seen = False
                ledger.tick_sender_seen(self._runtime.tick_scope)
        self._revokes.pass_on(ledger, lambda: [breaker.name for breaker in self._runtime.present()])

    def _no_tick_for(self, seconds: float) -> bool:
        age = self._runtime.fleet.ledger.last_tick_age(self._runtime.tick_scope)
        return age is None or age > seconds


#: The lease of a tick outlives this many intervals; a worker that dies in mid-tick holds up no longer.
LEASE_INTERVALS = 3
SHORTEST_LEASE = 3.0
#: Seconds between comparisons of the store's index with what really lies in the deferred queues.
RECONCILE_INTERVAL = 10.0
#: Share of a tick's interval that it spends on children at most.
CHILDREN_SHARE = 0.25
#: Breakers whose waiting tasks are resumed between ticks at most.
MOST_PACED = 20
#: A breaker that no worker has declared for this many seconds is gone: renamed or removed by a deploy.
ABANDONED_AFTER = 600.0


def anything_due(breaker: Dependency, snapshot: Snapshot, now: float) -> bool:
    """Whether a tick would have something to do for a breaker at ``now`` on the store's clock."""
    if snapshot.next_deadline_at is not None and snapshot.next_deadline_at <= now:
        return True
    if snapshot.state is State.OPEN:
        return snapshot.open_until is not None and snapshot.open_until <= now
    if snapshot.state is State.HALF_OPEN or (snapshot.state in ADMITTING and snapshot.deferred > 0):
        return True
    return breaker.probe_to_run is not None and breaker.probe_to_run.is_due(replace(snapshot, now=now))


class Tick:
    """Runs ticks in one worker; a probe that has changed something asks for another by ``wake``."""

    def __init__(
        self, runtime: Runtime, consumer: Any, wake: Callable[[], None], room: Callable[[Dependency], int] = no_limit
    ) -> None:
        self._runtime = runtime
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
        self._tasks = DeferredTasks(runtime, Events(runtime.app, consumer))
        self._resumer = Resumer(runtime, self._tasks, room)
        self._reconciler = Reconciler(runtime, self._tasks)
        self._prober = Prober(wake)
        self._reconciled_at = -math.inf
        self._child_reconciled_at: dict[str, float] = {}  # active ones; by the monotonic clock, as above
        self._last_child = ""  # the one that was served last
        self.not_due: set[str] = set()  # breakers for which this worker has found no task due since it last ran a tick
        self._troubles: dict[str, type[Exception]] = {}

    def run(self, *, observed_for: float = 0.0) -> bool:
        """Do everything that is due; False if another worker is at it.

        Only who has been in touch with the store for long, without a gap, knows that a breaker is abandoned.
        """
        fleet, scope = self._runtime.fleet, self._runtime.tick_scope
        with self._lease() as held:
            if not held:
                return False
            self.not_due.clear()
            fleet.view.refresh()
            self._reconcile(observed_for)
            for breaker in self._runtime.breakers.values():
                self._serve_if_due(breaker)
            self._serve_children()
            fleet.ledger.tick_completed(scope)
        return True

    def refill(self, paced: Sequence[Dependency]) -> float | None:
        """Resume tasks of these breakers, and those that wait for a slot where one is free.

        Return after how many seconds there is more to do; None if another worker is at a tick.
        """
        limited = [
            breaker
            for breaker in self._runtime.present()
            if not breaker.cached_state.admits_freely or breaker.policy.max_concurrency_per_worker is not None
        ]
        breakers, goes_on = list({each.name: each for each in (*limited, *paced)}.values()), False
        with self._lease() as held:
            if not held:
                return None
            snapshots = self._runtime.fleet.store.read([breaker.spec for breaker in breakers])
            for breaker, snapshot in zip(breakers, snapshots, strict=True):
                if snapshot.state in ADMITTING and snapshot.deferred and snapshot.has_room:
                    self._shielded(breaker.name, partial(self._resume, breaker, snapshot))
                    goes_on |= breaker in paced and breaker.name not in self.not_due
        return self._runtime.settings.tick_interval / PORTIONS if goes_on else math.inf

    def _lease(self) -> AbstractContextManager[bool]:
        ttl = max(SHORTEST_LEASE, LEASE_INTERVALS * self._runtime.settings.tick_interval)
        return self._runtime.fleet.ledger.tick_lease(self._holder, ttl=ttl, scope=self._runtime.tick_scope)

    def _serve_children(self) -> None:
        """Serve as many children as there is time for, and the others in the next ticks: there may be thousands."""
        give_up_at = time.monotonic() + CHILDREN_SHARE * self._runtime.settings.tick_interval
        children = sorted(self._runtime.active_children(), key=lambda child: child.name)
        first = bisect_right(children, self._last_child, key=lambda child: child.name)
        for child in (*children[first:], *children[:first]):
            if self._child_reconciled_at.get(child.name, -math.inf) < time.monotonic() - RECONCILE_INTERVAL:
                self._child_reconciled_at[child.name] = time.monotonic()
                self._shielded(child.name, partial(self._reconciler.reconcile, child))
            self._serve_if_due(child)
            self._last_child = child.name
            if time.monotonic() > give_up_at:
                return
        self._child_reconciled_at = {child.name: self._child_reconciled_at[child.name] for child in children}

    def _resume(self, breaker: Dependency, snapshot: Snapshot) -> None:
        if not self._resumer.resume(breaker, snapshot):
            self.not_due.add(breaker.name)

    def _serve_if_due(self, breaker: Dependency) -> None:
        fleet, snapshot = self._runtime.fleet, breaker.cached_state.snapshot
        if anything_due(breaker, snapshot, fleet.view.server_now()):
            self._shielded(breaker.name, partial(self._serve, breaker))
        elif breaker.spec.parent is not None and snapshot.state is State.CLOSED:
            fleet.store.mark_idle(breaker.spec)

    def _serve(self, breaker: Dependency) -> None:
        fleet = self._runtime.fleet
        answer = fleet.store.advance(breaker.spec, jitter=random.random())
        fleet.learn(answer)
        snapshot = answer.snapshot
        self._reconciler.expire(breaker, snapshot)
        if breaker.probe_to_run is not None and breaker.probe_to_run.is_due(snapshot):
            self._prober.start(breaker, breaker.probe_to_run, snapshot)
        if snapshot.state is State.HALF_OPEN and breaker.probe_to_run is None:
            self._resumer.release_trials(breaker, snapshot)
        elif snapshot.state in ADMITTING and snapshot.deferred:
            self._resume(breaker, snapshot)
            if snapshot.deferred <= PAGE:  # the index nears its end: more may wait than it says
                self._reconciler.reconcile(breaker)

    def _reconcile(self, observed_for: float) -> None:
        if time.monotonic() - self._reconciled_at < RECONCILE_INTERVAL:
            return
        self._reconciled_at = time.monotonic()
        for breaker in (*self._runtime.breakers.values(), *self._reconciler.some_children()):
            self._shielded(breaker.name, partial(self._reconciler.reconcile, breaker))
        if observed_for >= ABANDONED_AFTER:
            self._shielded("abandoned", partial(self._reconciler.return_orphans, ABANDONED_AFTER))

    def _shielded(self, name: str, step: Callable[[], object]) -> None:
        """Run one step; what goes wrong with one breaker delays no other, and is logged once while it lasts."""
        try:
            step()
        except StoreError:
            raise
        except Exception as exc:
            if self._troubles.get(name) is not type(exc):
                logger.exception("the tick failed for breaker %r; the next ones try again", name)
            self._troubles[name] = type(exc)
        else:
            self._troubles.pop(name, None)

    def close(self) -> None:
        """Close connections."""
        self._tasks.close()


#: Seconds that one tick may spend on ending the expired tasks of one breaker.
EXPIRING = 1.0
#: Children that are looked at in one go although nothing is known to wait for them, and because of their queues.
MOST_CHILDREN, MOST_FOUND = 10, 200
#: Seconds that a message may take from the index to its queue.
ON_ITS_WAY = 5.0


class Reconciler:
    """Brings deferred queues and the store's index in line, for the ticks of one worker."""

    def __init__(self, runtime: Runtime, tasks: DeferredTasks) -> None:
        self._runtime = runtime
        self._tasks = tasks
        self._children = self._all_children()
        self._empty_since: dict[str, float] = {}  # breakers for which tasks are indexed, and none waits

    def some_children(self) -> list[Dependency]:
        """Return children whose waiting tasks may be indexed nowhere, because a store may have lost its data.

        Those that no worker attends to, but whose queues the broker knows; and, each time, a few of all there are.
        """
        fleet, defines = self._runtime.fleet, self._runtime.defines
        names = list(itertools.islice(self._children, MOST_CHILDREN))
        if len(names) < MOST_CHILDREN:
            self._children = self._all_children()
        attended = set(fleet.view.active_children())
        found = [
            name for name in self._tasks.queues.found() if name not in attended and is_child(name) and defines(name)
        ]
        return [self._runtime.breaker(name) for name in (*found[:MOST_FOUND], *filter(is_child, names))]

    def _all_children(self) -> Iterator[str]:
        """Yield the children that this process knows, then all others; and parents, one per request to the store."""
        yield from [each.name for each in self._runtime.fleet.view.states() if each.spec.parent is not None]
        for parent in list(self._runtime.breakers):
            for start in itertools.count(0, PAGE):
                names = self._runtime.fleet.store.children(parent, start=start, count=PAGE)
                yield from (*names, parent)
                if len(names) < PAGE:
                    break

    def expire(self, breaker: Dependency, snapshot: Snapshot) -> None:
        """Dead-letter tasks whose ``defer_for`` or ``expires`` is over, drop those that were revoked."""
        if snapshot.next_deadline_at is None or snapshot.next_deadline_at > snapshot.now:
            return
        give_up_at = time.monotonic() + EXPIRING

        def choose(entries: Sequence[Entry]) -> list[Move]:
            errors = self._tasks.ends(entries, snapshot.now)
            due = (entry for entry in entries if entry.task_id in errors and time.monotonic() < give_up_at)
            moves = [self._tasks.end(entry, errors[entry.task_id]) for entry in due]
            return [move for move in moves if move is not None]

        for _ in self._tasks.transfer_all(breaker.name, choose, enough=lambda: time.monotonic() >= give_up_at):
            continue

    def reconcile(self, breaker: Dependency) -> None:
        """Index what waits on the broker: deferrals without a store are missing, lost copies still there."""
        fleet = self._runtime.fleet
        waiting = self._tasks.count(breaker.name)
        if not waiting and not breaker.cached_state.snapshot.deferred:
            return
        snapshot = fleet.store.read([breaker.spec])[0]
        if waiting > 0 or snapshot.deferred == 0:
            self._empty_since.pop(breaker.name, None)
        elif snapshot.now - self._empty_since.setdefault(breaker.name, snapshot.now) > ON_ITS_WAY:
            # not at once: a message may be on its way, because the index is written first
            fleet.ledger.clear_deferred(breaker.name)
        if waiting > snapshot.deferred:  # the index is written first and cleared first: some deferrals are missing
            self._tasks.transfer(breaker.name, partial(self._index, breaker.name))

    def _index(self, breaker: str, entries: Sequence[Entry]) -> list[Move]:
        waits = {entry.task_id: Wait(entry.envelope.ends_at, entry.envelope.since or None) for entry in entries}
        self._runtime.fleet.ledger.add_all_deferred(breaker, waits)
        return []

    def return_orphans(self, unseen_for: float) -> None:
        """Resume the tasks of breakers that no worker defines any more; the gate decides by the current code."""
        fleet = self._runtime.fleet
        for parent in fleet.ledger.abandoned(unseen_for=unseen_for):
            names = *fleet.store.children(parent), parent
            if not [name for name in names if self._leaves_orphans(name)]:
                fleet.ledger.retire([parent])

    def _leaves_orphans(self, name: str) -> bool:
        """Resume all tasks that wait for a breaker; return whether some are left."""
        why = f"resumed, breaker {name!r} is defined nowhere any more"
        while self._tasks.transfer(name, partial(self._tasks.resume, epoch=0, why=why))[1]:
            logger.warning("breaker %r is defined nowhere any more: its tasks are resumed", name)
        is_left = self._tasks.count(name) > 0
        if not is_left:
            self._runtime.fleet.ledger.clear_deferred(name)
        return is_left
