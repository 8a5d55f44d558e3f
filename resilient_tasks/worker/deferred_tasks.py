"""``DeferredTasks``: what is done to the tasks that wait: resume, dead-letter, drop; and revokes of them.

``Resumer`` sends them back to the queues that they came from, slowly at first.

A worker forgets revokes when it stops, the ledger keeps them for all workers. A task is revoked by its id or by one of
its stamps. An id is one task's for good, but a stamp comes back on later tasks: revoking it concerns those that had
been sent by then.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import InvalidTaskError, NotRegistered, TaskRevokedError
from celery.signals import task_revoked
from kombu.exceptions import DecodeError

from resilient_tasks import signals
from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.outage import COALESCED, DEAD, DROPPED, EXPIRED, LONGEST_WAIT, RESUMED, REVOKED
from resilient_tasks.core.pace import LARGEST_BATCH, Pace, next_pace, refill_count
from resilient_tasks.dependency import Dependency
from resilient_tasks.errors import DeferralExpiredError, ResilienceError
from resilient_tasks.monitor.events import TASK_IGNORED, TASK_RESUMED
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.broker_queues import open_queues
from resilient_tasks.worker.celery_internals import Events
from resilient_tasks.worker.envelope import check_task, decode, payload_of, task_fields
from resilient_tasks.worker.queues import Entry, Move, Queues
from resilient_tasks.worker.request import (
    GatedRequest,
    ResultNotWrittenError,
    SupersededError,
    superseded_among,
    write_result,
)

if TYPE_CHECKING:
    from resilient_tasks.worker.context import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds after its turn for which a task still supersedes earlier ones, which wait for their own sake after a failure.
CLAIM_OUTLIVES_TURN = 3600.0
#: Waiting tasks, and bytes of their messages, that are looked at in one go.
PAGE = 500
SMALLEST_PAGE = 10
PAGE_SIZE = 1_000_000
#: Seconds for which a task may still be deferred by a worker that has not received its stamp's revoke.
REVOKE_DELAY = 60.0

#: Seconds after which resumed tasks that no worker takes up no longer count as outstanding.
STUCK = 10.0
#: Seconds for which it is remembered which queues workers consume.
CONSUMED_FOR = 1.0

#: Chooses what becomes of some waiting tasks; the others go on waiting.
Choose = Callable[[Sequence[Entry]], Sequence[Move]]


class DeferredTasks:
    """What the tick, or an operator, does to waiting tasks; monitors receive it as events."""

    def __init__(self, runtime: Runtime, events: Events, queues: Queues | None = None) -> None:
        self._runtime = runtime
        self._events = events
        self._ended: set[tuple[str, float]] = set()  # of tasks that have ended, and whose messages are yet to be moved
        self.queues = queues or open_queues(runtime.app, runtime.settings.namespace)

    def count(self, breaker: str) -> int:
        return self.queues.size(self.queues.deferred(breaker))

    def transfer(self, breaker: str, choose: Choose, *, start: int = 0, most: int = PAGE) -> tuple[int, list[Move]]:
        """Offer ``most`` of the oldest waiting tasks, but for the first ``start``, to ``choose`` and make its moves.

        What is no task is dead-lettered, so that it holds up nothing. Return how many messages were looked at, and the
        moves that were made.
        """
        ledger, queue = self._runtime.fleet.ledger, self.queues.deferred(breaker)
        made: list[Move] = []
        with self.queues.peek(queue, breaker, start=start, most=most) as entries:
            offered = _page(entries, most)
            planned = list(choose([entry for entry in offered if not entry.flaw]))
            flawed = [entry for entry in offered if entry.flaw]
            for entry in flawed:
                logger.warning("a message that waits for breaker %r is dead-lettered: %s", breaker, entry.flaw)
            dead = [Move(entry, self.queues.dead(breaker), entry.envelope) for entry in flawed]
            self._events.flush()  # before a worker can report that it has taken a task up
            ledger.remove_deferred(breaker, [move.entry.task_id for move in planned])  # they may come back at once
            try:
                for move in self.queues.move(queue, [*planned, *dead]):
                    made.append(move)
                    self._ended.discard(_deferral_of(move.entry))
            finally:
                self._note_unmade(planned, made)
                self._events.flush()
        for entry in (move.entry for move in made if move.resumes):
            signals.notify(
                signals.task_resumed, self._runtime.app, task_id=entry.task_id, task=entry.task_name,
                breaker=entry.envelope.breaker, since=entry.envelope.since,
            )  # fmt: skip
        return len(offered), made

    def _note_unmade(self, planned: Sequence[Move], made: Sequence[Move]) -> None:
        """Index again what was not moved, and end what has no queue to go back to."""
        queues = {id(move.entry): move.queue for move in made}
        for move in planned:
            entry, envelope = move.entry, move.entry.envelope
            if id(entry) not in queues:
                self._runtime.fleet.ledger.add_deferred(
                    envelope.breaker, entry.task_id, deadline=envelope.ends_at, since=envelope.since or None
                )
            elif queues[id(entry)] != move.queue:
                self._settle(entry, ResilienceError(f"the queue {move.queue} that it came from is gone"))
                self._ended.discard(_deferral_of(entry))

    def transfer_all(
        self, breaker: str, choose: Choose, *, enough: Callable[[], bool], most: int = PAGE
    ) -> Iterator[list[Move]]:
        """Go on with :meth:`transfer` until that is ``enough`` or nothing is left; yield what each page has moved.

        The first page holds ``most`` tasks, each further one twice as many.
        """
        start, offered = 0, most  # a page may hold less: messages are of any size
        while offered and not enough():
            offered, moves = self.transfer(breaker, choose, start=start, most=most)
            start, most = start + offered - len(moves), min(2 * most, PAGE)
            yield moves

    def ends(self, entries: Sequence[Entry], now: float) -> dict[str, Exception]:
        """Return by id why tasks must wait no longer: they were revoked, or have waited for too long."""
        revoked = revoked_among(entries, self._runtime.fleet.ledger)
        expired = {
            entry.task_id: _expiry(entry, now) for entry in entries if now >= (entry.envelope.ends_at or now + 1)
        }
        return {**expired, **{task_id: TaskRevokedError(REVOKED) for task_id in revoked}}

    def remove_ended(self, entries: Sequence[Entry]) -> tuple[list[Move], list[Entry]]:
        """End those tasks that shall never run; return the moves that this takes, and the tasks that may run.

        One whose result cannot be written now is neither ended nor may it run.
        """
        errors = self.ends(entries, self._runtime.fleet.view.server_now())
        for entry in entries:
            unreadable = None if entry.task_id in errors else entry.unreadable()
            if unreadable is not None:
                errors[entry.task_id] = unreadable
        for task_id, latest in superseded_among(entries, self._runtime.fleet.ledger, gone=errors.keys()).items():
            errors.setdefault(task_id, SupersededError(latest))
        moves = [self.end(entry, errors[entry.task_id]) for entry in entries if entry.task_id in errors]
        return [move for move in moves if move], [entry for entry in entries if entry.task_id not in errors]

    def resume(self, entries: Sequence[Entry], epoch: int, why: str) -> list[Move]:
        now = self._runtime.fleet.view.server_now()
        moves: list[Move] = []
        for entry in entries:
            self._withdraw(entry, keep_for=CLAIM_OUTLIVES_TURN)
            self._send(entry, TASK_RESUMED, in_bulk=True, exception=why, traceback=None)
            moves.append(Move(entry, self._runtime.origin(entry.envelope), entry.envelope.resume(epoch, now)))
        return moves

    def _withdraw(self, entry: Entry, *, keep_for: float = 0.0) -> None:
        """Let a task supersede earlier ones no longer: at once if it never runs, else when none can be left."""
        if entry.envelope.coalesced_as:
            self._runtime.fleet.ledger.withdraw(entry.envelope.coalesced_as, entry.task_id, keep_for=keep_for)

    def end(self, entry: Entry, error: Exception) -> Move | None:
        """End a task that must wait no longer.

        One that was revoked, dropped or superseded leaves no message; any other is dead-lettered. None if its result
        cannot be written now: it goes on waiting, and a later tick tries again.
        """
        breaker, kinds, move = entry.envelope.breaker, [DEAD], Move(entry, None)
        if isinstance(error, SupersededError):
            kinds = [COALESCED]
        elif isinstance(error, TaskRevokedError) and str(error) != EXPIRED:
            kinds = [DROPPED if str(error) == DROPPED else REVOKED]
        else:
            envelope = entry.envelope.dead_letter(self._runtime.fleet.view.server_now(), str(error))
            move = Move(entry, self.queues.dead(breaker), envelope)
            if isinstance(error, (DeferralExpiredError, TaskRevokedError)):
                kinds.append(EXPIRED)
        if not self._settle(entry, error):
            return None
        level, what = (logging.WARNING, "is dead-lettered") if move.queue else (logging.INFO, "never runs")
        logger.log(level, "Task %s[%s] %s: %s", entry.task_name, entry.task_id, what, error, extra=entry.log_fields)
        for kind in kinds:
            self._runtime.fleet.reporter.tally(breaker, kind)
        return move

    def _settle(self, entry: Entry, error: Exception) -> bool:
        """End a task that waits no longer; False if its result cannot be written now."""
        if _deferral_of(entry) in self._ended:
            return True
        try:
            self._write_end(entry, error)
        except ResultNotWrittenError as exc:
            what = "Task %s[%s] cannot end yet (%s): %s"
            logger.warning(what, entry.task_name, entry.task_id, error, exc, extra=entry.log_fields)
            return False
        self._ended.add(_deferral_of(entry))
        self._withdraw(entry)
        return True

    def _write_end(self, entry: Entry, error: Exception) -> None:
        request, backend = self._request(entry), self._runtime.app.backend
        if isinstance(error, SupersededError):
            if request is not None and not request.ignore_result:
                info = {"breaker": entry.envelope.breaker, "ran": error.latest}
                write = request.task.backend.store_result
                write_result(write, entry.task_id, info, states.IGNORED, request=request.context)
            self._send(entry, TASK_IGNORED, ran=error.latest)
        elif isinstance(error, TaskRevokedError):
            # monitors take REVOKED for older news than DEFERRED, as long as the task has not left that state
            self._send(entry, TASK_RESUMED, exception=str(error), traceback=None)
            if request is not None:
                request.revoke(str(error), expired=str(error) == EXPIRED)
            else:
                write_result(backend.mark_as_revoked, entry.task_id, str(error))
        elif request is not None:
            request.fail(error)
        else:
            write_result(backend.mark_as_failure, entry.task_id, error)
            self._send(entry, "task-failed", exception=repr(error), traceback=None)

    def _request(self, entry: Entry) -> GatedRequest | None:
        """Return the request that a worker would make of a message; None if it could not."""
        try:
            task = self._runtime.app.tasks[entry.task_name]
            check_task(task_fields(entry.message), payload_of(entry.message))
            parts = decode(celery_internals.parts_of, entry.message)
            eventer = self._events.dispatcher(entry.envelope.reported_by)
            return GatedRequest(
                entry.message,
                app=self._runtime.app,
                task=task,
                hostname=self._events.hostname,
                eventer=eventer,
                **parts,
            )
        except (NotRegistered, DecodeError, InvalidTaskError) as exc:
            what = "Task %s[%s] is no task of this app: %r"
            logger.warning(what, entry.task_name, entry.task_id, exc, extra=entry.log_fields)
            return None

    def _send(self, entry: Entry, event: str, **fields: Any) -> None:
        self._events.send(event, entry.envelope.reported_by, uuid=entry.task_id, **fields)

    def close(self) -> None:
        self.queues.close()
        self._events.close()


def _deferral_of(entry: Entry) -> tuple[str, float]:
    """Return what distinguishes one wait of a task from a later one: it may be replayed."""
    return entry.task_id if not entry.flaw else "", entry.envelope.since


def _page(entries: Iterator[Entry], most: int) -> list[Entry]:
    """Return the next messages, and fewer of large ones."""
    page: list[Entry] = []
    size = 0
    while len(page) < most and size < PAGE_SIZE and (entry := next(entries, None)) is not None:
        page.append(entry)
        size += len(entry.raw)
    return page


def _expiry(entry: Entry, now: float) -> DeferralExpiredError | TaskRevokedError:
    """Return the error of a task that has waited longer than its ``defer_for``, or past its ``expires``."""
    envelope = entry.envelope
    if envelope.ends_at == envelope.expires:
        return TaskRevokedError(EXPIRED)
    return DeferralExpiredError(envelope.breaker, now - envelope.since, envelope.deadline - envelope.since)


# --- resuming ----------------------------------------------------------------------------------------------


def no_limit(_: Dependency) -> int:
    return LARGEST_BATCH


class Resumer:
    """Decides for the ticks of one worker how many tasks are resumed, and which."""

    def __init__(self, runtime: Runtime, tasks: DeferredTasks, room: Callable[[Dependency], int] = no_limit) -> None:
        self._runtime, self._tasks, self._room = runtime, tasks, room
        self._origins: dict[str, set[str]] = {}  # breaker -> queues that its tasks were resumed to
        self._untouched: dict[str, tuple[int, float]] = {}  # breaker -> outstanding tasks, and since when
        self._consumed: set[str] = set()  # queues that workers consume, as read at
        self._consumed_at = -math.inf

    def resume(self, breaker: Dependency, snapshot: Snapshot) -> bool:
        """Resume the next batch of a breaker that admits calls; where its calls are limited, into the free slots.

        Return whether more may follow before long; False if no task is due.
        """
        ledger, policy, interval = self._runtime.fleet.ledger, breaker.policy, self._runtime.settings.tick_interval
        pace = ledger.pace(breaker.name)
        outstanding = self._outstanding(breaker, pace)
        is_limited = snapshot.concurrency_limit is not None or policy.max_concurrency_per_worker is not None
        if is_limited:
            limit = snapshot.concurrency_limit
            free = LARGEST_BATCH if limit is None else limit - snapshot.in_flight
            if policy.max_concurrency_per_worker is not None:
                free = min(free, self._room(breaker))
            following, count = refill_count(pace, snapshot, policy, free=max(0, free), interval=interval)
            count -= outstanding
        else:
            following, count = next_pace(pace, snapshot, policy, outstanding=outstanding, interval=interval)
        if following != pace:
            ledger.save_pace(breaker.name, following)
        if count > 0 and (is_limited or self._has_not_moved(breaker, snapshot)):
            return bool(self.release(breaker, snapshot, count))
        return True

    def release_trials(self, breaker: Dependency, snapshot: Snapshot) -> None:
        """Resume as many tasks as there are permits; those that have never failed first."""
        outstanding = self._outstanding(breaker, self._runtime.fleet.ledger.pace(breaker.name))
        free = breaker.policy.trial_calls - snapshot.trials - outstanding
        if free > 0:
            self.release(breaker, snapshot, free, unfailed_first=True)

    def release(
        self, breaker: Dependency, snapshot: Snapshot, limit: int, *,
        only: Collection[str] | None = None, unfailed_first: bool = False, early: bool = False,
    ) -> list[str]:  # fmt: skip
        """Resume up to ``limit`` tasks of a breaker, those that wait longest first; return their ids.

        ``only`` those with these ids; ``unfailed_first``: those of a page that have never failed come before the
        others; ``early``: also those whose own wait after a failure is not over.
        """
        ledger, left = self._runtime.fleet.ledger, limit
        going: dict[str, str] = {}  # tasks that workers will take up -> their queues
        why = f"resumed, breaker {breaker.name!r} is {snapshot.state}"

        def choose(entries: Sequence[Entry]) -> list[Move]:
            nonlocal left
            wanted = [entry for entry in entries if only is None or entry.task_id in only]
            due = [entry for entry in wanted if early or _is_due(breaker, entry, snapshot.now)]
            ends, fit = self._tasks.remove_ended(due)
            if unfailed_first:
                fit.sort(key=lambda entry: entry.envelope.attempted_at > 0)
            chosen = fit[:left]
            left -= len(chosen) if only is None else len(wanted)
            moves = self._tasks.resume(chosen, snapshot.epoch, why)
            consumed = self._consumed_queues()
            taken = {move.entry.task_id: move.queue for move in moves if move.queue in consumed}
            going.update(taken)
            ledger.resumed(breaker.name, len(taken))  # before they can be taken up
            return [*ends, *moves]

        resumed: list[str] = []
        # into a free slot goes one task: to read hundreds for it would take ten times as long
        most = PAGE if unfailed_first or only is not None else min(limit + SMALLEST_PAGE, PAGE)
        for moves in self._tasks.transfer_all(breaker.name, choose, enough=lambda: left <= 0, most=most):
            gone = [move for move in moves if move.resumes]
            origins = (going.pop(move.entry.task_id, None) for move in gone)
            self._origins.setdefault(breaker.name, set()).update(filter(None, origins))
            if gone:
                since = (move.entry.envelope.since for move in gone)
                longest = max((snapshot.now - at for at in since if at), default=0.0)
                self._runtime.fleet.reporter.tally(breaker.name, RESUMED, len(gone), peak=(LONGEST_WAIT, longest))
            resumed += [move.entry.task_id for move in gone]
        if going:
            ledger.taken_up(breaker.name, len(going))  # another process has moved them
        if resumed:
            logger.info("breaker %r is %s: %d tasks resumed", breaker.name, snapshot.state, len(resumed))
        return resumed

    def _consumed_queues(self) -> set[str]:
        now = time.monotonic()
        if now >= self._consumed_at + CONSUMED_FOR:
            self._consumed, self._consumed_at = self._runtime.fleet.ledger.consumed_queues(), now
        return self._consumed

    def _has_not_moved(self, breaker: Dependency, snapshot: Snapshot) -> bool:
        """Resuming stops in the tick in which the breaker leaves the state that allowed it."""
        return bool(self._runtime.fleet.store.read([breaker.spec])[0].epoch == snapshot.epoch)

    def _outstanding(self, breaker: Dependency, pace: Pace) -> int:
        """Resumed tasks that no worker has taken up: never more than lie in the queues that they went to.

        None once that is so for too long: the workers that were to take them up may be gone.
        """
        if not pace.outstanding:
            return 0
        origins = self._origins.get(breaker.name) or self._consumed_queues()
        outstanding = min(pace.outstanding, self._tasks.queues.size(*origins))
        before, since = self._untouched.get(breaker.name, (0, 0.0))
        now = time.monotonic()
        if outstanding < before or not before:
            since = now
        self._untouched[breaker.name] = outstanding, since
        if outstanding > 0 and now - since > STUCK:
            self._runtime.fleet.ledger.taken_up(breaker.name, pace.outstanding)
            return 0
        return outstanding


def _is_due(breaker: Dependency, entry: Entry, now: float) -> bool:
    """Whether a task has waited long enough; a wait longer than any of ours is of another clock."""
    return not 0 < entry.envelope.not_before - now <= breaker.policy.max_open_duration


# --- revokes ---------------------------------------------------------------------------------------------


class RevokeRelay:
    """Passes the revokes that one worker receives on to the ledger."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._stamps: dict[str, int] = {}  # header -> number of its values
        self._expired: set[str] = set()  # Celery takes them for revoked, too
        task_revoked.connect(self._note_expiry)

    def _note_expiry(self, request: Any, *, expired: bool, **_: Any) -> None:
        if expired:
            self._expired.add(request.id)

    def pass_on(self, ledger: Ledger, breakers: Callable[[], Iterable[str]]) -> None:
        """Write to the ledger what is new, and have the tick look at tasks that wait for one of ``breakers()``.

        If the ledger is unavailable, it raises StoreError and the next call writes it.
        """
        ids = set(celery_internals.revoked_ids)
        stamps = {header: list(values) for header, values in celery_internals.revoked_stamps.copy().items()}
        self._expired &= ids  # what Celery has forgotten need not be distinguished
        new_ids = ids - self._ids - self._expired
        new_stamps = [  # Celery only ever appends to them
            _mark(header, value) for header, values in stamps.items() for value in values[self._stamps.get(header, 0) :]
        ]
        if new_ids or new_stamps:
            ledger.revoke([*new_ids, *new_stamps])
        if new_ids:
            ledger.hasten(breakers(), new_ids)
        self._ids = ids
        self._stamps = {header: len(values) for header, values in stamps.items()}


def revoked_among(entries: Sequence[Entry], ledger: Ledger) -> set[str]:
    marks = {entry.task_id: set(_marks(entry)) for entry in entries}
    revoked = ledger.revoked([*marks, *set().union(*marks.values())])

    def by_stamp(entry: Entry) -> bool:
        known_until = entry.envelope.since - REVOKE_DELAY
        return any(mark in revoked and revoked[mark] > known_until for mark in marks[entry.task_id])

    return {entry.task_id for entry in entries if entry.task_id in revoked or by_stamp(entry)}


def _marks(entry: Entry) -> Iterator[str]:
    headers = entry.message.headers or {}
    stamped, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if isinstance(stamped, (list, tuple)) and isinstance(stamps, dict):
        for header, value in stamps.items():
            if header in stamped:
                yield from (_mark(header, each) for each in (value if isinstance(value, (list, tuple)) else [value]))


def _mark(header: str, value: object) -> str:
    """Return the name of a stamp in the ledger; it looks like no task's id."""
    return json.dumps([header, value], default=str)
