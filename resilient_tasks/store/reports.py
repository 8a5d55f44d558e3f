"""Outcomes on their way to the store: noted by any thread without I/O, sent in batches by one.

A success waits up to a tenth of a second for company, so that a busy process sends ten small messages
a second per breaker however many calls it makes. What may open the breaker is sent at once, with the successes before
it: a failure, or a success where nothing but the number of calls keeps the breaker closed. Whoever wants to know that a
report has arrived (a caller whose next call should already see the breaker open) waits for the ticket that reporting
returned.

The same thread settles trials, renews their permits and tells what was tallied. Everything that waits is
bounded: while the store is away the oldest outcomes are dropped and counted.
"""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import groupby
from typing import NamedTuple

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Answer, Calls, Outcome, Transition
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Evidence, Spec, Store
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.history import History
from resilient_tasks.store.outbox import Outbox
from resilient_tasks.store.standing import Standing
from resilient_tasks.store.tallies import Tallies
from resilient_tasks.store.view import View

logger = logging.getLogger(__name__)

LEASE = 5.0  # seconds; a permit whose holder dies is free after at most this long
BATCH_INTERVAL = 0.1  # seconds between two reports of successes of one breaker
EXIT_PATIENCE = 0.9  # seconds that the end of the process may wait for the last reports
_MOST_SETTLEMENTS = 10_000
_NOTHING_URGENT = 0
_TWICE = range(2)  # an outcome that is too late to be sent is tallied instead

Announce = Callable[[Transition], None]


class _Settlement(NamedTuple):
    spec: Spec
    holder: str
    outcome: Outcome
    evidence: Evidence
    give_up_at: float  # the lease has run out by then: the store has settled it as a failure


