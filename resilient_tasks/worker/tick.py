"""The tick: let due breakers into HALF_OPEN, probe them, resume what waits.

One idempotent function under a lease in the store: however many beats and workers call it, one runs.
"""

from __future__ import annotations

import logging
import math
import os
import random
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from resilient_tasks.core.model import ADMITTING, Snapshot, State
from resilient_tasks.errors import StoreError
from resilient_tasks.store.server import portions
from resilient_tasks.worker.deferred_tasks import PAGE, DeferredTasks
from resilient_tasks.worker.events import Events
from resilient_tasks.worker.probe import Prober
from resilient_tasks.worker.reconcile import Reconciler
from resilient_tasks.worker.resume import Resumer

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: The lease of a tick outlives this many intervals; a worker that dies in mid-tick holds up no longer.
LEASE_INTERVALS = 3
SHORTEST_LEASE = 3.0
#: Seconds between comparisons of the store's index with what really lies in the deferred queues.
RECONCILE_INTERVAL = 10.0
#: Share of a tick's interval that it spends on children at most, and how many it reads at once.
CHILDREN_SHARE, CHILDREN_AT_ONCE = 0.25, 20
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
    """Runs ticks in one worker.

    Args:
        runtime: the app's runtime.
        consumer: the worker's consumer, for its name and its event dispatcher.
        wake: asks for another tick at once, when a probe has changed something.
    """

    def __init__(self, runtime: Runtime, consumer: Any, wake: Callable[[], None]) -> None:
        self._runtime = runtime
        self._holder = f"{socket.gethostname()}:{os.getpid()}:{threading.get_ident()}"
        self._tasks = DeferredTasks(runtime, Events(runtime.app, consumer))
        self._resumer = Resumer(runtime, self._tasks)
        self._reconciler = Reconciler(runtime, self._tasks)
        self._prober = Prober(runtime, wake)
        self._reconciled_at = -math.inf
        self._reconciled: dict[str, float] = {}  # active children -> when, by the monotonic clock
        self._last_child = ""  # the one that was served last
        self._troubles: dict[str, type[Exception]] = {}

    def run(self, *, observed_for: float = 0.0) -> bool:
        """Do everything that is due; False if another worker is at it.

        Args:
            observed_for: seconds for which this worker has been in touch with the store without a gap; only
                who has watched long enough can tell that a breaker is abandoned.

        Raises:
            StoreError: the store is away.
        """
        fleet, scope = self._runtime.fleet, self._runtime.tick_scope
        with self._lease() as held:
            if not held:
                return False
            self._reconcile(observed_for)
            self._serve_due(list(self._runtime.breakers.values()))
            self._serve_children()
            fleet.ledger.tick_completed(scope)
        return True

    def refill(self) -> bool:
        """Resume tasks that wait for a slot where one is free; False if another worker is at a tick.

        Raises:
            StoreError: the store is away.
        """
        limited = [
            breaker
            for breaker in self._runtime.present()
            if not breaker.standing.admits_freely or breaker.policy.max_concurrency_per_worker is not None
        ]
        with self._lease() as held:
            if held:
                specs = [breaker.spec for breaker in limited]
                for breaker, snapshot in zip(limited, self._runtime.fleet.store.read(specs), strict=True):
                    if snapshot.state is State.CLOSED and snapshot.deferred and snapshot.has_room:
                        self._shielded(breaker.name, partial(self._resumer.resume, breaker, snapshot))
        return held

    def _lease(self) -> AbstractContextManager[bool]:
        ttl = max(SHORTEST_LEASE, LEASE_INTERVALS * self._runtime.settings.tick_interval)
        return self._runtime.fleet.ledger.tick_lease(self._holder, ttl=ttl, scope=self._runtime.tick_scope)

    def _serve_children(self) -> None:
        """Serve as many children as there is time for, and the others in the next ticks: there may be thousands."""
        give_up_at = time.monotonic() + CHILDREN_SHARE * self._runtime.settings.tick_interval
        children = sorted(self._runtime.active_children(), key=lambda child: child.name)
        first = bisect_right(children, self._last_child, key=lambda child: child.name)
        for some in portions([*children[first:], *children[:first]], CHILDREN_AT_ONCE):
            for child in some:
                if self._reconciled.get(child.name, -math.inf) < time.monotonic() - RECONCILE_INTERVAL:
                    self._reconciled[child.name] = time.monotonic()
                    self._shielded(child.name, partial(self._reconciler.reconcile, child))
            self._serve_due(some)
            self._last_child = some[-1].name
            if time.monotonic() > give_up_at:
                return
        self._reconciled = {child.name: self._reconciled[child.name] for child in children}

    def _serve_due(self, breakers: Sequence[Dependency]) -> None:
        store = self._runtime.fleet.store
        snapshots = store.read([breaker.spec for breaker in breakers])
        for breaker, snapshot in zip(breakers, snapshots, strict=True):
            if anything_due(breaker, snapshot, snapshot.now):
                self._shielded(breaker.name, partial(self._serve, breaker))
            elif breaker.spec.parent is not None and snapshot.state is State.CLOSED:
                store.mark_idle(breaker.spec)

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
            self._resumer.resume(breaker, snapshot)
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
        """Run one step; what goes wrong with one breaker holds up no other, and is told once while it lasts."""
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
