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
from collections import deque
from collections.abc import Callable

from resilient_tasks.core.model import Outcome, Snapshot, State
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.forking import renew_after_fork

logger = logging.getLogger(__name__)

POLL_INTERVAL = 0.5  # seconds between two reads of all states, and before a failed read is tried again
DENIAL_MEMORY = 1.0  # seconds for which a denied permit is not asked for again, unless something has moved
RAMP_START = 0.1  # share of tasks admitted at the beginning of a ramp

ADMITTING = frozenset({State.CLOSED, State.DISABLED, State.SHADOW})

# What waits to be reported about one breaker: the bare epoch stands for a success, the commonest thing by far.
Occurrence = tuple[int, Outcome, str, float | None]
_MOST_PENDING = 1_000_000


class Standing:
    """One breaker as this process sees it. Read without locks; written by its :class:`View` only.

    Attributes:
        spec: the breaker as this process declares it.
        snapshot: what the store last said; CLOSED with epoch 0 before it said anything.
        known: the store has said something.
        admits: calls need not ask the store: CLOSED, DISABLED or SHADOW.
        epoch: of ``snapshot``; the outcome of a call belongs to the epoch that admitted it.
        deadline: on the view's clock, when trials may begin: -inf at once, +inf only by an operator.
        pending: outcomes that the ``Reporter`` has not sent yet.
        scheduled: the ``Reporter`` knows that something is pending.
    """

    __slots__ = (
        "_clock", "_denied", "_heard_at", "admits", "deadline", "epoch",
        "known", "mark", "pending", "scheduled", "snapshot", "spec",
    )  # fmt: skip

    def __init__(self, spec: Spec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self._clock = clock
        self.known = False
        self.mark = 0  # the view's count of updates when this one was made
        self.pending: deque[int | Occurrence] = deque(maxlen=_MOST_PENDING)
        self.scheduled = False
        self._denied = (-1, -math.inf)
        self.hear(Snapshot(spec.name, State.CLOSED, epoch=0, version=0, now=0.0, since=0.0), -math.inf)

    @property
    def name(self) -> str:
        """Name of the breaker."""
        return self.spec.name

    def hear(self, snapshot: Snapshot, now: float) -> None:
        """Take over what the store said at ``now`` on the view's clock."""
        self.snapshot = snapshot
        self._heard_at = now
        self.deadline = self._deadline(snapshot)
        self.epoch = snapshot.epoch
        self.admits = snapshot.state in ADMITTING

    def _deadline(self, snapshot: Snapshot) -> float:
        if snapshot.state is State.FORCED_OPEN:
            return math.inf
        return -math.inf if snapshot.open_until is None else self._heard_at + snapshot.open_until - snapshot.now

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be admitted again; None when only an operator can tell."""
        if self.deadline == math.inf:
            return None
        return max(0.0, max(self.deadline, self._denied_until()) - self._clock())

    @property
    def trial_due(self) -> bool:
        """Whether the next call may be a trial, as far as time goes: HALF_OPEN, or OPEN and its time is over."""
        return not self.admits and self._clock() >= self.deadline

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
        if since is None or ramp <= 0 or self.snapshot.state is not State.CLOSED:
            return 1.0
        elapsed = self.snapshot.now - since + self._clock() - self._heard_at
        return min(1.0, RAMP_START + (1 - RAMP_START) * max(0.0, elapsed) / ramp)


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
        self._store = store
        self._standings: dict[str, Standing] = {}
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
        self._stopped = threading.Event()
        self._follower: threading.Thread | None = None

    # --- what is known --------------------------------------------------------------------------

    def declare(self, spec: Spec) -> Standing:
        """Add a breaker, or its new policy; without I/O. Return its standing, always the same object."""
        with self._lock:
            standing = self._standings.get(spec.name)
            if standing is None:
                standing = self._standings[spec.name] = Standing(spec, self.clock)
            standing.spec = spec
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
            standing = self._standings.get(snapshot.name)
            if standing is None or not _is_news(standing, snapshot, asked):
                return False
            differs = not standing.known or _essence(standing.snapshot) != _essence(snapshot)
            self._take(standing, snapshot)
            if differs and self._shared is not None and self.signal is None:
                self.seen += 1
                self._shared[0] = self.seen
            return differs

    def _take(self, standing: Standing, snapshot: Snapshot) -> None:
        now = self.clock()
        self._server_offset = snapshot.now - now
        self._marks += 1
        standing.mark = self._marks
        standing.hear(snapshot, now)
        standing.known = True

    def refresh(self) -> None:
        """Read all declared breakers in one round trip.

        Raises:
            StoreError: the store did not answer; the view is as it was.
        """
        specs = [standing.spec for standing in self.standings()]
        if not specs:
            return
        asked = self.asking()
        for snapshot in self._store.read(specs):
            self.update(snapshot, asked)

    # --- a process that follows -------------------------------------------------------------------

    def follow(self) -> None:
        """Keep the view fresh from now on, in one daemon thread. Does nothing in a child, or twice."""
        with self._lock:
            if self.signal is not None or (self._follower is not None and self._follower.is_alive()):
                return
            self._stopped.clear()
            self._follower = threading.Thread(target=self._follow, name="resilient-tasks-view", daemon=True)
            self._follower.start()

    def stop(self, timeout: float = 1.0) -> None:
        """Stop following, waiting at most ``timeout`` seconds for the thread."""
        self._stopped.set()
        follower = self._follower
        if follower is not None and follower is not threading.current_thread():
            follower.join(timeout)

    def _follow(self) -> None:
        stopped = self._stopped
        while not stopped.is_set():
            try:
                self._hear_changes(stopped)
            except StoreError as error:
                logger.debug("the view is stale: %s", error)
            except Exception:
                if not stopped.is_set():  # else the connection was closed under our feet
                    logger.exception("the view could not be refreshed; trying again")
            stopped.wait(POLL_INTERVAL)

    def _hear_changes(self, stopped: threading.Event) -> None:
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
        follows = self._follower is not None
        self._begin()
        if self.signal is None and (follows or self._shared is not None):
            self.become_child()


def _is_news(standing: Standing, snapshot: Snapshot, asked: int | None) -> bool:
    if not standing.known or (asked is not None and standing.mark <= asked):
        return True
    known = standing.snapshot
    return (snapshot.epoch, snapshot.version, snapshot.now) >= (known.epoch, known.version, known.now)


def _essence(snapshot: Snapshot) -> tuple[object, ...]:
    """Return what admission depends on: counts change with every report and concern no child."""
    return snapshot.epoch, snapshot.version, snapshot.state, snapshot.open_until, snapshot.ramp_since


_never_seen = memoryview(bytearray(8)).cast("Q")  # differs from every count that a view has seen
_never_seen[0] = 2**64 - 1
