"""What every store can do.

A store has a few atomic primitives on its own clock: it counts, leases, and makes a change if the breaker is still as
it was seen. :class:`RuledStore` is what the shared store and the one in memory have in common: what they answer is
decided on by ``core/rules.py``, in one place. Jitter is an argument (a share from 0.0 up to 1.0) so that no store needs
a random source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

from resilient_tasks.core.model import (
    ADMITTING,
    Answer,
    Calls,
    Grant,
    Outcome,
    Snapshot,
    State,
    Transition,
    Verb,
    parent_of,
)
from resilient_tasks.core.rules import Change, Rules, Seen, brief, command, decide, to_ms
from resilient_tasks.policy import BreakerPolicy

IDLE_AFTER = 3_600_000  # ms; a child unused for so long may be forgotten


@dataclass(frozen=True, slots=True)
class Spec:
    """A breaker as a process declares it.

    ``revision`` orders declarations of one name across a rolling deploy: the store keeps the policy
    with the highest revision and every decision follows that one. ``in_a_row``, if a probe asks for it, is the
    number of trials, of which none may fail, that replaces what the policy says of trials.
    """

    name: str
    policy: BreakerPolicy = field(default_factory=BreakerPolicy)
    revision: int = 0
    in_a_row: int | None = None

    @property
    def parent(self) -> Spec | None:
        """The parent of a child, which has the same policy; None if the breaker is no child."""
        parent = parent_of(self.name)
        return None if parent is None else replace(self, name=parent)

    def rules(self) -> Rules:
        """Return what decisions follow."""
        return _rules(self.policy, self.revision, self.in_a_row)


_rules = lru_cache(maxsize=10_000)(Rules.from_policy)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Outcomes of calls admitted in one epoch, in order."""

    epoch: int  # the breaker's epoch when the calls were admitted; reports of another epoch are dropped
    runs: tuple[Calls, ...]  # run-length encoded outcomes, oldest first
    cause: str = ""  # what the last failure was, for the transition's reason (a type's name, never its text)
    retry_after: float | None = None  # longest ``Retry-After`` among the failures, seconds


class Store(Protocol):
    """Shared state of all breakers of one namespace.

    Every method may raise :class:`~resilient_tasks.errors.StoreError`, within the store's time limit.
    """

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers in one round trip, changing nothing. A breaker never seen before is CLOSED."""

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        """Ask to make one call.

        CLOSED, DISABLED and SHADOW admit without a permit. OPEN whose time is over becomes HALF_OPEN.
        HALF_OPEN grants at most ``trial_calls`` permits, to ``holder`` for ``lease`` seconds; asking
        again with a live permit renews it. Where calls in flight are limited, CLOSED and HALF_OPEN admit
        only with a slot, leased alike. A denial writes nothing that could lengthen anyone's lease.
        """

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        """Lengthen live permits and slots to ``lease`` seconds from now. False: it is no longer held."""

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count outcomes of calls that needed no permit; open the breaker if that trips it."""

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count the outcome of a call, and free its permit and its slot. Without either it changes nothing.

        OVERDUE counts a call that is still in flight, and leaves it both. ``evidence`` gives epoch, cause and
        retry_after; its ``runs`` may hold the call with its voter.
        """

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        """Make the change that is due: OPEN becomes HALF_OPEN, trials or evidence decide."""

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb. A verb that leads to the present state makes no transition."""

    # --- children -------------------------------------------------------------------------------

    def register(self, spec: Spec) -> Snapshot | None:
        """Return a child, if there is room for it among its policy's ``max_keys``; idle ones make room."""

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        """Return the names of the children of a breaker, those used longest ago first: all, or so many of them."""

    def active_children(self, name: str, *, start: int = 0, count: int = 500) -> list[str]:
        """Return the names of children that are not plainly CLOSED, or that tasks wait for; skips ``start``."""

    def mark_idle(self, spec: Spec) -> bool:
        """Take a child off the active ones, if it is plainly CLOSED and nothing waits for it."""

    # --- health checks --------------------------------------------------------------------------

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        """Return whether the caller makes a health check; False if one has begun ``since``, on the store's clock."""

    def report_health_check(
        self, spec: Spec, outcome: Outcome, evidence: Evidence, *, limit: int, jitter: float = 0.0
    ) -> Answer:
        """Count a health check made while CLOSED or SHADOW; ``limit`` failures in a row open the breaker.

        ``evidence`` gives epoch, cause and retry_after; its ``runs`` are not used.
        """

    # --- small values ---------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds under ``(kind, key)``, with the time of writing."""

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        """Return ``(value, age in seconds)``, or None."""

    # --- changes ------------------------------------------------------------------------------------

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        """Yield states as others change them, None whenever ``timeout`` seconds pass in silence.

        The first None comes as soon as it listens: a caller that reads all breakers then misses nothing.
        Used by one thread. Lost messages are possible; a regular :meth:`read` makes up for them.
        """

    def changed(self, since: float) -> dict[str, float]:
        """Return breakers that were changed, or for which tasks were deferred, at ``since`` or later: name -> when.

        On the store's clock in seconds; for at least a minute. What :meth:`changes` has lost is found here.
        """

    def check(self) -> None:
        """Raise ``ConfigurationError`` if something else answers at the store's address; not if it is unavailable."""

    def close(self) -> None:
        """Close connections. The store may be used again and reconnects."""


