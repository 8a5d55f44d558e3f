"""What a tick looks for among waiting tasks unasked: ends that are due, what the index misses, and orphans."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from resilient_tasks.core.model import Snapshot, is_child
from resilient_tasks.store.ledger import Wait
from resilient_tasks.worker.deferred_tasks import PAGE, DeferredTasks
from resilient_tasks.worker.queues import Entry, Move

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds that one tick may spend on ending the expired tasks of one breaker.
EXPIRING = 1.0
#: Children that are looked at in one round although nothing is known to wait for them, and because of their queues.
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

        Those that no worker attends to, but whose queues the broker knows; and, round by round, a few of all there are.
        """
        names = list(itertools.islice(self._children, MOST_CHILDREN))
        if len(names) < MOST_CHILDREN:
            self._children = self._all_children()
        attended = set(self._runtime.fleet.view.active_children())
        found = [
            name
            for name in self._tasks.queues.found()
            if name not in attended and is_child(name) and self._runtime.defines(name)
        ]
        return [self._runtime.breaker(name) for name in (*found[:MOST_FOUND], *names)]

    def _all_children(self) -> Iterator[str]:
        """Yield the names of those that this process knows, then of all others: a store may have lost its data."""
        yield from [each.name for each in self._runtime.fleet.view.states() if each.spec.parent is not None]
        for parent in list(self._runtime.breakers):
            for start in itertools.count(0, PAGE):
                names = self._runtime.fleet.store.children(parent, start=start, count=PAGE)
                yield from names
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
        """Index what waits on the broker: deferrals while the store was away are missing, lost copies still there."""
        fleet = self._runtime.fleet
        waiting = self._tasks.count(breaker.name)
        snapshot = fleet.store.read([breaker.spec])[0]
        if waiting > 0 or snapshot.deferred == 0:
            self._empty_since.pop(breaker.name, None)
        elif snapshot.now - self._empty_since.setdefault(breaker.name, snapshot.now) > ON_ITS_WAY:
            # not at once: a message may be on its way, because the index is written first
            fleet.ledger.clear_deferred(breaker.name)
        if waiting > snapshot.deferred:  # the index is written first and cleared first: some deferrals are missing
            self._tasks.transfer(breaker.name, partial(self._index, breaker.name))

    def _index(self, breaker: str, entries: Sequence[Entry]) -> list[Move]:
        waits = {entry.task_id: Wait(entry.ticket.ends_at, entry.ticket.since or None) for entry in entries}
        self._runtime.fleet.ledger.add_all_deferred(breaker, waits)
        return []

    def return_orphans(self, unseen_for: float) -> None:
        """Resume the tasks of breakers that no worker defines any more; the gate decides by the current code."""
        fleet = self._runtime.fleet
        for parent in fleet.ledger.abandoned(unseen_for=unseen_for):
            names = *fleet.store.children(parent), parent
            if False not in [self._return_orphans_of(name) for name in names]:
                fleet.ledger.retire([parent])

    def _return_orphans_of(self, name: str) -> bool:
        """Resume all tasks that wait for a breaker; return whether none is left."""
        why = f"resumed, breaker {name!r} is defined nowhere any more"
        while self._tasks.transfer(name, partial(self._tasks.resume, epoch=0, why=why))[1]:
            logger.warning("breaker %r is defined nowhere any more: its tasks are resumed", name)
        if self._tasks.count(name) > 0:
            return False
        self._runtime.fleet.ledger.clear_deferred(name)
        return True
