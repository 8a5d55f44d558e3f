"""This process's view of all breakers: cached states that admission reads without I/O.

Guards and gates hold a ``CachedState`` each, because they read it on every call. It is kept fresh in one of two ways:

* A process that *follows* (a worker's main process, a web process, a script) has one thread that receives
  transitions, and once or twice a second asks which breakers have changed, which makes up for lost messages. It reads
  those whose change it has not received, and those that need a look all the time: not CLOSED, or tasks wait for them.
  So what is idle costs nothing, however much of it there is; now and then one of the others is read all the same.
* A *child* of a prefork pool neither subscribes nor polls. Its main process counts changes, by breaker, in memory
  that was shared before the fork; the child rereads a breaker that it is about to use when that count has moved.

So what a call costs never depends on how many breakers and children there are, nor on how often others change.
Locks and threads never cross a fork: the cached states do, and each process goes on from what it inherited.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from zlib import crc32

from resilient_tasks.core.model import ADMITTING, Answer, Calls, Snapshot, State, parent_of
from resilient_tasks.core.rules import ramp_share
from resilient_tasks.errors import StoreError
from resilient_tasks.store.background import PeriodicThread, renew_after_fork
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.keys import CHANGES_KEPT_FOR

logger = logging.getLogger(__name__)

DENIAL_MEMORY = 1.0  # seconds for which a denied permit is not asked for again, unless something has moved
MOST_AT_ONCE = 500  # children that are read with one refresh
POLL_INTERVAL = 0.5  # seconds between two looks at what has changed, and before a failed one is tried again
IDLE_POLL_INTERVAL = 1.0  # the same while nothing changes and no breaker needs a look
SWEEP_INTERVAL = 30.0  # seconds between two reads of idle breakers, one at a time
_OVERLAP = 1.0  # seconds of changes that are looked at twice: processes know the store's time roughly
_SHARED_COUNTS = 2**16  # of changes; breakers with the same checksum share one
_UNSHARED = memoryview(bytearray(b"\xff" * 4)).cast("I")  # differs from every count that a cached state has seen

# What waits to be reported about one breaker: epoch, call, cause, Retry-After; the bare epoch is a success, the
# commonest thing by far.
Occurrence = tuple[int, Calls, str, float | None]
_MOST_PENDING = 1_000_000
_NEVER_DENIED = (-1, -math.inf)


class CachedState:
    """One breaker as this process sees it. Read without locks; written by its ``View`` only, but for what is pending.

    Attributes:
        spec: the breaker as this process declares it.
        snapshot: what the store last answered; CLOSED with epoch 0 before it answered anything.
        known: the store has answered something.
        admits: calls are admitted, where they are limited with a slot: CLOSED, DISABLED or SHADOW.
        admits_freely: and they need not even ask the store, because there is no limit.
        ramps: it has recovered, and may admit only a share of the tasks yet.
        epoch: of ``snapshot``; the outcome of a call belongs to the epoch that admitted it.
        counts: of changes, which another process writes; see :meth:`watch`.
        deadline: on the view's clock, when trials may begin: -inf at once, +inf only by an operator.
        pending: outcomes that the ``Reporter`` has not sent yet.
        scheduled: the ``Reporter`` knows that something is pending; it is to be sent at ``due_at``, or if ``urgent``
            at once.
    """

    __slots__ = (
        "_clock", "_denied", "_place", "_read_at", "admits", "admits_freely", "counts", "deadline", "due_at", "epoch",
        "known", "mark", "name", "pending", "ramps", "scheduled", "seen", "snapshot", "spec", "urgent",
    )  # fmt: skip

    def __init__(self, spec: Spec, clock: Callable[[], float]) -> None:
        self.spec, self.name = spec, spec.name
        self._clock = clock
        self.known = False
        self.mark = 0  # the view's count of updates when this one was made
        self.pending: deque[int | Occurrence] = deque(maxlen=_MOST_PENDING)
        self.scheduled = self.urgent = False
        self.due_at = -math.inf
        self._denied = _NEVER_DENIED
        self.seen = 0  # the count of changes when this copy was made
        self.watch(None, 0)
        self.take(Snapshot(spec.name, State.CLOSED, epoch=0, version=0, now=0.0, since=0.0), -math.inf)

    def watch(self, counts: memoryview | None, place: int) -> None:
        """Watch a count of changes that another process writes; None: this process receives them itself."""
        self.counts, self._place = counts, place

    @property
    def count(self) -> int:
        """How many changes have been counted."""
        return 0 if self.counts is None else int(self.counts[self._place])

    @property
    def is_behind(self) -> bool:
        """Whether the main process has received a change since this copy was made."""
        return self.counts is not None and self.counts[self._place] != self.seen

    def take(self, snapshot: Snapshot, now: float) -> None:
        """Take over what the store answered at ``now`` on the view's clock."""
        self.snapshot = snapshot
        self._read_at = now
        self.deadline = -math.inf if snapshot.open_until is None else now + snapshot.open_until - snapshot.now
        if snapshot.state is State.FORCED_OPEN:
            self.deadline = math.inf
        self.epoch = snapshot.epoch  # before ``admits``: a call admitted by this answer belongs to this epoch
        self.admits = snapshot.state in ADMITTING
        unknown = snapshot.epoch == 0
        limit = self.spec.policy.most_in_flight if unknown else snapshot.concurrency_limit
        self.admits_freely = self.admits and limit is None
        self.ramps = snapshot.ramp_since is not None and snapshot.state is State.CLOSED

    @property
    def needs_a_look(self) -> bool:
        """Whether this breaker is to be read with each refresh: it is unknown, not CLOSED, or waited for."""
        snapshot = self.snapshot
        is_waited_for = snapshot.deferred or snapshot.active_children
        return not self.known or snapshot.state is not State.CLOSED or is_waited_for > 0

    def has_seen(self, change_at: float) -> bool:
        """Whether this copy is from after a change.

        Others know the store's time roughly, and of each breaker the latest change is kept: one that was noted as older
        may have come after it.
        """
        return self.snapshot.now > change_at + _OVERLAP

    @property
    def age(self) -> float | None:
        """Seconds since the store answered this; None if it never answered anything."""
        return self._clock() - self._read_at if self.known else None

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be admitted again; None when only an operator knows."""
        if self.deadline == math.inf:
            return None
        return max(0.0, max(self.deadline, self._denied_until()) - self._clock())

    @property
    def refuses(self) -> bool:
        """Whether a call is refused without asking the store: not yet time, or denied a moment ago."""
        return not self.admits and self._clock() < max(self.deadline, self._denied_until())

    def deny(self) -> None:
        """Remember that the store has just denied a permit, until the breaker's version moves."""
        self._denied = (self.snapshot.version, self._clock() + DENIAL_MEMORY)

    def _denied_until(self) -> float:
        version, until = self._denied
        return until if version == self.snapshot.version else -math.inf

    def ramp_share(self) -> float:
        """Return the share of tasks to admit, 0.1 to 1.0: it grows while the breaker is fresh from a recovery."""
        since, ramp = self.snapshot.ramp_since, self.spec.policy.ramp
        if since is None or ramp <= 0 or not self.ramps:
            return 1.0
        elapsed = self.snapshot.now - since + self._clock() - self._read_at
        return min(1.0, ramp_share(max(0.0, elapsed), ramp))