class RuledStore(ABC):
    """A store's primitives, and what is decided on their answers."""

    @abstractmethod
    def _look(self, spec: Spec) -> Seen:
        """Look at a breaker, which comes into being if it is unknown."""

    @abstractmethod
    def _count(self, spec: Spec, epoch: int, runs: Sequence[Calls], check: tuple[Outcome, int] | None = None) -> Seen:
        """Count calls, and a health check of which so many failures in a row open the breaker."""

    @abstractmethod
    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        """Return whether ``holder`` has got what it takes to make a call."""

    @abstractmethod
    def _settle(self, spec: Spec, holder: str, epoch: int, outcome: Outcome) -> tuple[Seen, bool]:
        """Give back what ``holder`` has; return whether it had a slot."""

    @abstractmethod
    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        """Make a change; return whether it was made, because the breaker was still as it was seen."""

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        seen, granted = self._lease(spec, holder, to_ms(lease))
        answer = self._decide(spec, seen, jitter=jitter)
        if answer.snapshot.epoch != seen.epoch:  # it has just become HALF_OPEN, or OPEN
            seen, granted = self._lease(spec, holder, to_ms(lease))
            answer = Answer(seen.snapshot(), answer.transition)
        state = answer.snapshot.state
        admitted = granted and (state in ADMITTING or state is State.HALF_OPEN)
        return Grant(admitted, admitted and state is State.HALF_OPEN, answer.snapshot, answer.transition)

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        return self._decide(spec, self._count(spec, evidence.epoch, evidence.runs), evidence, jitter)

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        seen, had_slot = self._settle(spec, holder, evidence.epoch, outcome)
        if had_slot and outcome is not Outcome.IGNORED:
            seen = self._count(spec, evidence.epoch, evidence.runs or (Calls(outcome),))
        return self._decide(spec, seen, evidence, jitter)

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        return self._decide(spec, self._look(spec), jitter=jitter)

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        seen = self._look(spec)
        while not to_ms(since) <= seen.checked_at <= seen.now:  # later than now: on a clock that was ahead
            seen, made = self._change(spec, seen, seen.quietly(checked_at=seen.now))
            if made:
                return True
        return False

    def report_health_check(
        self, spec: Spec, outcome: Outcome, evidence: Evidence, *, limit: int, jitter: float = 0.0
    ) -> Answer:
        return self._decide(spec, self._count(spec, evidence.epoch, (), (outcome, limit)), evidence, jitter)

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        seen = self._look(spec)
        while change := command(seen, verb, brief(reason), brief(actor), jitter):
            seen, made = self._change(spec, seen, change)
            if made:
                return Answer(seen.snapshot(), change.transition)
        return Answer(seen.snapshot())

    def _decide(self, spec: Spec, seen: Seen, evidence: Evidence | None = None, jitter: float = 0.0) -> Answer:
        """Make the change that the rules ask for; of all callers that see the same, one makes it."""
        cause, retry_after = ("", None) if evidence is None else (brief(evidence.cause), evidence.retry_after)
        transition: Transition | None = None
        while change := decide(seen, cause, None if retry_after is None else to_ms(retry_after), jitter):
            version = seen.version
            seen, made = self._change(spec, seen, change)
            if made:
                transition = change.transition
            if made or seen.version == version:  # no room among max_open_ratio
                break
        return Answer(seen.snapshot(), transition)
