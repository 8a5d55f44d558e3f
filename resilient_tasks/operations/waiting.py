"""Deferred and dead-lettered tasks by hand: seen, resumed, replayed and dropped, with or without a running worker.

``Resilience.deferred`` and ``Resilience.dead_letters`` are the way to them, from any process: a shell, a script, a web
process.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any

from celery import states
from celery.exceptions import TaskRevokedError

from resilient_tasks.core.model import ADMITTING, Snapshot, parent_of
from resilient_tasks.core.outage import DROPPED
from resilient_tasks.dependency import Dependency
from resilient_tasks.errors import BreakerOpenError, DeadLetterError, StoreError
from resilient_tasks.monitor.report import counted
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.celery_internals import Events
from resilient_tasks.worker.context import Runtime
from resilient_tasks.worker.deferred_tasks import DeferredTasks, Resumer
from resilient_tasks.worker.envelope import UNDECODABLE, Step, without_envelope
from resilient_tasks.worker.queues import Entry, Move
from resilient_tasks.worker.request import ResultNotWrittenError, write_result

logger = logging.getLogger("resilient_tasks")

#: Most tasks, and fewest seconds, between two batches that are resumed at a rate.
BATCH, BATCH_INTERVAL = 500, 0.1


@dataclass(frozen=True, slots=True)
class WaitingTask:
    """One task whose message is in a queue of ours. Times are seconds since the epoch on the store's clock."""

    task_id: str  # ``"undecodable-..."`` for a message that names none
    task: str  # its name; "" if the message names none
    breaker: str  # that it waits, or waited, for
    origin: str  # name of the queue that it came from and goes back to; "" if that is unknown
    reason: str  # why it was deferred, or dead-lettered
    since: float | None  # when it was first deferred; None if it never was
    attempts: int  # dependency failures of its own that have counted
    args: str  # its positional arguments as its sender has abbreviated them for people
    kwargs: str  # its keyword arguments in the same way


@dataclass(frozen=True, slots=True)
class DeferredTask(WaitingTask):
    """A :class:`WaitingTask` that waits for a breaker."""

    not_before: float | None  # until when it waits for its own sake, after a failure; None if it has never failed
    ends_at: float | None  # when its wait ends at the latest, by ``defer_for`` or ``expires``; None if by neither