class View:
    """All breakers that this process declares, as it sees them; errors of the store leave the view as it is."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.on_room: Callable[[], object] = _nothing  # tasks wait for a slot, and there is one
        self.on_forgotten: Callable[[str], object] = _nothing  # a child is known here no longer
        self.on_answer: Callable[[Answer], object] = _nothing  # a change was due, and was made by this process
        self._store = store
        self._states: dict[str, CachedState] = {}
        self._active: dict[str, list[str]] = {}  # parent -> some of its active children
        self._passed: dict[str, int] = {}  # parent -> how many active children were looked at before
        self._unused: set[str] = set()  # children of which only others have reported
        self._looked_at = -math.inf  # the store's time of the last look at what has changed; -inf: all are to be read
        self._changed: dict[str, float] = {}  # what had changed by then
        self._switches = 0  # of a FailoverStore between its stores, as far as all were read since
        self._swept_at, self._swept = -math.inf, 0  # when the last idle breaker was read, and how many were
        self._server_offset = time.time() - clock()
        self._marks = 0
        self._shared: memoryview | None = None  # counts of changes; this process writes or watches them
        self._is_child = False
        self._retry_at = -math.inf
        self._begin()
        renew_after_fork(self)

    def _begin(self) -> None:
        """Make what cannot cross a fork."""
        self._lock = threading.Lock()
        self._rereading = threading.Lock()
        self._thread: PeriodicThread | None = None

    # --- what is known --------------------------------------------------------------------------

    def declare(self, spec: Spec) -> CachedState:
        """Add a breaker, or its new policy; without I/O. Return its cached state, always the same object."""
        with self._lock:
            state = self._states.get(spec.name) or self._new(spec)
            state.spec = spec
            self._unused.discard(spec.name)
            return state

    def _new(self, spec: Spec) -> CachedState:
        state = self._states[spec.name] = CachedState(spec, self.clock)
        self._watch(state)
        return state

    def _watch(self, state: CachedState) -> None:
        """In a child process, watch the place where changes of this breaker are counted."""
        if self._is_child and self._shared is not None:
            state.watch(self._shared, crc32(state.name.encode()) % len(self._shared))

    def state(self, name: str) -> CachedState:
        """Return a declared breaker, up to date as far as this process can know."""
        state = self._states[name]
        self.catch_up(state)
        return state

    def states(self) -> list[CachedState]:
        """Return all declared breakers."""
        return list(self._states.values())

    def active_children(self) -> list[str]:
        """Return names of children in the fleet that are not plainly CLOSED, at most 500 of a parent, in turn."""
        return sorted(name for names in list(self._active.values()) for name in names)

    def forget(self, name: str) -> None:
        """Let go of a child; declaring it again makes another cached state."""
        with self._lock:
            self._states.pop(name, None)
            self._unused.discard(name)
        self.on_forgotten(name)

    def server_now(self) -> float:
        """Return the time on the store's clock, as well as this process knows it."""
        return self.clock() + self._server_offset

    # --- answers ----------------------------------------------------------------------------------

    def asking(self) -> int:
        """Return the mark of a question that is put to the store now; see :meth:`update`."""
        return self._marks

    def update(self, snapshot: Snapshot, asked: int | None = None) -> bool:
        """Take over what a store answered; return whether it differs from what was known.

        Normally the higher epoch and version win. But what was ``asked`` for (the mark from before the question; None
        for a message) after the present copy was made is the truth even if its epoch is lower: a local breaker that
        replaced the store counts epochs of its own, and a store that was restored from a backup has gone back in time.
        Of a breaker that is not declared here, pool processes are notified.
        """
        with self._lock:
            state = self._states.get(snapshot.name)
            if state is None:
                self._notify(snapshot.name)
                return False
            if not _is_newer(state, snapshot, asked):
                return False
            differs = not state.known or _essence(state.snapshot) != _essence(snapshot)
            now = self.clock()
            self._server_offset = snapshot.now - now
            self._marks += 1
            state.mark = self._marks
            state.take(snapshot, now)
            state.known = True
            if differs:
                state.seen = self._notify(snapshot.name)
            return differs

    def _notify(self, name: str) -> int:
        """Count a change for the pool processes; return how many there were."""
        if self._shared is None:
            return 0
        place = crc32(name.encode()) % len(self._shared)
        if not self._is_child:
            self._shared[place] = (self._shared[place] + 1) % 2**32
        return self._shared[place]

    def refresh(self) -> bool:
        """Read breakers that have changed and those that need a look all the time, in a few round trips.

        Return whether there were any.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        began_at, switches = self.clock() - _OVERLAP, getattr(self._store, "switches", 0)
        changed = self._store.changed(max(0.0, self._looked_at))
        changed.update({parent: math.inf for name in changed if (parent := parent_of(name)) is not None})
        reads_all = switches != self._switches or self.server_now() > self._looked_at + CHANGES_KEPT_FOR / 2
        idle, others = list[Spec](), list[Spec]()
        for each in self.states():
            if each.spec.parent is None:
                is_idle = not reads_all and not each.needs_a_look and each.has_seen(changed.get(each.name, -math.inf))
                (idle if is_idle else others).append(each.spec)
        for snapshot in self.look(*others, *self._next_to_sweep(idle)):
            if snapshot.active_children or self._active.get(snapshot.name):
                self._refresh_children(snapshot.name, changed)
        self._switches = switches
        if switches == getattr(self._store, "switches", 0) and not getattr(self._store, "is_unavailable", False):
            self._looked_at, self._changed = began_at + self._server_offset, changed
        self._forget_unused()
        return bool(changed or others)

    def _next_to_sweep(self, idle: list[Spec]) -> list[Spec]:
        if not idle or self.clock() < self._swept_at + SWEEP_INTERVAL:
            return []
        self._swept_at, self._swept = self.clock(), self._swept + 1
        return [idle[self._swept % len(idle)]]

    def _refresh_children(self, parent: str, changed: dict[str, float]) -> None:
        """Look at children that have changed, and at the next of all active ones that are not known here."""
        known = self._states
        passed = self._passed.get(parent, 0)
        active = self._store.active_children(parent, start=passed, count=MOST_AT_ONCE)
        former, self._active[parent] = self._active.get(parent, []), active
        self._passed[parent] = passed + len(active) if len(active) == MOST_AT_ONCE else 0
        names = {name for name in active if name not in known}
        names |= {name for name in former if name in known and name not in active}
        for name, at in changed.items():
            if parent_of(name) != parent:
                continue
            if name not in known:
                if at != self._changed.get(name):
                    self._notify(name)
            elif not known[name].has_seen(at):
                names.add(name)
        with self._lock:
            for name in names - known.keys():
                self._new(replace(known[parent].spec, name=name))
                self._unused.add(name)
        in_order = sorted(names)
        for name in in_order[MOST_AT_ONCE:]:
            changed.pop(name, None)  # to be looked at next time
        self.look(*(known[name].spec for name in in_order[:MOST_AT_ONCE] if name in known))

    def _forget_unused(self) -> None:
        with self._lock:
            gone = self._unused.difference(*self._active.values())
            self._unused -= gone
            for name in gone:
                del self._states[name]
        for name in gone:
            self.on_forgotten(name)

    def look(self, *specs: Spec) -> list[Snapshot]:
        """Read some breakers in one round trip; make changes that are due and that no process has made.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        if not specs:
            return []
        asked = self.asking()
        snapshots = self._store.read(specs)
        for spec, snapshot in zip(specs, snapshots, strict=True):
            self.take(spec, snapshot, asked)
        return snapshots

    def take(self, spec: Spec, snapshot: Snapshot, asked: int) -> None:
        """Take over what was read of a breaker, and make a change that is due and that no process has made."""
        self.update(snapshot, asked)
        self.look_for_room(snapshot)
        if snapshot.is_due:  # the process that counted has ended before it could decide
            self.on_answer(self._store.advance(spec))

    def look_for_room(self, snapshot: Snapshot) -> None:
        """Notify if tasks wait for a slot and there is one. Not after each denial: it might go on for ever."""
        if snapshot.deferred and snapshot.concurrency_limit is not None and snapshot.has_room:
            self.on_room()

    # --- a process that follows -------------------------------------------------------------------

    def follow(self) -> None:
        """Keep the view fresh from now on, in one daemon thread. Does nothing in a child, or twice."""
        with self._lock:
            if not self._is_child and (self._thread is None or not self._thread.is_running):
                self._thread = PeriodicThread("view", self._receive_changes, POLL_INTERVAL)
                self._thread.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Stop following, waiting at most ``timeout`` seconds for the thread."""
        if self._thread is not None:
            self._thread.stop(timeout)

    def _receive_changes(self, stopped: threading.Event) -> None:
        interval = POLL_INTERVAL if self.refresh() else IDLE_POLL_INTERVAL
        read_at = time.monotonic()
        for snapshot in self._store.changes(timeout=POLL_INTERVAL):
            if snapshot is not None:
                self.update(snapshot)
            if stopped.is_set():
                return
            if time.monotonic() >= read_at + interval:
                interval = POLL_INTERVAL if self.refresh() else IDLE_POLL_INTERVAL
                read_at = time.monotonic()

    # --- a child of a prefork pool ----------------------------------------------------------------

    def share(self) -> None:
        """Allocate the memory that children will watch. Called in the main process, before it forks."""
        if self._shared is None:
            self._shared = memoryview(mmap.mmap(-1, 4 * _SHARED_COUNTS)).cast("I")

    def become_child(self) -> None:
        """Watch the main process instead of the store. Called in each child; needs :meth:`share` before the fork.

        Without shared memory the process follows for itself on first use.
        """
        self._is_child = self._shared is not None
        for state in self.states():
            if self._is_child:
                self._watch(state)
            else:
                state.watch(_UNSHARED, 0)

    def catch_up(self, state: CachedState) -> None:
        """Reread a breaker that has changed, as far as the main process knows."""
        if not state.is_behind:
            return
        if not self._is_child:
            for each in self.states():
                each.watch(None, 0)
            self.follow()
        elif self.clock() >= self._retry_at and self._rereading.acquire(blocking=False):
            try:
                self._reread(state)
            finally:
                self._rereading.release()

    def _reread(self, state: CachedState) -> None:
        count = state.count
        try:
            self.look(state.spec)
        except StoreError as error:
            logger.debug("a change was announced but cannot be read: %s", error)
            self._retry_at = self.clock() + POLL_INTERVAL
            return
        # A FailoverStore answers by its local breakers while the shared store is unavailable: that is not the change.
        if getattr(self._store, "is_unavailable", False):
            self._retry_at = self.clock() + POLL_INTERVAL
        else:
            state.seen = count

    def after_fork(self) -> None:
        """Go on in the child with what the parent knew."""
        follows = self._thread is not None
        self._begin()
        if not self._is_child and (follows or self._shared is not None):
            self.become_child()


def _nothing(*_: object) -> None:
    """Do nothing."""


def _is_newer(state: CachedState, snapshot: Snapshot, asked: int | None) -> bool:
    if not state.known or (asked is not None and state.mark <= asked):
        return True
    known = state.snapshot
    return (snapshot.epoch, snapshot.version, snapshot.now) >= (known.epoch, known.version, known.now)


def _essence(snapshot: Snapshot) -> tuple[object, ...]:
    """Return what admission depends on: counts change with every report and concern no child."""
    limited = snapshot.concurrency_limit is not None
    return snapshot.epoch, snapshot.version, snapshot.state, snapshot.open_until, snapshot.ramp_since, limited
