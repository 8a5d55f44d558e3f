"""``Reporter``: outcomes on their way to the store, noted by any thread without I/O and sent in batches by one.

A success waits up to a tenth of a second for others, so that a busy process sends ten small messages a second per
breaker however many calls it makes. Not longer: what arrives after the first failures of other processes takes away
their evidence; 20 processes that kept theirs for two seconds opened after 29 failed calls and not after 10. What may
open the breaker is sent at once, with the successes before it: a failure, or a success where nothing but the number of
calls keeps the breaker closed. A caller that must know that its report has arrived (its next call should already see
the breaker open) waits for the position that reporting returned: the number of its request to send.

The same thread settles trials, renews permits and slots, and sends counts for the history. All that waits is bounded.
"""

from __future__ import annotations

import atexit
import logging
import random
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain, groupby
from typing import NamedTuple

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Answer, Calls, Outcome, State
from resilient_tasks.core.outage import CAUSE, Tally
from resilient_tasks.errors import StoreError
from resilient_tasks.store.background import renew_after_fork, start_thread
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.history import History
from resilient_tasks.store.keys import may_be_in_a_key
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.store.view import CachedState, View

logger = logging.getLogger(__name__)

BATCH_INTERVAL = 0.1  # seconds between two reports of successes of one breaker
EXIT_TIMEOUT = 0.9  # seconds that the end of the process may wait for the last reports
LEASE = 5.0  # seconds; a permit whose holder dies is free after at most this long
RENEW_INTERVAL = LEASE / 3  # seconds between two renewals
TALLY_INTERVAL = 1.0  # seconds from the first count until it is sent, and between two tries
MOST_NAMES = 40  # causes, or sources of fallbacks, of one breaker; the names are other people's, more count as "other"
_MOST_SETTLEMENTS = 10_000
_NOT_URGENT = 0
_ENDS = (Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW)  # of calls, which count; OVERDUE counts when it has ended
_SUCCESS = Calls(Outcome.SUCCESS)


class Tallies:
    """Counts of one process for the history. However long the store is unavailable, they take bounded room.

    They are to be sent at ``due_at``, None while there is nothing to send. Without a history nothing is counted.
    """

    def __init__(self, history: History | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._history = history
        self._clock = clock
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start empty: what was counted before a fork is the parent's to send."""
        self._lock = threading.Lock()
        self._counted: dict[str, Tally] = {}
        self._names: dict[str, set[str]] = {}  # kinds with a name, by breaker
        self.due_at: float | None = None

    def add(self, name: str, kind: str, count: int = 1, *, peak: tuple[str, float] | None = None) -> bool:
        """Count something of a kind of ``core/outage.py``; from any thread, without I/O.

        ``peak`` is a kind and seconds, of which an outage keeps the highest. Return whether this is the first count
        since they were sent: ``due_at`` is now set. A name that cannot be a breaker's, as in an error that user code
        has made, is not counted.
        """
        if self._history is None:
            return False
        with self._lock:
            tally = self._counted.get(name)
            if tally is None:
                if not may_be_in_a_key(name):
                    return False
                tally = self._counted[name] = Tally()
            tally.counts[self._bounded(name, kind)] += count
            if peak is not None:
                tally.peaks[peak[0]] = max(tally.peaks.get(peak[0], 0), round(peak[1] * 1000))
            begins = self.due_at is None
            if begins:
                self.due_at = self._clock() + TALLY_INTERVAL
            return begins

    def _bounded(self, name: str, kind: str) -> str:
        prefix, separator, _ = kind.partition(":")
        if not separator:
            return kind
        names = self._names.setdefault(name, set())
        if kind not in names and len(names) >= MOST_NAMES:
            return f"{prefix}:other"
        names.add(kind)
        return kind

    def hasten(self) -> None:
        """Have them sent as soon as possible, if there is anything to send."""
        if self.due_at is not None:
            self.due_at = self._clock()

    def send(self, now: float) -> None:
        """Send all that was counted; ``now`` is the store's time in seconds.

        Raises:
            StoreError: the store is unavailable; what was not confirmed is sent again, and may then count twice.
        """
        with self._lock:
            counted, self._counted, self.due_at = self._counted, {}, None
        if self._history is None or not counted:
            return
        try:
            self._history.tally(counted, now)
        except StoreError:
            with self._lock:
                for name, tally in self._counted.items():
                    tally.merge(counted.get(name, Tally()))
                self._counted = {**counted, **self._counted}
                self.due_at = self._clock() + TALLY_INTERVAL
            raise


class Leases:
    """The permits and slots of this process, renewed while their calls wait or run; held by any thread."""

    def __init__(self, store: FailoverStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], float] = {}  # breaker and holder -> until when to renew at most
        self._renew_at = 0.0

    @property
    def due_at(self) -> float | None:
        """When to renew, on the clock; None if nothing is held."""
        return self._renew_at if self._held else None

    def hold(self, name: str, holder: str, until: float) -> None:
        """Renew a permit or a slot until it is let go or ``until`` (on the clock) has passed."""
        with self._lock:
            if not self._held:
                self._renew_at = self._clock() + RENEW_INTERVAL
            self._held[name, holder] = until

    def let_go(self, name: str, holder: str) -> None:
        """Renew it no longer: it is settled, or lost."""
        with self._lock:
            self._held.pop((name, holder), None)

    def renew(self) -> None:
        """Renew all that is held."""
        now = self._clock()
        self._renew_at = now + RENEW_INTERVAL
        with self._lock:
            self._held = {lease: until for lease, until in self._held.items() if until > now}
            held = sorted(self._held)
        for name, leases in groupby(held, key=lambda lease: lease[0]):
            holders = [holder for _, holder in leases]
            for holder, is_alive in zip(holders, self._store.renew(name, holders, lease=LEASE), strict=True):
                if not is_alive:
                    self.let_go(name, holder)