class Reporter:
    """Sends this process's outcomes to the store and keeps its permits alive.

    Args:
        store: where outcomes go.
        view: learns from every answer.
        announce: is told each transition that a report of this process has made.
        clock: monotonic clock in seconds.
        history: is told what this process tallies; None: nobody is.
    """

    def __init__(
        self,
        store: Store,
        view: View,
        announce: Announce,
        clock: Callable[[], float] = time.monotonic,
        history: History | None = None,
    ) -> None:
        self.dropped = 0  # outcomes that were lost because the store was away for too long
        self._store = store
        self._view = view
        self._announce = announce
        self._clock = clock
        self._tallies = Tallies(history, clock)
        self.after_fork()
        renew_after_fork(self)
        _reporters.add(self)

    def after_fork(self) -> None:
        """Start empty: what was pending at a fork is the parent's to send, its permits are the parent's to renew."""
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._outboxes: dict[str, Outbox] = {}
        self._busy: dict[str, Outbox] = {}
        self._settlements: deque[_Settlement] = deque(maxlen=_MOST_SETTLEMENTS)
        self._held: dict[tuple[str, str], float] = {}
        self._renew_at = 0.0
        self._settle_at = 0.0  # when settlements that the store could not take are tried again
        self._asked = 0  # tickets handed out, and the last one that has been served
        self._served = 0
        self._is_sending = False
        for standing in self._view.standings():
            standing.pending.clear()
            standing.scheduled = False

    # --- called by any thread, without I/O --------------------------------------------------------

    def report(self, standing: Standing, epoch: int, verdict: Verdict, *, voter: str = "", each: bool = False) -> int:
        """Note the outcome of one call that needed no permit.

        Args:
            standing: of the breaker.
            epoch: the breaker's epoch when the call was admitted.
            verdict: on the call; IGNORED is not sent.
            voter: the task that made the call; see :class:`Calls`.
            each: the call counts whatever the task has voted; see :class:`Calls`.

        Returns:
            A ticket for :meth:`wait`; 0 if the outcome is in no hurry.
        """
        outcome, cause, retry_after, proxied = verdict
        if outcome is Outcome.IGNORED:
            return _NOTHING_URGENT
        if outcome is not Outcome.SUCCESS:
            standing.pending.append((epoch, Calls(outcome, 1, voter, proxied, each), cause, retry_after))
            return self.schedule(standing, urgent=True)
        standing.pending.append(epoch)
        if standing.success_may_open:
            return self.schedule(standing, urgent=True)
        if not standing.scheduled:
            self.schedule(standing)
        return _NOTHING_URGENT

    def schedule(self, standing: Standing, *, urgent: bool = False) -> int:
        """Have what is pending sent when it is due; at once if ``urgent``. Return the ticket for that."""
        with self._condition:
            standing.scheduled = True
            outbox = self._outboxes.get(standing.name)
            if outbox is None:
                outbox = self._outboxes[standing.name] = Outbox(standing)
            outbox.urgent |= urgent
            self._busy[standing.name] = outbox
            return self._wake(urgent=urgent)

    def settle(
        self,
        spec: Spec,
        holder: str,
        epoch: int,
        verdict: Verdict,
        *,
        voter: str = "",
        each: bool = False,
        wait: float = 0.0,
    ) -> int:
        """Settle a call that holds a permit or a slot, at once but by the sending thread; neither is renewed any more.

        Args:
            spec: the breaker.
            holder: who holds the permit.
            epoch: the epoch in which it was granted.
            verdict: on the call; IGNORED gives the permit back, OVERDUE leaves it to the call, which still runs.
            voter: the task that made the call; see :class:`Calls`.
            each: the call counts whatever the task has voted; see :class:`Calls`.
            wait: longest time in seconds to wait until the store has answered.

        Returns:
            A ticket for :meth:`wait`.
        """
        outcome, cause, retry_after, proxied = verdict
        evidence = Evidence(epoch, (Calls(outcome, 1, voter, proxied, each),), cause, retry_after)
        with self._condition:
            if outcome is not Outcome.OVERDUE:
                self._held.pop((spec.name, holder), None)
            self._settlements.append(_Settlement(spec, holder, outcome, evidence, self._clock() + LEASE))
            ticket = self._wake(urgent=True)
        if wait:
            self.wait(ticket, wait)
        return ticket

    def hold(self, name: str, holder: str, until: float) -> None:
        """Renew a permit until it is settled, released or ``until`` (on the clock) has passed."""
        with self._condition:
            if not self._held:
                self._renew_at = self._clock() + LEASE / 3
            self._held[name, holder] = until
            self._wake()

    def release(self, name: str, holder: str) -> None:
        """Renew a permit no longer; somebody else settles it or its lease runs out."""
        with self._condition:
            self._held.pop((name, holder), None)

    def tally(self, name: str, kind: str, count: int = 1, *, peak: tuple[str, float] | None = None) -> None:
        """Count something for the history of a breaker; see :meth:`Tallies.add`."""
        if self._tallies.add(name, kind, count, peak=peak):
            with self._condition:
                self._wake()

    def forget(self, name: str) -> None:
        """Let go of a breaker about which nothing waits to be sent."""
        with self._condition:
            if name not in self._busy:
                self._outboxes.pop(name, None)

    # --- waiting ------------------------------------------------------------------------------------

    def is_served(self, ticket: int) -> bool:
        """Whether what ``ticket`` stands for has been sent, or tried and found impossible."""
        return self._served >= ticket

    def wait(self, ticket: int, timeout: float) -> bool:
        """Wait until ``ticket`` is served, at most ``timeout`` seconds; return whether it is."""
        if self.is_served(ticket):
            return True
        if threading.current_thread() is self._thread:  # a listener that makes a guarded call of its own
            return False
        with self._condition:
            return self._condition.wait_for(lambda: self.is_served(ticket), timeout)

    def flush(self, timeout: float) -> bool:
        """Send all that waits now; return whether that was done within ``timeout`` seconds."""
        give_up_at = self._clock() + timeout
        return all(self.wait(self._hurry(), give_up_at - self._clock()) for _ in _TWICE)

    def _hurry(self) -> int:
        """Make all that waits urgent; return the ticket for that."""
        with self._condition:
            if not (self._busy or self._settlements or self._is_sending or self._tallies.due_at is not None):
                return _NOTHING_URGENT
            for outbox in self._busy.values():
                outbox.urgent = True
            self._tallies.hasten()
            return self._wake(urgent=True)

    def close(self, timeout: float = EXIT_PATIENCE) -> bool:
        """Flush, then end the thread. Reporting again starts it anew."""
        flushed = self.flush(timeout)
        with self._condition:
            thread, self._thread = self._thread, None
            self._condition.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)
        return flushed

    # --- the thread -----------------------------------------------------------------------------------

    def _wake(self, *, urgent: bool = False) -> int:
        """Wake the thread, or start it; called with the condition held. Return a ticket if urgent."""
        self._asked += urgent
        if self._thread is None or not self._thread.is_alive():
            self._start()
        self._condition.notify_all()
        return self._asked if urgent else _NOTHING_URGENT

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name="resilient-tasks-reports", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is shutting down: nobody is left to send anything
            logger.debug("outcomes are no longer reported: the process ends")
            self._served = self._asked
        else:
            self._thread = thread

    def _run(self) -> None:
        condition = self._condition
        while True:
            with condition:
                while not self._is_due():  # what is due may change with every wake-up, so no wait_for()
                    condition.wait(self._seconds_until_due())
                if self._is_dismissed():
                    return
                ticket = self._asked
                outboxes = self._take_due()
                self._is_sending = True
            self._work(outboxes)
            with condition:
                self._is_sending = False
                self._served = ticket
                condition.notify_all()

    def _is_dismissed(self) -> bool:
        return self._thread is not threading.current_thread()

    def _is_due(self) -> bool:
        return self._is_dismissed() or self._asked > self._served or self._seconds_until_due() == 0

    def _seconds_until_due(self) -> float | None:
        due = [0.0 if outbox.urgent else outbox.due_at for outbox in self._busy.values()]
        if self._held:
            due.append(self._renew_at)
        if self._settlements:
            due.append(self._settle_at)
        if self._tallies.due_at is not None:
            due.append(self._tallies.due_at)
        return max(0.0, min(due) - self._clock()) if due else None

    def _take_due(self) -> list[Outbox]:
        now = self._clock()
        due = [outbox for outbox in self._busy.values() if outbox.urgent or outbox.due_at <= now]
        for outbox in due:
            # First this, then collecting: an outcome that comes in between schedules itself again.
            del self._busy[outbox.standing.name]
            outbox.standing.scheduled = False
            outbox.urgent = False
            outbox.due_at = now + BATCH_INTERVAL
        return due

    def _work(self, outboxes: list[Outbox]) -> None:
        for outbox in outboxes:
            self._safely(partial(self._send, outbox))
        for _ in range(len(self._settlements)):
            self._safely(partial(self._settle, self._settlements.popleft()))
        if self._held and self._renew_at <= self._clock():
            self._safely(self._renew)
        if self._tallies.due_at is not None and self._tallies.due_at <= self._clock():
            self._safely(self._tell)

    def _safely(self, job: Callable[[], None]) -> None:
        """Do a job; no mistake of a store or a listener may end the thread."""
        try:
            job()
        except Exception:
            logger.exception("outcomes of guarded calls could not be reported")

    def _tell(self) -> None:
        try:
            self._tallies.tell()
        except StoreError as error:
            logger.debug("what was tallied waits for the store: %s", error)

    def _send(self, outbox: Outbox) -> None:
        for late in outbox.collect():
            for kind, count in late.counts():
                self.tally(outbox.standing.name, kind, count)
        while outbox.batches:
            batch = outbox.batches[0]
            asked = self._view.asking()
            try:
                answer = self._store.record(outbox.standing.spec, batch.evidence(), jitter=random.random())
            except StoreError as error:
                logger.debug("outcomes wait for the store: %s", error)
                self.dropped += batch.drop_oldest()
                self.schedule(outbox.standing)
                return
            del outbox.batches[0]
            self._learn(answer, asked)

    def _settle(self, settlement: _Settlement) -> None:
        asked = self._view.asking()
        spec, holder, outcome, evidence, give_up_at = settlement
        try:
            answer = self._store.settle(spec, holder, outcome, evidence, jitter=random.random())
        except StoreError as error:
            logger.debug("a trial waits to be settled: %s", error)
            self._settle_at = self._clock() + BATCH_INTERVAL
            if self._clock() < give_up_at:
                self._settlements.append(settlement)
        else:
            self._learn(answer, asked)

    def _learn(self, answer: Answer, asked: int) -> None:
        self._view.update(answer.snapshot, asked)
        self._view.look_for_room(answer.snapshot)
        if answer.transition is not None:
            self._announce(answer.transition)
        if answer.of_parent is not None:
            self._learn(answer.of_parent, asked)

    def _renew(self) -> None:
        now = self._clock()
        self._renew_at = now + LEASE / 3
        with self._condition:
            self._held = {permit: until for permit, until in self._held.items() if until > now}
            held = sorted(self._held)
        for name, permits in groupby(held, key=lambda permit: permit[0]):
            holders = [holder for _, holder in permits]
            try:
                alive = self._store.renew(name, holders, lease=LEASE)
            except StoreError as error:
                logger.debug("permits of breaker %s are not renewed: %s", name, error)
                continue
            for holder, is_alive in zip(holders, alive, strict=True):
                if not is_alive:
                    self.release(name, holder)


_reporters: weakref.WeakSet[Reporter] = weakref.WeakSet()


def _flush_at_exit() -> None:
    deadline = time.monotonic() + EXIT_PATIENCE
    for reporter in list(_reporters):
        reporter.flush(max(0.0, deadline - time.monotonic()))


atexit.register(_flush_at_exit)
