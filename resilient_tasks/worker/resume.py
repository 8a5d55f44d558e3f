"""Resuming: deferred tasks go back to the queues they came from, slowly at first.

Everything here runs in the tick, on connections of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.pace import Pace, next_pace
from resilient_tasks.worker import seams
from resilient_tasks.worker.deferral import dead, drop, expired, fail, resume
from resilient_tasks.worker.queues import Entry, Move, open_queues
from resilient_tasks.worker.request import GatedRequest

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Waiting messages looked at beyond those that are wanted, in search of some that are due.
LOOK_AHEAD = 500


class Resumer:
    """Moves waiting messages for the ticks of one worker."""

    def __init__(self, runtime: Runtime, consumer: Any) -> None:
        self._runtime = runtime
        self._consumer = consumer
        self._queues = open_queues(runtime.app, runtime.settings.namespace)
        self._dispatcher: Any = None

    # --- what a tick asks for ---------------------------------------------------------------------

    def resume(self, breaker: Breaker, snapshot: Snapshot) -> None:
        """Resume the next batch of a breaker that admits calls."""
        store = self._runtime.fleet.store
        pace = store.pace(breaker.name)
        following, count = next_pace(
            pace,
            snapshot,
            breaker.policy,
            outstanding=self._outstanding(pace),
            interval=self._runtime.settings.tick_interval,
        )
        store.save_pace(breaker.name, following)
        if count > 0 and self._still(breaker, snapshot):
            self._release(breaker, snapshot, count, lambda entries: entries)

    def release_trials(self, breaker: Breaker, snapshot: Snapshot) -> None:
        """Resume as many tasks as there are permits; those that have never failed first."""
        store = self._runtime.fleet.store
        free = breaker.policy.trial_calls - snapshot.trials - store.pace(breaker.name).outstanding
        if free > 0:
            self._release(
                breaker,
                snapshot,
                free,
                lambda entries: sorted(entries, key=lambda entry: entry.ticket.attempted_at > 0),
            )

    def expire(self, breaker: Breaker, snapshot: Snapshot) -> None:
        """Dead-letter tasks whose ``defer_for`` is over."""
        if snapshot.next_deadline_at is None or snapshot.next_deadline_at > snapshot.now:
            return

        def choose(entries: Sequence[Entry]) -> list[Move]:
            return [self._dead_letter(entry, snapshot.now) for entry in entries if expired(entry, snapshot.now)]

        self._sift(breaker.name, self._queues.size(self._queues.deferred(breaker.name)), choose)

    def take_stock(self, breaker: Breaker) -> None:
        """Bring the store's index in line with what really waits on the broker."""
        store = self._runtime.fleet.store
        waiting = self._queues.size(self._queues.deferred(breaker.name))
        indexed = store.read([breaker.spec])[0].deferred
        if waiting == 0 and indexed:
            store.clear_deferred(breaker.name)
        elif waiting > indexed:  # the index is written first and cleared last: some deferrals are missing
            self._queues.sift(breaker.name, LOOK_AHEAD, lambda entries: self._reindex(breaker.name, entries))

    def send_home(self, unseen_for: float) -> None:
        """Resume the tasks of breakers that no worker defines any more; the gate decides by the current code."""
        store = self._runtime.fleet.store
        for name in store.abandoned(unseen_for=unseen_for):
            while self._queues.sift(name, LOOK_AHEAD, self._all_home):
                logger.warning("breaker %r is defined nowhere any more: its deferred tasks are resumed", name)
            store.clear_deferred(name)
            store.retire([name])

    def _all_home(self, entries: Sequence[Entry]) -> list[Move]:
        default_queue = self._runtime.app.conf.task_default_queue
        return [resume(entry, 0, default_queue) for entry in entries]

    def close(self) -> None:
        """Close connections."""
        self._queues.close()

    # --- how ----------------------------------------------------------------------------------------

    def _release(
        self, breaker: Breaker, snapshot: Snapshot, count: int, order: Callable[[Sequence[Entry]], Iterable[Entry]]
    ) -> None:
        store = self._runtime.fleet.store

        def choose(entries: Sequence[Entry]) -> list[Move]:
            due = [entry for entry in entries if self._is_due(breaker, entry, snapshot.now)]
            chosen = list(islice(order(due), count))
            revoked = store.revoked([entry.task_id for entry in chosen]) if chosen else set()
            return [
                self._drop_revoked(entry) if entry.task_id in revoked else self._resume(entry, snapshot)
                for entry in chosen
            ]

        moves = self._sift(breaker.name, count + LOOK_AHEAD, choose)
        resumed = sum(1 for move in moves if move.ticket is not None)
        if resumed:
            store.resumed(breaker.name, resumed)
            logger.info(
                "breaker %r is %s: %d of %d deferred tasks resumed",
                breaker.name,
                snapshot.state,
                resumed,
                snapshot.deferred,
            )

    @staticmethod
    def _is_due(breaker: Breaker, entry: Entry, now: float) -> bool:
        """Whether a task has waited long enough; a wait longer than any of ours is of another clock."""
        return not 0 < entry.ticket.not_before - now <= breaker.policy.max_open_duration

    def _sift(self, breaker: str, scan: int, choose: Callable[[Sequence[Entry]], Sequence[Move]]) -> list[Move]:
        moves = self._queues.sift(breaker, scan, choose)
        if moves:
            self._runtime.fleet.store.remove_deferred(breaker, [move.entry.task_id for move in moves])
        return moves

    def _still(self, breaker: Breaker, snapshot: Snapshot) -> bool:
        """Resuming stops in the tick in which the breaker leaves the state that allowed it."""
        return bool(self._runtime.fleet.store.read([breaker.spec])[0].epoch == snapshot.epoch)

    def _resume(self, entry: Entry, snapshot: Snapshot) -> Move:
        move = resume(entry, snapshot.epoch, self._runtime.app.conf.task_default_queue)
        self._event(
            "task-retried", entry, exception=f"resumed, breaker {snapshot.name!r} is {snapshot.state}", traceback=None
        )
        return move

    def _drop_revoked(self, entry: Entry) -> Move:
        request = self._request(entry)
        if request is None:
            self._runtime.app.backend.mark_as_revoked(entry.task_id, "revoked")
        else:
            seams.announce_revoked(request, "revoked")
        return drop(entry)

    def _dead_letter(self, entry: Entry, now: float) -> Move:
        error = expired(entry, now)
        request = self._request(entry)
        if error is not None and request is not None:
            fail(request, error)
        elif error is not None:
            self._runtime.app.backend.mark_as_failure(entry.task_id, error)
        logger.warning("Task %s[%s] is dead-lettered: %s", entry.task_name, entry.task_id, error)
        return dead(entry, self._queues, str(error))

    def _reindex(self, breaker: str, entries: Sequence[Entry]) -> list[Move]:
        for entry in entries:
            self._runtime.fleet.store.add_deferred(breaker, entry.task_id, deadline=entry.ticket.deadline or None)
        return []

    def _outstanding(self, pace: Pace) -> int:
        """Resumed tasks that no worker has taken up: never more than lie in the queues that workers consume."""
        if not pace.outstanding:
            return 0
        consumed = {queue.name for queue in self._runtime.app.amqp.queues.consume_from.values()}
        return min(pace.outstanding, self._queues.size(*consumed))

    def _request(self, entry: Entry) -> GatedRequest | None:
        """Return the request that a worker would make of a message; None if it could not."""
        try:
            return GatedRequest(
                entry.message, app=self._runtime.app, task=self._runtime.app.tasks[entry.task_name],
                hostname=self._consumer.hostname, eventer=self._events(),
                body=entry.message.body, headers=entry.message.headers, decoded=False,
            )  # fmt: skip
        except Exception as exc:  # noqa: BLE001 - whatever a stranger wrote into the message
            logger.warning("Task %s[%s] is no task of this app: %r", entry.task_name, entry.task_id, exc)
            return None

    def _event(self, kind: str, entry: Entry, **fields: Any) -> None:
        events = self._events()
        if events is not None:
            events.send(kind, uuid=entry.task_id, **fields)

    def _events(self) -> Any:
        """An event dispatcher under the worker's name, on this thread's own connection."""
        worker_events = self._consumer.event_dispatcher
        if worker_events is None or not worker_events.enabled:
            return None
        if self._dispatcher is None:
            self._dispatcher = self._runtime.app.events.Dispatcher(
                self._runtime.app.connection_for_write(), hostname=self._consumer.hostname, groups=worker_events.groups
            )
        return self._dispatcher
