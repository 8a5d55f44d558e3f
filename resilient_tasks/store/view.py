"""This process's view of all breakers: a local, slightly stale copy that admission reads without I/O.

A ``Standing`` is one breaker in it. Guards and gates hold theirs directly, because they look at it on
every call. The copy is kept fresh in one of two ways:

* A process that *follows* (a worker's main process, a web process, a script) has one thread that receives
  transitions and reads states twice a second, which makes up for lost messages: those of all breakers, and of
  children those that have changed, at most 500 at a time.
* A *child* of a prefork pool neither subscribes nor polls. Its main process counts changes, by breaker, in memory
  that was shared before the fork; the child rereads a breaker that it is about to use when that count has moved.

So what a call costs never depends on how many breakers and children there are, nor on how often others change.
Locks and threads never cross a fork: the copy does, and each process goes on from what it inherited.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from zlib import crc32

from resilient_tasks.core.model import Answer, Snapshot
from resilient_tasks.core.names import parent_of
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.standing import Standing

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 500  # children that are read with one refresh
POLL_INTERVAL = 0.5  # seconds between two reads of all states, and before a failed read is tried again
_OVERLAP = 2.0  # seconds of changes that are looked at twice: clocks are read before and after a script
_SHARED_COUNTS = 2**16  # of changes; breakers with the same checksum share one


class View:
    """All breakers that this process declares, as it sees them.

    Args:
        store: where states are read and transitions received; its errors leave the view as it is.
        clock: monotonic clock in seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.on_room: Callable[[], object] = _nothing  # tasks wait for a slot, and there is one
        self.on_forgotten: Callable[[str], object] = _nothing  # a child is known here no longer
        self.on_answer: Callable[[Answer], object] = _nothing  # a change was due, and was made by this process
        self._store = store
        self._standings: dict[str, Standing] = {}
        self._active: dict[str, list[str]] = {}  # parent -> some of its active children
        self._passed: dict[str, int] = {}  # parent -> how many active children were looked at before
        self._unused: set[str] = set()  # children of which only others have reported
        self._looked_at = 0.0  # the store's time of the last look at what has changed
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
        self._thread: threading.Thread | None = None
        self._stopped = threading.Event()

    # --- what is known --------------------------------------------------------------------------

    def declare(self, spec: Spec) -> Standing:
        """Add a breaker, or its new policy; without I/O. Return its standing, always the same object."""
        with self._lock:
            standing = self._standings.get(spec.name) or self._new(spec)
            standing.spec = spec
            self._unused.discard(spec.name)
            return standing

    def _new(self, spec: Spec) -> Standing:
        standing = self._standings[spec.name] = Standing(spec, self.clock)
        self._watch(standing)
        return standing

    def _watch(self, standing: Standing) -> None:
        """Let a standing of a child process know where changes are counted."""
        if self._is_child and self._shared is not None:
            standing.watch(self._shared, crc32(standing.name.encode()) % len(self._shared))

    def standing(self, name: str) -> Standing:
        """Return the standing of a declared breaker, up to date as far as this process can know.

        Raises:
            KeyError: nobody declared it.
        """
        standing = self._standings[name]
        self.catch_up(standing)
        return standing

    def standings(self) -> list[Standing]:
        """Return all declared breakers."""
        return list(self._standings.values())

    def active_children(self) -> list[str]:
        """Return names of children in the fleet that are not plainly CLOSED, at most 500 of a parent, in turn."""
        return sorted(name for names in list(self._active.values()) for name in names)

    def forget(self, name: str) -> None:
        """Let go of a child; declaring it again makes another standing."""
        with self._lock:
            self._standings.pop(name, None)
            self._unused.discard(name)
        self.on_forgotten(name)

    def server_now(self) -> float:
        """Return the time on the store's clock, as well as this process knows it."""
        return self.clock() + self._server_offset

    # --- news -----------------------------------------------------------------------------------

    def asking(self) -> int:
        """Return the mark of a question that is put to the store now; see :meth:`update`."""
        return self._marks

    def update(self, snapshot: Snapshot, asked: int | None = None) -> bool:
        """Take over what a store said; return whether it differs from what was known.

        Normally the higher epoch and version win. But what was asked for after the present copy was made
        is the truth even if its epoch is lower: a local breaker that stood in for the store counts epochs
        of its own, and a store that was restored from a backup has gone back in time.

        Args:
            snapshot: what it said; of a breaker that is not declared here, pool processes are notified.
            asked: the mark of :meth:`asking` from before the question; None for an unasked message.
        """
        with self._lock:
            standing = self._standings.get(snapshot.name)
            if standing is None:
                self._notify(snapshot.name)
                return False
            if not _is_news(standing, snapshot, asked):
                return False
            differs = not standing.known or _essence(standing.snapshot) != _essence(snapshot)
            self._take(standing, snapshot)
            if differs:
                standing.seen = self._notify(snapshot.name)
            return differs

    def _notify(self, name: str) -> int:
        """Count a change for the pool processes; return how many there were."""
        if self._shared is None:
            return 0
        place = crc32(name.encode()) % len(self._shared)
        if not self._is_child:
            self._shared[place] = (self._shared[place] + 1) % 2**32
        return self._shared[place]

    def _take(self, standing: Standing, snapshot: Snapshot) -> None:
        now = self.clock()
        self._server_offset = snapshot.now - now
        self._marks += 1
        standing.mark = self._marks
        standing.hear(snapshot, now)
        standing.known = True

    def refresh(self) -> None:
        """Read all declared breakers in one round trip, and those children that have changed.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        looked_at = self.server_now() - _OVERLAP
        snapshots = self.look(*(each.spec for each in self.standings() if parent_of(each.name) is None))
        for snapshot in snapshots:
            if snapshot.active_children or snapshot.name in self._active:
                self._refresh_children(snapshot.name)
        self._looked_at = looked_at
        self._forget_unused()

    def _refresh_children(self, parent: str) -> None:
        """Look at children that have changed, and at the next of all active ones that are not known here."""
        changed = self._store.active_children(parent, since=self._looked_at, count=MOST_AT_ONCE)
        passed = self._passed.get(parent, 0)
        active = self._store.active_children(parent, start=passed, count=MOST_AT_ONCE)
        former, self._active[parent] = self._active.get(parent, []), active
        self._passed[parent] = passed + len(active) if len(active) == MOST_AT_ONCE else 0
        for name in changed:
            if name not in self._standings:
                self._notify(name)
        known = self._standings
        names = {name for name in changed if name in known} | {name for name in active if name not in known}
        names |= {name for name in former if name in known and name not in active}
        with self._lock:
            for name in names - known.keys():
                self._new(replace(known[parent].spec, name=name))
                self._unused.add(name)
        self.look(*(known[name].spec for name in sorted(names)[:MOST_AT_ONCE] if name in known))

    def _forget_unused(self) -> None:
        with self._lock:
            gone = self._unused.difference(*self._active.values())
            self._unused -= gone
            for name in gone:
                del self._standings[name]
        for name in gone:
            self.on_forgotten(name)

    def look(self, *specs: Spec) -> list[Snapshot]:
        """Read some breakers in one round trip; make changes that are due and that nobody has made.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        if not specs:
            return []
        asked = self.asking()
        snapshots = self._store.read(specs)
        for spec, snapshot in zip(specs, snapshots, strict=True):
            self.update(snapshot, asked)
            self.look_for_room(snapshot)
            if snapshot.is_due:  # whoever counted has ended before it could decide
                self.on_answer(self._store.advance(spec))
        return snapshots

    def look_for_room(self, snapshot: Snapshot) -> None:
        """Tell if tasks wait for a slot and there is one. Not after each denial: it might go on for ever."""
        if snapshot.deferred and snapshot.concurrency_limit is not None and snapshot.has_room:
            self.on_room()

    # --- a process that follows -------------------------------------------------------------------

    def follow(self) -> None:
        """Keep the view fresh from now on, in one daemon thread. Does nothing in a child, or twice."""
        with self._lock:
            is_alive = self._thread is not None and self._thread.is_alive() and not self._stopped.is_set()
            if self._is_child or is_alive:
                return
            self._stopped = threading.Event()
            thread = threading.Thread(target=self._follow, name="resilient-tasks-view", daemon=True)
            with suppress(RuntimeError):  # the interpreter is shutting down: there is no future to follow
                thread.start()
                self._thread = thread

    def stop(self, timeout: float = 1.0) -> None:
        """Stop following, waiting at most ``timeout`` seconds for the thread."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _follow(self) -> None:
        stopped = self._stopped
        while not stopped.is_set():
            try:
                self._receive_changes(stopped)
            except StoreError as error:
                logger.debug("the view is stale: %s", error)
            except Exception:
                if not stopped.is_set():  # else the connection was closed under our feet
                    logger.exception("the view could not be refreshed; trying again")
            stopped.wait(POLL_INTERVAL)

    def _receive_changes(self, stopped: threading.Event) -> None:
        self.refresh()
        read_at = time.monotonic()
        for snapshot in self._store.changes(timeout=POLL_INTERVAL):
            if snapshot is not None:
                self.update(snapshot)
            if stopped.is_set():
                return
            if time.monotonic() >= read_at + POLL_INTERVAL:
                self.refresh()
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
        if self._shared is None:
            for standing in self.standings():
                standing.watch(_UNSHARED, 0)
            return
        self._is_child = True
        for standing in self.standings():
            self._watch(standing)

    def catch_up(self, standing: Standing) -> None:
        """Reread a breaker that has changed, as far as the main process knows."""
        if not standing.is_behind:
            return
        if not self._is_child:
            for each in self.standings():
                each.watch(None, 0)
            self.follow()
        elif self.clock() >= self._retry_at and self._rereading.acquire(blocking=False):
            try:
                self._reread(standing)
            finally:
                self._rereading.release()

    def _reread(self, standing: Standing) -> None:
        count = standing.count
        try:
            self.look(standing.spec)
        except StoreError as error:
            logger.debug("a change was announced but cannot be read: %s", error)
            self._retry_at = self.clock() + POLL_INTERVAL
            return
        # A FailoverStore answers by its local breakers while the shared store is away: that is no news.
        if getattr(self._store, "away", False):
            self._retry_at = self.clock() + POLL_INTERVAL
        else:
            standing.seen = count

    def after_fork(self) -> None:
        """Go on in the child with what the parent knew."""
        follows = self._thread is not None
        self._begin()
        if not self._is_child and (follows or self._shared is not None):
            self.become_child()


def _nothing(*_: object) -> None:
    """Do nothing."""


def _is_news(standing: Standing, snapshot: Snapshot, asked: int | None) -> bool:
    if not standing.known or (asked is not None and standing.mark <= asked):
        return True
    known = standing.snapshot
    return (snapshot.epoch, snapshot.version, snapshot.now) >= (known.epoch, known.version, known.now)


def _essence(snapshot: Snapshot) -> tuple[object, ...]:
    """Return what admission depends on: counts change with every report and concern no child."""
    limited = snapshot.concurrency_limit is not None
    return (
        snapshot.epoch,
        snapshot.version,
        snapshot.state,
        snapshot.open_until,
        snapshot.ramp_since,
        limited,
    )


_UNSHARED = memoryview(bytearray(b"\xff" * 4)).cast("I")  # differs from every count that a standing has seen