@dataclass(frozen=True, slots=True)
class DeadLetter(WaitingTask):
    """A :class:`WaitingTask` that has ended in a dead-letter queue, where it is replayed or dropped by hand."""

    died_at: float | None  # when it was dead-lettered; None if that is unknown
    history: tuple[Step, ...]  # its latest steps, oldest first
    headers: Mapping[str, Any]  # the message's, as they were published
    body: bytes  # the message's, as it was published; for what cannot be decoded, all that there is

    def public_fields(self) -> dict[str, Any]:
        """Return its fields as JSON values, without headers and body, which may hold secrets."""
        shown = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in ("headers", "body")}
        return {**shown, "history": [step._asdict() for step in self.history]}


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
            return tuple(_deferred_task(entry) for entry in itertools.islice(entries, limit) if not entry.flaw)

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
            ConfigurationError: no process defines it.
            StoreError: the store is unavailable.
        """
        waiting = self.count(breaker)  # those that are deferred again meanwhile are not resumed again
        return len(self._release(breaker, waiting if limit is None else min(limit, waiting), None, force=force))

    def resume_at(self, breaker: str, rate: float | None, *, force: bool = False) -> Iterator[tuple[int, float]]:
        """Resume the tasks that wait now in batches, so many per second; None: as fast as it goes.

        Yields:
            How many one batch has resumed, and for how many seconds to wait before the next.

        Raises:
            BreakerOpenError, ConfigurationError, StoreError: as :meth:`resume`.
        """
        self._admitting(breaker, force=force)  # it may refuse although none waits
        waiting, asked, started = self.count(breaker), 0, time.monotonic()
        while asked < waiting:
            due = waiting if rate is None else 1 + math.floor((time.monotonic() - started) * rate)
            batch = min(due, waiting, asked + BATCH) - asked
            asked += batch
            resumed = len(self._release(breaker, batch, None, force=force)) if batch else 0
            pause = max(BATCH_INTERVAL, started + asked / rate - time.monotonic()) if rate and asked < waiting else 0.0
            yield resumed, pause

    def resume_some(self, breaker: str, task_ids: Collection[str], *, force: bool = False) -> tuple[str, ...]:
        """Resume the tasks of these ids; arguments and errors as for :meth:`resume`.

        Returns:
            The ids of those that were there, but for those that were dropped or dead-lettered instead.
        """
        resumed = self._release(breaker, len(set(task_ids)), set(task_ids), force=force)
        return tuple(task_id for task_id in task_ids if task_id in resumed)

    def _release(self, breaker: str, limit: int, only: Collection[str] | None, *, force: bool) -> Sequence[str]:
        known, snapshot = self._admitting(breaker, force=force)
        return Resumer(self._runtime, self._tasks).release(known, snapshot, limit, only=only, early=True)

    def _admitting(self, breaker: str, *, force: bool) -> tuple[Dependency, Snapshot]:
        known = self._runtime.breaker(breaker)
        [snapshot] = self._runtime.fleet.store.read_shared([known.spec])
        if snapshot.state not in ADMITTING and not force:
            raise BreakerOpenError(breaker, str(snapshot.state), snapshot.retry_after)
        return known, snapshot

    def drop(self, breaker: str, task_ids: Collection[str] | None = None) -> tuple[str, ...]:
        """Drop tasks that shall never run; their results are REVOKED, callbacks and chords are called.

        Args:
            breaker: name of the breaker that they wait for.
            task_ids: which ones; ``None``: all.

        Returns:
            The ids of those that were dropped. One whose result cannot be written goes on waiting.

        Raises:
            StoreError: the store is unavailable.
        """
        dropped: list[str] = []

        def choose(entries: Sequence[Entry]) -> list[Move]:
            wanted = (entry for entry in entries if task_ids is None or entry.task_id in task_ids)
            return [move for entry in wanted if (move := self._tasks.end(entry, TaskRevokedError(DROPPED)))]

        def enough() -> bool:
            return task_ids is not None and len(dropped) >= len(task_ids)

        for moves in self._tasks.transfer_all(breaker, choose, enough=enough):
            dropped.extend(move.entry.task_id for move in moves if not move.entry.flaw)
        return tuple(dropped)


class DeadLetters:
    """The dead-lettered tasks of one app's breakers.

    ``breaker=None`` means those of all breakers that the app defines and of their children, and ``"undecodable"``,
    messages that never came as far as a breaker; any name may be given, also of a breaker that is defined no
    more. A breaker's are those of its children, too. Whatever the broker raises comes through.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._queues = runtime.queues

    def count(self, breaker: str | None = None) -> dict[str, int]:
        """Return the number of dead-lettered tasks by breaker."""
        sizes = {name: self._count(name) for name in self._names(breaker)}
        if breaker is None and not sizes[UNDECODABLE]:
            del sizes[UNDECODABLE]  # no breaker's, and rarely there
        return sizes

    def list(self, breaker: str | None = None, *, limit: int = 100) -> tuple[DeadLetter, ...]:
        """Return the oldest, at most ``limit`` of each breaker."""
        found: list[DeadLetter] = []
        for name in self._names(breaker):
            with self._open(name) as entries:
                found += map(_dead_letter, itertools.islice(entries, limit))
        return tuple(found)

    def show(self, task_id: str, *, breaker: str | None = None) -> DeadLetter:
        """Return one dead-lettered task.

        Raises:
            DeadLetterError: there is none of that id.
        """
        shown: list[DeadLetter] = []
        self._each((task_id,), breaker, lambda entry: shown.append(_dead_letter(entry)))
        return shown[0]

    def replay(self, *task_ids: str, breaker: str | None = None) -> dict[str, int]:
        """Send tasks again as they were first published, straight to the queues that they came from.

        They start afresh: no attempts, a whole ``defer_for``, and PENDING as their state. On Redis each is in
        exactly one place all the time; on other brokers a crash may leave a second copy, never none.

        Returns:
            How many, by the breaker that they had waited for.

        Raises:
            DeadLetterError: there is none of that id, it is no task, its ``expires`` is over, or its queue is gone;
                all the others are replayed.
        """
        return self._each(task_ids, breaker, self._replay)

    def drop(self, *task_ids: str, breaker: str | None = None) -> dict[str, int]:
        """Delete dead-lettered tasks; several copies of one message are as many dead letters of one id.

        Returns:
            How many, by the breaker that they had waited for.

        Raises:
            DeadLetterError: there is none of that id; all the others are dropped.
        """
        return self._each(task_ids, breaker, self._drop)

    def _names(self, breaker: str | None) -> tuple[str, ...]:
        return (*self._runtime.breakers, UNDECODABLE) if breaker is None else (breaker,)

    def _count(self, breaker: str) -> int:
        if parent_of(breaker) is None:
            return self._queues.size(self._queues.dead(breaker))
        with self._open(breaker) as entries:
            return sum(1 for _ in entries)

    @contextmanager
    def _open(self, breaker: str) -> Iterator[Iterator[Entry]]:
        """Open the dead-lettered tasks of a breaker; those of a child are among its parent's."""
        parent = parent_of(breaker)
        with self._queues.peek(self._queues.dead(breaker), parent or breaker) as entries:
            yield (entry for entry in entries if parent is None or entry.envelope.breaker == breaker)

    def _each(self, task_ids: tuple[str, ...], breaker: str | None, act: Callable[[Entry], object]) -> dict[str, int]:
        """Do something to the oldest message of each id; raise errors only after all the others are done."""
        names, wanted, done = self._names(breaker), Counter(task_ids), Counter[str]()
        problems: list[str] = []
        for name in names:
            found: list[Entry] = []
            with self._open(name) as entries:
                while wanted.total() and (entry := next(entries, None)) is not None:
                    if wanted[_id_of(entry)]:
                        wanted[_id_of(entry)] -= 1
                        found.append(entry)
                for entry in found:
                    try:
                        act(entry)
                        done[entry.envelope.breaker] += 1
                    except DeadLetterError as error:  # noqa: PERF203 - the others are done
                        problems.append(str(error))
        searched = ", ".join(map(repr, names)) or "none"
        problems += [f"no dead letter has the id {each!r}; breakers asked: {searched}" for each in wanted.elements()]
        if problems:
            raise DeadLetterError("; ".join(problems), dict(done))
        return dict(done)

    def _replay(self, entry: Entry) -> None:
        if entry.flaw or entry.unreadable():
            raise DeadLetterError(f"dead letter {_id_of(entry)!r} cannot be replayed: it is {UNDECODABLE}")
        if _is_over(entry):
            raise DeadLetterError(f"dead letter {entry.task_id!r} cannot be replayed: its expires is over")
        self._set_result(entry, None, states.PENDING)
        origin = self._runtime.origin(entry.envelope)
        if not self._move(Move(entry, origin)):
            gone = f"dead letter {entry.task_id!r} is not replayed: it, or its queue {origin!r}, is there no more"
            error = DeadLetterError(gone)
            self._set_result(entry, error, states.FAILURE)
            raise error
        what = "Task %s[%s] is replayed to %s"
        logger.info(what, entry.task_name, entry.task_id, origin, extra=entry.log_fields)

    def _drop(self, entry: Entry) -> None:
        if not self._move(Move(entry, None)):
            raise DeadLetterError(f"dead letter {_id_of(entry)!r} is there no more")
        logger.info("dead letter %s of breaker %r is dropped", _id_of(entry), entry.envelope.breaker)

    def _move(self, move: Move) -> bool:
        """Move a message, while its queue is open; False if it is no longer there, or there is no such queue."""
        dead = self._queues.dead(move.entry.envelope.breaker)
        return [made.queue for made in self._queues.move(dead, [move])] == [move.queue]

    def _set_result(self, entry: Entry, result: Any, state: str) -> None:
        """Let callers wait again, or no longer; a backend never replaces the SUCCESS of a copy replayed elsewhere."""
        if entry.message.headers.get("ignore_result"):
            return
        try:
            write_result(self._runtime.app.backend.store_result, entry.task_id, result, state)
        except ResultNotWrittenError as exc:  # the task comes first
            what = "the result of task %s could not be reset: %s"
            logger.warning(what, entry.task_id, exc, extra=entry.log_fields)


