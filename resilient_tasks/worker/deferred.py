"""Deferred tasks by hand: seen, resumed and dropped by a person or a script, with or without a living worker.

``Resilience.deferred`` is the one way to them, from any process: a shell, a script, a web process.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery.exceptions import TaskRevokedError

from resilient_tasks.core.model import ADMITTING
from resilient_tasks.core.outage import DROPPED
from resilient_tasks.errors import BreakerOpenError
from resilient_tasks.worker.deferred_tasks import DeferredTasks
from resilient_tasks.worker.events import Events
from resilient_tasks.worker.queues import Entry, Move
from resilient_tasks.worker.resume import Resumer

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime


@dataclass(frozen=True, slots=True)
class DeferredTask:
    """One task that waits for a breaker. Times are seconds since the epoch on the store's clock.

    Args:
        task_id: id of the task.
        task: name of the task.
        breaker: the breaker that it waits for.
        origin: name of the queue that it came from and goes back to.
        reason: why it was deferred.
        since: when it was first deferred.
        attempts: dependency failures of its own that have counted.
        not_before: until when it waits for its own sake, after a failure; None if it has never failed.
        ends_at: when its wait ends at the latest, by ``defer_for`` or ``expires``; None if by neither.
        args: its positional arguments as its sender has abbreviated them for people.
        kwargs: its keyword arguments in the same way.
    """

    task_id: str
    task: str
    breaker: str
    origin: str
    reason: str
    since: float
    attempts: int
    not_before: float | None
    ends_at: float | None
    args: str
    kwargs: str


class Deferred:
    """The deferred tasks of one app's breakers. Whatever the broker raises comes through."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._tasks = DeferredTasks(runtime, Events(runtime.app), runtime.queues)

    def count(self, breaker: str) -> int:
        """Return the number of tasks that wait for a breaker."""
        return self._tasks.count(breaker)

    def list(self, breaker: str, *, limit: int = 100) -> tuple[DeferredTask, ...]:
        """Return those that wait longest, at most ``limit``."""
        queues = self._tasks.queues
        with queues.peek(queues.deferred(breaker), breaker) as entries:
            return tuple(_describe(entry) for entry in itertools.islice(entries, limit) if not entry.flaw)

    def resume(self, breaker: str, *, limit: int | None = None, force: bool = False) -> int:
        """Send tasks back to the queues that they came from, now, those that wait longest first.

        Unlike the workers' own resuming this is not paced, and takes also those that wait for their own sake.

        Args:
            breaker: name of the breaker that they wait for.
            limit: most tasks to resume; ``None``: all that wait now.
            force: also while the breaker refuses: its workers would defer them again.

        Returns:
            How many were resumed. Revoked ones are dropped, ended ones dead-lettered instead.

        Raises:
            BreakerOpenError: the breaker refuses.
            ConfigurationError: nobody defines it.
            StoreError: the store is away.
        """
        waiting = self.count(breaker)  # those that are deferred again meanwhile are not resumed again
        return len(self._release(breaker, waiting if limit is None else min(limit, waiting), force=force))

    def resume_some(self, breaker: str, task_ids: Collection[str], *, force: bool = False) -> tuple[str, ...]:
        """Send some tasks back to the queues that they came from, now; see :meth:`resume`.

        Args:
            breaker: name of the breaker that they wait for.
            task_ids: which ones.
            force: also while the breaker refuses.

        Returns:
            The ids of those that were there, but for those that were dropped or dead-lettered instead.

        Raises:
            BreakerOpenError, ConfigurationError, StoreError: as above.
        """
        wanted = set(task_ids)
        resumed = self._release(breaker, len(wanted), only=wanted, force=force)
        return tuple(task_id for task_id in task_ids if task_id in resumed)

    def _release(self, breaker: str, limit: int, *, only: Collection[str] | None = None, force: bool) -> Sequence[str]:
        known = self._runtime.breaker(breaker)
        [snapshot] = self._runtime.fleet.store.read_shared([known.spec])
        if snapshot.state not in ADMITTING and not force:
            raise BreakerOpenError(breaker, str(snapshot.state), snapshot.retry_after)
        return Resumer(self._runtime, self._tasks).release(known, snapshot, limit, only=only, early=True)

    def drop(self, breaker: str, task_ids: Collection[str] | None = None) -> tuple[str, ...]:
        """Drop tasks that shall never run; their results are REVOKED, callbacks and chords hear of it.

        Args:
            breaker: name of the breaker that they wait for.
            task_ids: which ones; ``None``: all.

        Returns:
            The ids of those that were dropped. One whose result cannot be written goes on waiting.

        Raises:
            StoreError: the store is away.
        """
        dropped: list[str] = []

        def choose(entries: Sequence[Entry]) -> list[Move]:
            doomed = [entry for entry in entries if task_ids is None or entry.task_id in task_ids]
            moves = [self._tasks.end(entry, TaskRevokedError(DROPPED)) for entry in doomed]
            return [move for move in moves if move is not None]

        def enough() -> bool:
            return task_ids is not None and len(dropped) >= len(task_ids)

        for moves in self._tasks.transfer_all(breaker, choose, enough=enough):
            dropped.extend(move.entry.task_id for move in moves if not move.entry.flaw)
        return tuple(dropped)


def _describe(entry: Entry) -> DeferredTask:
    ticket, headers = entry.ticket, entry.message.headers or {}
    return DeferredTask(
        task_id=entry.task_id,
        task=entry.task_name,
        breaker=ticket.breaker,
        origin=ticket.origin,
        reason=ticket.reason,
        since=ticket.since,
        attempts=ticket.attempts,
        not_before=ticket.not_before or None,
        ends_at=ticket.ends_at,
        args=str(headers.get("argsrepr", "")),
        kwargs=str(headers.get("kwargsrepr", "")),
    )
