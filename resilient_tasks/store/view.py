"""This process's view of all breakers: a local, slightly stale copy that admission reads without I/O.

A ``Standing`` is one breaker in it. Guards and gates hold theirs directly, because they look at it on
every call. The copy is kept fresh in one of two ways:

* A process that *follows* (a worker's main process, a web process, a script) has one thread that hears
  of changes and reads all states twice a second, which makes up for lost messages.
* A *child* of a prefork pool neither subscribes nor polls. Its main process counts changes in memory that
  was shared before the fork; the child rereads the store when that number has moved, and only then.

Locks and threads never cross a fork: the copy does, and each process goes on from what it inherited.
"""

from __future__ import annotations

import logging
import math
import mmap
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace

from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.names import parent_of
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.following import POLL_INTERVAL, Follower
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.standing import Standing

logger = logging.getLogger(__name__)

MOST_AT_ONCE = 500  # hot children that are read with one refresh


class View:
    """All breakers that this process declares, as it sees them.

    Args:
        store: where states are read and changes heard; its errors leave the view as it is.
        clock: monotonic clock in seconds.
    """

    def __init__(self, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.signal: memoryview | None = None  # in a child: the main process's count of changes
        self.seen = 0  # that count when this copy was made
        self.on_room: Callable[[], object] = _nobody_cares  # tasks wait for a slot, and there is one
        self.on_forgotten: Callable[[str], object] = _nobody_cares  # a child is known here no longer
        self._store = store
        self._standings: dict[str, Standing] = {}
        self._hot: frozenset[str] = frozenset()
        self._strangers: set[str] = set()  # children that others have told of, and nobody has used here
        self._looked_at = ""  # the hot child that was read last, when there are too many to read all at once
        self._server_offset = time.time() - clock()
        self._marks = 0
        self._shared: memoryview | None = None
        self._retry_at = -math.inf
        self._begin()
        renew_after_fork(self)

    def _begin(self) -> None:
        """Make what cannot cross a fork."""
        self._lock = threading.Lock()
        self._rereading = threading.Lock()
        self._follower = Follower(self._store, self)

    # --- what is known --------------------------------------------------------------------------

    def declare(self, spec: Spec) -> Standing:
        """Add a breaker, or its new policy; without I/O. Return its standing, always the same object."""
        with self._lock:
            standing = self._standings.get(spec.name)
            if standing is None:
                standing = self._standings[spec.name] = Standing(spec, self.clock)
            standing.spec = spec
            self._strangers.discard(spec.name)
            return standing

    def standing(self, name: str) -> Standing:
        """Return the standing of a declared breaker, up to date as far as this process can know.

        Raises:
            KeyError: nobody declared it.
        """
        self.catch_up()
        return self._standings[name]

    def standings(self) -> list[Standing]:
        """Return all declared breakers."""
        return list(self._standings.values())

    def hot_children(self) -> list[str]:
        """Return the names of all children in the fleet that are not plainly CLOSED, as of the last refresh."""
        return sorted(self._hot)

    def forget(self, name: str) -> None:
        """Let go of a child; declaring it again makes another standing."""
        with self._lock:
            self._standings.pop(name, None)
            self._strangers.discard(name)
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
            snapshot: what it said; ignored if nobody declared that breaker.
            asked: the mark of :meth:`asking` from before the question; None for an unasked message.
        """
        with self._lock:
            standing = self._standings.get(snapshot.name) or self._met(snapshot.name)
            if standing is None or not _is_news(standing, snapshot, asked):
                return False
            differs = not standing.known or _essence(standing.snapshot) != _essence(snapshot)
            self._take(standing, snapshot)
            if differs and self._shared is not None and self.signal is None:
                self.seen += 1
                self._shared[0] = self.seen
            return differs

    def _met(self, name: str) -> Standing | None:
        """Declare a child that somebody else has told of; pool processes learn of it through their main process."""
        parent = self._standings.get(parent_of(name) or "")
        if parent is None:
            return None
        standing = self._standings[name] = Standing(replace(parent.spec, name=name), self.clock)
        self._strangers.add(name)
        return standing

    def _take(self, standing: Standing, snapshot: Snapshot) -> None:
        now = self.clock()
        self._server_offset = snapshot.now - now
        self._marks += 1
        standing.mark = self._marks
        standing.hear(snapshot, now)
        standing.known = True

    def refresh(self) -> None:
        """Read all declared breakers in one round trip, and their hot children in another if there are any.

        Children that are plainly CLOSED are not read: there may be thousands. Nor are those remembered that nobody
        has used here: over the weeks there may be millions.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        snapshots = self.look(*(standing.spec for standing in self.standings() if parent_of(standing.name) is None))
        former = self._hot
        self._hot = frozenset(f"{each.name}:{key}" for each in snapshots for key in each.hot_children)
        names = self._next_in_turn(sorted(self._hot | former))
        specs = [replace(self._standings[str(parent_of(name))].spec, name=name) for name in names]
        self.look(*specs)
        self._forget_strangers(self._hot | former)

    def _forget_strangers(self, but: frozenset[str]) -> None:
        with self._lock:
            gone = self._strangers - but
            self._strangers -= gone
            for name in gone:
                del self._standings[name]
        for name in gone:
            self.on_forgotten(name)

    def _next_in_turn(self, names: list[str]) -> list[str]:
        """Return those to read now, of many some after the other."""
        if len(names) <= MOST_AT_ONCE:
            return names
        start = bisect_right(names, self._looked_at)
        chosen = (names[start:] + names[:start])[:MOST_AT_ONCE]
        self._looked_at = chosen[-1]
        return chosen

    def look(self, *specs: Spec) -> list[Snapshot]:
        """Read some breakers in one round trip.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        if not specs:
            return []
        asked = self.asking()
        snapshots = self._store.read(specs)
        for snapshot in snapshots:
            self.update(snapshot, asked)
            self.look_for_room(snapshot)
        return snapshots

    def look_for_room(self, snapshot: Snapshot) -> None:
        """Tell if tasks wait for a slot and there is one. Not after each denial: it might go on for ever."""
        if snapshot.deferred and snapshot.concurrency_limit is not None and snapshot.has_room:
            self.on_room()

    # --- a process that follows -------------------------------------------------------------------

    def follow(self) -> None:
        """Keep the view fresh from now on, in one daemon thread. Does nothing in a child, or twice."""
        with self._lock:
            if self.signal is None:
                self._follower.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Stop following, waiting at most ``timeout`` seconds for the thread."""
        self._follower.stop(timeout)

    # --- a child of a prefork pool ----------------------------------------------------------------

    def share(self) -> None:
        """Allocate the memory that children will watch. Called in the main process, before it forks."""
        if self._shared is None:
            self._shared = memoryview(mmap.mmap(-1, 8)).cast("Q")
            self._shared[0] = self.seen

    def become_child(self) -> None:
        """Watch the main process instead of the store. Called in each child; needs :meth:`share` before the fork.

        Without shared memory the process follows for itself on first use.
        """
        if self._shared is not None:
            self.signal = self._shared
        elif self._standings:
            self.signal = _never_seen
            self.seen = 0

    @property
    def is_behind(self) -> bool:
        """Whether the main process has heard of a change since this copy was made."""
        return self.signal is not None and self.signal[0] != self.seen

    def catch_up(self) -> None:
        """Reread the store if :attr:`is_behind`."""
        signal = self.signal
        if signal is None or signal[0] == self.seen:
            return
        if signal is _never_seen:
            self.signal = None
            self.follow()
        elif self.clock() >= self._retry_at and self._rereading.acquire(blocking=False):
            try:
                self._reread(signal)
            finally:
                self._rereading.release()

    def _reread(self, signal: memoryview) -> None:
        changes = signal[0]
        try:
            self.refresh()
        except StoreError as error:
            logger.debug("a change was announced but cannot be read: %s", error)
            self._retry_at = self.clock() + POLL_INTERVAL
            return
        # A FailoverStore answers by its local breakers while the shared store is away: that is no news.
        if getattr(self._store, "away", False):
            self._retry_at = self.clock() + POLL_INTERVAL
        else:
            self.seen = changes

    def after_fork(self) -> None:
        """Go on in the child with what the parent knew."""
        follows = self._follower.has_begun
        self._begin()
        if self.signal is None and (follows or self._shared is not None):
            self.become_child()


def _nobody_cares(*_: object) -> None:
    """Do nothing with the news."""


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


_never_seen = memoryview(bytearray(8)).cast("Q")  # differs from every count that a view has seen
_never_seen[0] = 2**64 - 1