def note(runtime: Runtime, done: Mapping[str, int], noun: str, what: str, actor: str) -> None:
    """Log in the history of breakers what ``actor`` has done to how many of their tasks; without a store nothing is."""
    with suppress(StoreError):
        for breaker, count in done.items():
            if count and breaker != UNDECODABLE:
                runtime.fleet.history.note(breaker, f"{counted(count, noun)} {what}", actor)


def _id_of(entry: Entry) -> str:
    return f"{UNDECODABLE}-{hashlib.sha256(entry.raw).hexdigest()[:16]}" if entry.flaw else entry.task_id


def _is_over(entry: Entry) -> bool:
    """Whether a worker would discard the task unrun, because its ``expires`` has passed."""
    try:
        moment = celery_internals.read_moment(entry.message.headers.get("expires"))
    except (AttributeError, TypeError, ValueError):
        return False
    return moment is not None and moment < datetime.now(timezone.utc if moment.tzinfo else None)


def _common_fields(entry: Entry) -> dict[str, Any]:
    envelope, headers = entry.envelope, {} if entry.flaw else entry.message.headers or {}
    return {
        "task_id": _id_of(entry),
        "task": "" if entry.flaw else entry.task_name,
        "breaker": envelope.breaker,
        "origin": envelope.origin,
        "attempts": envelope.attempts,
        "args": str(headers.get("argsrepr", "")),
        "kwargs": str(headers.get("kwargsrepr", "")),
    }


def _deferred_task(entry: Entry) -> DeferredTask:
    envelope = entry.envelope
    return DeferredTask(
        **_common_fields(entry),
        reason=envelope.reason,
        since=envelope.since,
        not_before=envelope.not_before or None,
        ends_at=envelope.ends_at,
    )


def _dead_letter(entry: Entry) -> DeadLetter:
    envelope = entry.envelope
    body = entry.raw if entry.flaw else entry.message.body
    return DeadLetter(
        **_common_fields(entry),
        reason=UNDECODABLE if entry.flaw else envelope.reason,
        since=envelope.since or None,
        died_at=envelope.died_at or None,
        history=envelope.history,
        headers={} if entry.flaw else without_envelope(entry.message.headers),
        body=body.encode() if isinstance(body, str) else bytes(body),
    )
