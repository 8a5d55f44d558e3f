"""Outcomes on their way to the store: noted by any thread without I/O, sent in batches by one.

A success waits up to a tenth of a second for company, so that a busy process sends ten small messages
a second per breaker however many calls it makes. What may open the breaker is sent at once, with the successes before
it: a failure, or a success where nothing but the number of calls keeps the breaker closed. Whoever wants to know that a
report has arrived (a caller whose next call should already see the breaker open) waits for the ticket that reporting
returned.

The same thread settles trials, renews their permits and tells what was tallied. Everything that waits is bounded.
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
from itertools import chain
from typing import NamedTuple

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.counts import CAUSE
from resilient_tasks.core.model import Answer, Calls, Outcome, State
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.batches import collect
from resilient_tasks.store.failover import FailoverStore
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.history import History
from resilient_tasks.store.leases import Leases
from resilient_tasks.store.standing import Standing
from resilient_tasks.store.tallies import Tallies
from resilient_tasks.store.view import View

logger = logging.getLogger(__name__)

BATCH_INTERVAL = 0.1  # seconds between two reports of successes of one breaker
EXIT_PATIENCE = 0.9  # seconds that the end of the process may wait for the last reports
_MOST_SETTLEMENTS = 10_000
_NOTHING_URGENT = 0
_ENDS = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW)  # of calls, which count; OVERDUE counts when it has ended
_TWICE = range(2)  # an outcome that is too late to be sent is tallied instead


class _Settlement(NamedTuple):
    spec: Spec
    holder: str
    outcome: Outcome
    evidence: Evidence


class Reporter:
    """Sends this process's outcomes to the store and keeps its permits alive.

    Args:
        store: where outcomes go; its decisions never raise.
        view: gives each question to the store its mark.
        learn: is told each answer of the store, with the mark of :meth:`View.asking`.
        clock: monotonic clock in seconds.
        history: is told what this process tallies; None: nobody is.
    """

    def __init__(
        self,
        store: FailoverStore,
        view: View,
        learn: Callable[[Answer, int], None],
        clock: Callable[[], float] = time.monotonic,
        history: History | None = None,
    ) -> None:
        self._store = store
        self._view = view
        self._learn = learn
        self._clock = clock
        self._tallies = Tallies(history, clock)
        self.after_fork()
        renew_after_fork(self)
        _reporters.add(self)

    def after_fork(self) -> None:
        """Start empty: what was pending at a fork is the parent's to send, its permits are the parent's to renew."""
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy: dict[Standing, None] = {}  # a set that keeps its order
        self._settlements: deque[_Settlement] = deque(maxlen=_MOST_SETTLEMENTS)
        self._leases = Leases(self._store, self._clock)
        self._asked = 0  # tickets handed out, and the last one that has been served
        self._served = 0
        self._is_sending = False
        for standing in self._view.standings():
            standing.pending.clear()
            standing.scheduled = False

    # --- called by any thread, without I/O --------------------------------------------------------

    def report(
        self,
        standing: Standing,
        epoch: int,
        verdict: Verdict,
        *,
        voter: str = "",
        each: bool = False,
        was_overdue: bool = False,
    ) -> int:
        """Note the outcome of one call that needed no permit.

        Args:
            standing: of the breaker.
            epoch: the breaker's epoch when the call was admitted.
            verdict: on the call; IGNORED is not sent.
            voter: the task that made the call; see :class:`Calls`.
            each: the call counts whatever the task has voted; see :class:`Calls`.
            was_overdue: it has been reported as OVERDUE while it ran.

        Returns:
            A ticket for :meth:`wait`; 0 if the outcome is in no hurry.
        """
        outcome, cause, retry_after = verdict[:3]
        if outcome is Outcome.IGNORED:
            return _NOTHING_URGENT
        if outcome is not Outcome.SUCCESS or was_overdue:
            standing.pending.append((epoch, Calls(outcome, 1, voter, each, was_overdue), cause, retry_after))
            return self.schedule(standing, urgent=True)
        standing.pending.append(epoch)
        if not standing.scheduled:
            self.schedule(standing)
        return _NOTHING_URGENT

    def schedule(self, standing: Standing, *, urgent: bool = False) -> int:
        """Have what is pending sent when it is due; at once if ``urgent``. Return the ticket for that."""
        with self._condition:
            standing.scheduled = True
            standing.urgent |= urgent
            self._busy[standing] = None
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
        was_overdue: bool = False,
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
            was_overdue: it has been reported as OVERDUE while it ran.
            wait: longest time in seconds to wait until the store has answered.

        Returns:
            A ticket for :meth:`wait`.
        """
        outcome, cause, retry_after = verdict[:3]
        evidence = Evidence(epoch, (Calls(outcome, 1, voter, each, was_overdue),), cause, retry_after)
        if outcome is not Outcome.OVERDUE:
            self._leases.let_go(spec.name, holder)
        with self._condition:
            self._settlements.append(_Settlement(spec, holder, outcome, evidence))
            ticket = self._wake(urgent=True)
        if wait:
            self.wait(ticket, wait)
        return ticket

    def hold(self, name: str, holder: str, until: float) -> None:
        """Renew a permit or a slot until it is settled, or ``until`` (on the clock) has passed."""
        self._leases.hold(name, holder, until)
        with self._condition:
            self._wake()

    def tally(self, name: str, kind: str, count: int = 1, *, peak: tuple[str, float] | None = None) -> None:
        """Count something for the history of a breaker; see :meth:`Tallies.add`."""
        if self._tallies.add(name, kind, count, peak=peak):
            with self._condition:
                self._wake()

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
            for standing in self._busy:
                standing.urgent = True
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
                standings = self._take_due()
                self._is_sending = True
            self._work(standings)
            with condition:
                self._is_sending = False
                self._served = ticket
                condition.notify_all()

    def _is_dismissed(self) -> bool:
        return self._thread is not threading.current_thread()

    def _is_due(self) -> bool:
        return self._is_dismissed() or self._asked > self._served or self._seconds_until_due() == 0

    def _seconds_until_due(self) -> float | None:
        due = [0.0 if standing.urgent else standing.due_at for standing in self._busy]
        due += [at for at in (self._leases.due_at, self._tallies.due_at) if at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _take_due(self) -> list[Standing]:
        now = self._clock()
        due = [standing for standing in self._busy if standing.urgent or standing.due_at <= now]
        for standing in due:
            # First this, then collecting: an outcome that comes in between schedules itself again.
            del self._busy[standing]
            standing.scheduled = standing.urgent = False
            standing.due_at = now + BATCH_INTERVAL
        return due

    def _work(self, standings: list[Standing]) -> None:
        for standing in standings:
            self._safely(partial(self._send, standing))
        for _ in range(len(self._settlements)):
            self._safely(partial(self._settle, self._settlements.popleft()))
        if self._is_over(self._leases.due_at):
            self._safely(self._leases.renew)
        if self._is_over(self._tallies.due_at):
            self._safely(self._send_tallies)

    def _is_over(self, due_at: float | None) -> bool:
        return due_at is not None and due_at <= self._clock()

    def _safely(self, job: Callable[[], None]) -> None:
        """Do a job; no mistake of a store or a listener may end the thread."""
        try:
            job()
        except Exception:
            logger.exception("outcomes of guarded calls could not be reported")

    def _send_tallies(self) -> None:
        try:
            self._tallies.send()
        except StoreError as error:
            logger.debug("what was counted waits for the store: %s", error)

    def _send(self, standing: Standing) -> None:
        batches, late = collect(standing)
        for kind, count in chain.from_iterable(batch.counts() for batch in (*batches, *late)):
            self._tallies.add(standing.name, kind, count)
        if any(batch.may_open for batch in batches):  # so that no outage counts what came before it
            self._send_tallies()
        for batch in batches:
            asked = self._view.asking()
            self._learn(self._store.record(standing.spec, batch.evidence(), jitter=random.random()), asked)

    def _settle(self, settlement: _Settlement) -> None:
        outcome, evidence = settlement.outcome, settlement.evidence
        if outcome in _ENDS and self._view.declare(settlement.spec).snapshot.state is not State.DISABLED:
            self._tallies.add(settlement.spec.name, outcome.value)
            if outcome is Outcome.FAILURE:
                self._tallies.add(settlement.spec.name, CAUSE + evidence.cause)
        asked = self._view.asking()
        self._learn(self._store.settle(*settlement, jitter=random.random()), asked)


_reporters: weakref.WeakSet[Reporter] = weakref.WeakSet()


def _flush_at_exit() -> None:
    deadline = time.monotonic() + EXIT_PATIENCE
    for reporter in list(_reporters):
        reporter.flush(max(0.0, deadline - time.monotonic()))


atexit.register(_flush_at_exit)
