"""``DeferredTasks``: what is done to the tasks that wait: resume, dead-letter, drop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from celery import states
from celery.exceptions import TaskRevokedError

from resilient_tasks import signals
from resilient_tasks.core.counts import COALESCED, DEAD, DROPPED, EXPIRED, REVOKED
from resilient_tasks.errors import DeferralExpiredError, ResilienceError
from resilient_tasks.monitor.events import TASK_IGNORED, TASK_RESUMED
from resilient_tasks.worker import seams
from resilient_tasks.worker.broker import open_queues
from resilient_tasks.worker.coalescing import SupersededError, superseded_among
from resilient_tasks.worker.events import EventSender
from resilient_tasks.worker.queues import Choose, Entry, Move, Queues
from resilient_tasks.worker.request import GatedRequest
from resilient_tasks.worker.revokes import revoked_among

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds after its turn for which a task still stands for earlier ones, which wait for their own sake after a failure.
CLAIM_OUTLIVES_TURN = 3600.0
#: Waiting tasks that are looked at in one go.
PAGE = 500


class DeferredTasks:
    """The tick's, and an operator's, hands on the tasks that wait: resume, dead-letter, drop.

    Args:
        runtime: the app's runtime.
        events: tells monitors what becomes of the tasks.
        queues: the broker's queues; ``None``: on connections of its own.
    """

    def __init__(self, runtime: Runtime, events: EventSender, queues: Queues | None = None) -> None:
        self._runtime = runtime
        self._events = events
        self.queues = queues or open_queues(runtime.app, runtime.settings.namespace)

    def count(self, breaker: str) -> int:
        """Return the number of messages that wait on the broker."""
        return self.queues.size(self.queues.deferred(breaker))

    def sift(self, breaker: str, choose: Choose, *, start: int = 0, page: int = PAGE) -> list[Move]:
        """Offer the ``page`` oldest waiting tasks, but for the first ``start``, to ``choose`` and make its moves.

        The index first: a resumed task may be deferred again before this returns.
        """
        ledger = self._runtime.fleet.ledger
        planned: list[Move] = []

        def plan(entries: Sequence[Entry]) -> Sequence[Move]:
            planned.extend(choose(entries))
            ledger.remove_deferred(breaker, [move.entry.task_id for move in planned])
            return planned

        made: list[Move] = []
        try:
            made = self.queues.sift(breaker, page, plan, start=start)
        finally:
            done = {id(move.entry): move for move in made}
            for move in planned:
                if id(move.entry) not in done:
                    ticket = move.entry.ticket
                    since = ticket.since or None
                    ledger.add_deferred(breaker, move.entry.task_id, deadline=ticket.ends_at, since=since)
                elif move.queue != done[id(move.entry)].queue:
                    self._settle(move.entry, ResilienceError(f"the queue {move.queue} that it came from is gone"))
        self._tell_resumed([move.entry for move in made if move.resumes])
        return made

    def _tell_resumed(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            ticket = entry.ticket
            told = {"task_id": entry.task_id, "task": entry.task_name, "breaker": ticket.breaker, "since": ticket.since}
            signals.tell(signals.task_resumed, self._runtime.app, **told)

    def sift_pages(
        self, breaker: str, choose: Choose, *, enough: Callable[[], bool], page: int = PAGE
    ) -> Iterator[list[Move]]:
        """Go on with :meth:`sift` until that is ``enough`` or nothing is left; yield what each page has moved."""
        start, offered = 0, PAGE  # a page may hold less: messages are of any size

        def look(entries: Sequence[Entry]) -> Sequence[Move]:
            nonlocal offered
            offered = len(entries)
            return choose(entries)

        while offered and not enough():
            moves = self.sift(breaker, look, start=start, page=page)
            start, page = start + offered - len(moves), min(2 * page, PAGE)
            yield moves

    def weed(self, entries: Sequence[Entry]) -> tuple[list[Move], list[Entry]]:
        """End those tasks that shall never run; return the moves that this takes, and the tasks that may run.

        Revoked ones are dropped, those that a later one replaces are ignored, and those that have waited too long or
        that nobody can read are dead-lettered. One whose result cannot be written now is neither ended nor may it run.
        """
        ledger, now = self._runtime.fleet.ledger, self._runtime.fleet.view.server_now()
        revoked = revoked_among(entries, ledger)
        errors = {entry.task_id: error for entry in entries if (error := ended(entry, now) or entry.unreadable())}
        superseded = superseded_among(entries, ledger, gone=revoked | errors.keys())

        def end(entry: Entry) -> Move | None:
            if entry.task_id in revoked:
                return self.drop(entry, "revoked")
            if entry.task_id in errors:
                return self.dead_letter(entry, errors[entry.task_id])
            return self._ignore(entry, superseded[entry.task_id])

        doomed = revoked | errors.keys() | superseded.keys()
        moves = [end(entry) for entry in entries if entry.task_id in doomed]
        return [move for move in moves if move], [entry for entry in entries if entry.task_id not in doomed]

    def resume(self, entries: Sequence[Entry], epoch: int, why: str) -> list[Move]:
        """Send tasks back to the queues that they came from."""
        now = self._runtime.fleet.view.server_now()
        for entry in entries:
            self._withdraw(entry, keep_for=CLAIM_OUTLIVES_TURN)
            self._tell(entry, TASK_RESUMED, exception=why, traceback=None)
        return [Move(entry, self._runtime.origin(entry.ticket), entry.ticket.resume(epoch, now)) for entry in entries]

    def _ignore(self, entry: Entry, latest: str) -> Move | None:
        """End a task with IGNORED, because a later one runs instead; None as below."""
        if not self._settle(entry, SupersededError(latest)):
            return None
        what = "Task %s[%s] is ignored: %s runs instead"
        logger.info(what, entry.task_name, entry.task_id, latest, extra=entry.log_fields)
        self._tally(entry.ticket.breaker, COALESCED)
        return Move(entry, None)

    def _withdraw(self, entry: Entry, *, keep_for: float = 0.0) -> None:
        """Let a task stand for earlier ones no longer: at once if it never runs, else when none can be left."""
        if entry.ticket.coalesced_as:
            self._runtime.fleet.ledger.withdraw(entry.ticket.coalesced_as, entry.task_id, keep_for=keep_for)

    def dead_letter(self, entry: Entry, error: Exception) -> Move | None:
        """End a task that must wait no longer, and keep its message in the dead-letter queue.

        Returns:
            None if its result cannot be written now: it goes on waiting, and a later tick tries again.
        """
        if not self._settle(entry, error):
            return None
        what = "Task %s[%s] is dead-lettered: %s"
        logger.warning(what, entry.task_name, entry.task_id, error, extra=entry.log_fields)
        ticket = entry.ticket.die(self._runtime.fleet.view.server_now(), str(error))
        self._tally(ticket.breaker, DEAD)
        if isinstance(error, (DeferralExpiredError, TaskRevokedError)):
            self._tally(ticket.breaker, EXPIRED)
        return Move(entry, self.queues.dead(ticket.breaker), ticket)

    def drop(self, entry: Entry, reason: str) -> Move | None:
        """Give a task that shall never run REVOKED as its result, and drop its message.

        Returns:
            None if its result cannot be written now, as above.
        """
        if not self._settle(entry, TaskRevokedError(reason)):
            return None
        what = "Task %s[%s] was %s while it waited"
        logger.info(what, entry.task_name, entry.task_id, reason, extra=entry.log_fields)
        self._tally(entry.ticket.breaker, DROPPED if reason == DROPPED else REVOKED)
        return Move(entry, None)

    def _tally(self, breaker: str, kind: str) -> None:
        self._runtime.fleet.reporter.tally(breaker, kind)

    def _settle(self, entry: Entry, error: Exception) -> bool:
        """Write the result of a task that waits no longer; False if that is impossible now."""
        try:
            if isinstance(error, SupersededError):
                self._supersede(entry, error.latest)
            elif isinstance(error, TaskRevokedError):
                self._revoke(entry, str(error))
            else:
                self._fail(entry, error)
        except Exception as exc:  # noqa: BLE001 - whatever a result backend raises
            reason = type(exc).__name__
            what = "Task %s[%s] cannot end yet (%s): %s"
            logger.warning(what, entry.task_name, entry.task_id, error, reason, extra=entry.log_fields)
            return False
        self._withdraw(entry)
        return True

    def _supersede(self, entry: Entry, latest: str) -> None:
        request, info = self._request(entry), {"breaker": entry.ticket.breaker, "ran": latest}
        if request is not None and not request.ignore_result:
            request.task.backend.store_result(entry.task_id, info, states.IGNORED, request=request.context)
        self._tell(entry, TASK_IGNORED, ran=latest)

    def _fail(self, entry: Entry, error: Exception) -> None:
        request = self._request(entry)
        if request is not None:
            request.fail(error)
        else:
            self._runtime.app.backend.mark_as_failure(entry.task_id, error)
            self._tell(entry, "task-failed", exception=repr(error), traceback=None)

    def _revoke(self, entry: Entry, reason: str) -> None:
        # monitors take REVOKED for older news than DEFERRED, as long as the task has not left that state
        self._tell(entry, TASK_RESUMED, exception=reason, traceback=None)
        request = self._request(entry)
        if request is not None:
            seams.announce_revoked(request, reason, expired=reason == "expired")
        else:
            self._runtime.app.backend.mark_as_revoked(entry.task_id, reason)

    def _request(self, entry: Entry) -> GatedRequest | None:
        """Return the request that a worker would make of a message; None if it could not."""
        app = self._runtime.app
        try:
            return GatedRequest(
                entry.message,
                app=app,
                task=app.tasks[entry.task_name],
                hostname=self._events.hostname,
                eventer=self._events.dispatcher(entry.ticket.teller),
                **seams.parts_of(entry.message),
            )
        except Exception as exc:  # noqa: BLE001 - whatever a stranger wrote into the message
            what = "Task %s[%s] is no task of this app: %r"
            logger.warning(what, entry.task_name, entry.task_id, exc, extra=entry.log_fields)
            return None

    def _tell(self, entry: Entry, event: str, **fields: Any) -> None:
        self._events.send(event, entry.ticket.teller, uuid=entry.task_id, **fields)

    def close(self) -> None:
        """Close connections."""
        self.queues.close()
        self._events.close()


def ended(entry: Entry, now: float) -> DeferralExpiredError | TaskRevokedError | None:
    """Return the error of a task that has waited longer than its ``defer_for``, or past its ``expires``."""
    ticket = entry.ticket
    if ticket.ends_at is None or now < ticket.ends_at:
        return None
    if ticket.ends_at == ticket.expires:
        return TaskRevokedError("expired")
    return DeferralExpiredError(ticket.breaker, now - ticket.since, ticket.deadline - ticket.since)
