"""``Standing``: one breaker as this process sees it, and the outcomes about it that wait to be sent."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

from resilient_tasks.core.model import ADMITTING, Calls, Snapshot, State
from resilient_tasks.core.rules import ramp_share
from resilient_tasks.store.base import Spec

DENIAL_MEMORY = 1.0  # seconds for which a denied permit is not asked for again, unless something has moved

# What waits to be reported about one breaker: epoch, call, cause, Retry-After; the bare epoch stands for a success,
# the commonest thing by far.
Occurrence = tuple[int, Calls, str, float | None]
_MOST_PENDING = 1_000_000
_NEVER_DENIED = (-1, -math.inf)


class Standing:
    """One breaker as this process sees it. Read without locks; written by its ``View`` only, but for what is pending.

    Attributes:
        spec: the breaker as this process declares it.
        snapshot: what the store last said; CLOSED with epoch 0 before it said anything.
        known: the store has said something.
        admits: calls are admitted, where they are limited with a slot: CLOSED, DISABLED or SHADOW.
        admits_freely: and they need not even ask the store, because there is no limit.
        epoch: of ``snapshot``; the outcome of a call belongs to the epoch that admitted it.
        counts: of changes, which another process writes; see :meth:`watch`.
        deadline: on the view's clock, when trials may begin: -inf at once, +inf only by an operator.
        pending: outcomes that the ``Reporter`` has not sent yet.
        scheduled: the ``Reporter`` knows that something is pending; it is to be sent at ``due_at``, or if ``urgent``
            at once.
    """

    __slots__ = (
        "_clock", "_denied", "_heard_at", "_place", "admits", "admits_freely", "counts", "deadline", "due_at", "epoch",
        "known", "mark", "pending", "scheduled", "seen", "snapshot", "spec", "urgent",
    )  # fmt: skip

    def __init__(self, spec: Spec, clock: Callable[[], float]) -> None:
        self.spec = spec
        self._clock = clock
        self.known = False
        self.mark = 0  # the view's count of updates when this one was made
        self.pending: deque[int | Occurrence] = deque(maxlen=_MOST_PENDING)
        self.scheduled = self.urgent = False
        self.due_at = -math.inf
        self._denied = _NEVER_DENIED
        self.seen = 0  # that count when this copy was made
        self.watch(None, 0)
        self.hear(Snapshot(spec.name, State.CLOSED, epoch=0, version=0, now=0.0, since=0.0), -math.inf)

    @property
    def name(self) -> str:
        """Name of the breaker."""
        return self.spec.name

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

    def hear(self, snapshot: Snapshot, now: float) -> None:
        """Take over what the store said at ``now`` on the view's clock."""
        self.snapshot = snapshot
        self._heard_at = now
        self.deadline = self._deadline(snapshot)
        self.epoch = snapshot.epoch  # before ``admits``: a call admitted by this news belongs to this epoch
        self.admits = snapshot.state in ADMITTING
        self.admits_freely = self.admits and not self._is_limited(snapshot)

    def _is_limited(self, snapshot: Snapshot) -> bool:
        if snapshot.epoch == 0:  # the store has said nothing yet
            return self.spec.policy.most_in_flight is not None
        return snapshot.concurrency_limit is not None

    def _deadline(self, snapshot: Snapshot) -> float:
        if snapshot.state is State.FORCED_OPEN:
            return math.inf
        return -math.inf if snapshot.open_until is None else self._heard_at + snapshot.open_until - snapshot.now

    @property
    def age(self) -> float | None:
        """Seconds since the store said this; None if it never said anything."""
        return self._clock() - self._heard_at if self.known else None

    @property
    def retry_after(self) -> float | None:
        """Seconds until a call may be admitted again; None when only an operator can tell."""
        if self.deadline == math.inf:
            return None
        return max(0.0, max(self.deadline, self._denied_until()) - self._clock())

    @property
    def refuses(self) -> bool:
        """Whether a call is refused without asking the store: not yet time, or denied a moment ago."""
        if self.admits:
            return False
        return self._clock() < max(self.deadline, self._denied_until())

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
        return min(1.0, ramp_share(max(0.0, elapsed), ramp))