class _Batch:
    """Outcomes of one epoch, run-length encoded, oldest first."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.runs: list[Calls] = []
        self.cause = ""
        self.retry_after: float | None = None
        self.causes: Counter[str] = Counter()

    def add(self, call: Calls, count: int, cause: str, retry_after: float | None) -> None:
        if call.outcome is Outcome.FAILURE:
            self.causes[cause] += count
        if self.runs and self.runs[-1]._replace(number=1) == call:
            count += self.runs.pop().number
        self.runs.append(call._replace(number=count))
        self.cause = cause or self.cause
        if retry_after is not None:
            self.retry_after = max(retry_after, self.retry_after or 0.0)

    def evidence(self) -> Evidence:
        return Evidence(self.epoch, tuple(self.runs), self.cause, self.retry_after)

    @property
    def may_open(self) -> bool:
        return any(calls.outcome is not Outcome.SUCCESS for calls in self.runs)

    def counts(self) -> Iterable[tuple[str, int]]:
        ended = (calls for calls in self.runs if calls.outcome is not Outcome.OVERDUE)
        yield from ((calls.outcome.value, calls.number) for calls in ended)
        yield from ((CAUSE + cause, count) for cause, count in self.causes.items())


def _collect(state: CachedState) -> tuple[list[_Batch], list[_Batch]]:
    """Take what is pending about a breaker; return what to send, and what is too late for a decision but counts."""
    batches: list[_Batch] = []
    items = [state.pending.popleft() for _ in range(len(state.pending))]
    for item, group in groupby(items):
        epoch, call, cause, retry_after = item if isinstance(item, tuple) else (item, _SUCCESS, "", None)
        if not batches or batches[-1].epoch != epoch:
            batches.append(_Batch(epoch))
        batches[-1].add(call, len(list(group)), cause, retry_after)
    if state.snapshot.state is State.DISABLED:
        return [], []
    # epoch 0: admitted before the store had first seen this breaker; the store decides what it is worth
    epochs = 0, state.epoch
    return [each for each in batches if each.epoch in epochs], [each for each in batches if each.epoch not in epochs]


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
        learn: gets each answer of the store, with the mark of :meth:`View.asking`.
        clock: monotonic clock in seconds.
        history: gets what this process counts; None: it is not counted.
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
        self._busy: dict[CachedState, None] = {}  # a set that keeps its order
        self._settlements: deque[_Settlement] = deque(maxlen=_MOST_SETTLEMENTS)
        self._leases = Leases(self._store, self._clock)
        self._asked = 0  # position of the last request to send, counted from 1, and of the last one that was served
        self._served = 0
        self._is_sending = False
        for state in self._view.states():
            state.pending.clear()
            state.scheduled = False

    # --- called by any thread, without I/O --------------------------------------------------------

    def report(
        self,
        state: CachedState,
        epoch: int,
        verdict: Verdict,
        *,
        voter: str = "",
        each: bool = False,
        was_overdue: bool = False,
    ) -> int:
        """Note the outcome of one call that needed no permit; IGNORED is not sent.

        ``epoch`` is the breaker's when the call was admitted; for the rest see :class:`Calls`. Return its position,
        for :meth:`wait`; 0 if the outcome is not urgent.
        """
        outcome, cause, retry_after = verdict[:3]
        if outcome is Outcome.IGNORED:
            return _NOT_URGENT
        if outcome is not Outcome.SUCCESS or was_overdue:
            state.pending.append((epoch, Calls(outcome, 1, voter, each, was_overdue), cause, retry_after))
            return self.schedule(state, urgent=True)
        state.pending.append(epoch)
        if not state.scheduled:
            self.schedule(state)
        return _NOT_URGENT

    def schedule(self, state: CachedState, *, urgent: bool = False) -> int:
        """Have what is pending sent when it is due; at once if ``urgent``. Return the position of that."""
        with self._condition:
            state.scheduled = True
            state.urgent |= urgent
            self._busy[state] = None
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

        IGNORED gives the permit back, OVERDUE leaves it to the call, which still runs. ``epoch`` is that in which it
        was granted; for the rest see :class:`Calls`. Wait at most ``wait`` seconds until the store has answered.
        Return its position, for :meth:`wait`.
        """
        outcome, cause, retry_after = verdict[:3]
        evidence = Evidence(epoch, (Calls(outcome, 1, voter, each, was_overdue),), cause, retry_after)
        if outcome is not Outcome.OVERDUE:
            self._leases.let_go(spec.name, holder)
        with self._condition:
            self._settlements.append(_Settlement(spec, holder, outcome, evidence))
            position = self._wake(urgent=True)
        if wait:
            self.wait(position, wait)
        return position

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

    def is_served(self, position: int) -> bool:
        """Whether the request at ``position`` has been sent, or tried and found impossible."""
        return self._served >= position

    def wait(self, position: int, timeout: float) -> bool:
        """Wait until the request at ``position`` is served, at most ``timeout`` seconds; return whether it is."""
        if self.is_served(position):
            return True
        if threading.current_thread() is self._thread:  # a listener that makes a guarded call of its own
            return False
        with self._condition:
            return self._condition.wait_for(lambda: self.is_served(position), timeout)

    def flush(self, timeout: float) -> bool:
        """Send all that waits now; return whether that was done within ``timeout`` seconds."""
        give_up_at = self._clock() + timeout
        # twice: an outcome that is too late to be sent is tallied instead
        return all(self.wait(self._hurry(), give_up_at - self._clock()) for _ in range(2))

    def _hurry(self) -> int:
        """Make all that waits urgent; return the position of that."""
        with self._condition:
            if not (self._busy or self._settlements or self._is_sending or self._tallies.due_at is not None):
                return _NOT_URGENT
            for state in self._busy:
                state.urgent = True
            self._tallies.hasten()
            return self._wake(urgent=True)

    def close(self, timeout: float = EXIT_TIMEOUT) -> bool:
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
        """Wake the thread, or start it; called with the condition held. Return its position if urgent."""
        self._asked += urgent
        if self._thread is None or not self._thread.is_alive():
            self._thread = start_thread("reports", self._run)
            if self._thread is None:  # the process ends: nothing can be sent any more
                self._served = self._asked
        self._condition.notify_all()
        return self._asked if urgent else _NOT_URGENT

    def _run(self) -> None:
        condition = self._condition
        while True:
            with condition:
                while not self._is_due():  # what is due may change with every wake-up, so no wait_for()
                    condition.wait(self._seconds_until_due())
                if self._is_dismissed():
                    return
                position = self._asked
                states = self._take_due()
                self._is_sending = True
            self._work(states)
            with condition:
                self._is_sending = False
                self._served = position
                condition.notify_all()

    def _is_dismissed(self) -> bool:
        return self._thread is not threading.current_thread()

    def _is_due(self) -> bool:
        return self._is_dismissed() or self._asked > self._served or self._seconds_until_due() == 0

    def _seconds_until_due(self) -> float | None:
        due = [0.0 if state.urgent else state.due_at for state in self._busy]
        due += [at for at in (self._leases.due_at, self._tallies.due_at) if at is not None]
        return max(0.0, min(due) - self._clock()) if due else None

    def _take_due(self) -> list[CachedState]:
        now = self._clock()
        due = [state for state in self._busy if state.urgent or state.due_at <= now]
        for state in due:
            # First this, then collecting: an outcome that comes in between schedules itself again.
            del self._busy[state]
            state.scheduled = state.urgent = False
            state.due_at = now + BATCH_INTERVAL
        return due

    def _work(self, states: list[CachedState]) -> None:
        reports: list[Callable[[], None]] = []
        for state in states:
            self._attempt(partial(self._count, state, reports))
        settlements = [partial(self._settle, self._settlements.popleft()) for _ in range(len(self._settlements))]
        jobs: list[Callable[[], None]] = [self._send_tallies, *reports, *settlements, self._renew]
        for job in jobs:
            self._attempt(job)

    @staticmethod
    def _attempt(job: Callable[[], None]) -> None:
        try:
            job()
        except Exception:  # no mistake of a store or a listener may end the thread
            logger.exception("outcomes of guarded calls could not be reported")

    def _is_time(self, due_at: float | None) -> bool:
        return due_at is not None and due_at <= self._clock()

    def _renew(self) -> None:
        if self._is_time(self._leases.due_at):
            self._leases.renew()

    def _send_tallies(self) -> None:
        if self._is_time(self._tallies.due_at):
            try:
                self._tallies.send(self._view.server_now())
            except StoreError as error:
                logger.debug("what was counted waits for the store: %s", error)

    def _count(self, state: CachedState, reports: list[Callable[[], None]]) -> None:
        """Count what is pending for the history, and add what reports it."""
        batches, late = _collect(state)
        for kind, count in chain.from_iterable(batch.counts() for batch in (*batches, *late)):
            self._tallies.add(state.name, kind, count)
        if any(batch.may_open for batch in batches):  # no outage counts what came before it
            self._tallies.hasten()
        reports += [partial(self._record, state.spec, batch.evidence()) for batch in batches]

    def _record(self, spec: Spec, evidence: Evidence) -> None:
        asked = self._view.asking()
        self._learn(self._store.record(spec, evidence, jitter=random.random()), asked)

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
    deadline = time.monotonic() + EXIT_TIMEOUT
    for reporter in list(_reporters):
        reporter.flush(max(0.0, deadline - time.monotonic()))


atexit.register(_flush_at_exit)
