"""What every store can do. Each decision is one atomic step on the store's own clock.

``RedisStore`` runs a Lua script per method, ``LocalStore`` runs ``core/machine.py``; one contract
suite holds both to the same behaviour. Jitter is an argument (a share from 0.0 up to 1.0) so that
no store needs a random source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from resilient_tasks.core.model import Answer, Calls, Grant, Outcome, Snapshot, Verb
from resilient_tasks.core.names import parent_of
from resilient_tasks.core.record import Rules
from resilient_tasks.policy import BreakerPolicy


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
        return Rules.of(self.policy, self.revision, self.in_a_row)


@dataclass(frozen=True, slots=True)
class Evidence:
    """Outcomes of calls admitted in one epoch, in order.

    Args:
        epoch: the breaker's epoch when the calls were admitted; reports of another epoch are dropped.
        runs: run-length encoded outcomes, oldest first.
        cause: what the last failure was, for the transition's reason (a type's name, never its text).
        retry_after: longest ``Retry-After`` among the failures, seconds.
        causes: what all failures were, with how many of each; for the history alone.
    """

    epoch: int
    runs: tuple[Calls, ...]
    cause: str = ""
    retry_after: float | None = None
    causes: tuple[tuple[str, int], ...] = ()


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
        """Do what time has made due: expired permits become failures, OPEN becomes HALF_OPEN."""

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb. A verb that leads to the present state makes no transition."""

    # --- children -------------------------------------------------------------------------------

    def enroll(self, spec: Spec) -> bool:
        """Return whether there is room for a child among its policy's ``max_keys``; idle ones make room."""

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        """Return the names of the children of a breaker, those used longest ago first: all, or so many of them."""

    def cool(self, spec: Spec) -> bool:
        """Take a child off the parent's hot ones, if it is plainly CLOSED and nothing waits for it."""

    # --- health checks --------------------------------------------------------------------------

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        """Return whether it is the caller who makes a health check; False if somebody has begun one since.

        ``since`` is an instant on the store's clock.
        """

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

        The first None comes as soon as it listens: whoever reads all breakers then misses nothing.
        Used by one thread. Lost messages are possible; a regular :meth:`read` makes up for them.
        """

    def check(self) -> None:
        """Find at start-up a server that is no store at all; one that is away is nobody's mistake.

        Raises:
            ConfigurationError: something else answers at the store's address.
        """

    def close(self) -> None:
        """Close connections. The store may be used again and reconnects."""
