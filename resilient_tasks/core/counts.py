"""What is counted about a breaker beside its window: kinds of counts, and a bundle of them to read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from resilient_tasks.core.model import Outcome, State

TRIALS = "trials"
REFUSED = "refused"
DEFERRED = "deferred"
DEFERRED_AGAIN = "deferred_again"
RESUMED = "resumed"
FAILED = "failed"
DEAD = "dead"
EXPIRED = "expired"
REVOKED = "revoked"
DROPPED = "dropped"
COALESCED = "coalesced"
REDELIVERED = "redelivered"
CACHED_AGE = "cached_age_ms"
SUSPECTED = "suspected"
SPARE_SLOTS = "spare_slots"

#: Prefixes of kinds that carry a name: of a fallback's source, of a failure's cause, of the state that was entered, of
#: an exception that no rule knows.
FALLBACK, CAUSE, ENTERED, UNDECIDED = "fallback:", "cause:", "entered:", "undecided:"

#: Kinds of which the highest value is kept and not the sum, ms.
LONGEST_WAIT = "longest_wait"
OLDEST_ANSWER = "oldest_answer"


@dataclass(frozen=True, slots=True)
class Counts:
    """What was counted about one breaker in some span of time. What did not happen is 0, or missing in a mapping.

    Args:
        calls: guarded calls by outcome (``SUCCESS``, ``FAILURE``, ``SLOW``), trials included.
        causes: failures by what they were, e.g. ``{"ReadTimeout": 3}``; rare ones as ``"other"``. Not kept for ever.
        trials: calls made under a permit.
        refused: calls that the breaker refused, of tasks and of guards.
        deferred: tasks put aside for the first time.
        deferred_again: deferrals of tasks that had been resumed before.
        resumed: tasks sent back to their queues.
        fallbacks: answers of fallbacks by source.
        cached_age: sum of the ages of all answers of ``cached(...)``, s.
        failed: tasks that have failed for good, by a refusal or through the dependency.
        dead: tasks that went to the dead-letter queue.
        expired: those of them that had waited too long, by ``defer_for`` or ``expires``.
        revoked: tasks that were revoked while they waited.
        dropped: waiting tasks that somebody dropped.
        coalesced: waiting tasks that a later one with the same key has replaced.
        redelivered: tasks that the broker delivered again: some may have run twice.
        suspected: how often it became suspect in a worker, because a call was late.
        spare_slots: pool slots that workers have added because of its late calls.
        entered: transitions by the state that was entered.
        undecided: exceptions that ended guarded calls and are not counted, because no rule knows them, by type.
    """

    calls: Mapping[Outcome, int] = field(default_factory=dict)
    causes: Mapping[str, int] = field(default_factory=dict)
    trials: int = 0
    refused: int = 0
    deferred: int = 0
    deferred_again: int = 0
    resumed: int = 0
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    cached_age: float = 0.0
    failed: int = 0
    dead: int = 0
    expired: int = 0
    revoked: int = 0
    dropped: int = 0
    coalesced: int = 0
    redelivered: int = 0
    suspected: int = 0
    spare_slots: int = 0
    entered: Mapping[State, int] = field(default_factory=dict)
    undecided: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, counted: Mapping[str, int]) -> Counts:
        """Return the bundle of ``counted``, by kind."""
        return cls(
            calls={outcome: counted[outcome] for outcome in Outcome if outcome in counted},
            causes=_named(counted, CAUSE),
            fallbacks=_named(counted, FALLBACK),
            cached_age=counted.get(CACHED_AGE, 0) / 1000,
            entered={State(name): count for name, count in _named(counted, ENTERED).items()},
            undecided=_named(counted, UNDECIDED),
            **{kind: counted.get(kind, 0) for kind in _PLAIN},
        )


_PLAIN = (
    TRIALS, REFUSED, DEFERRED, DEFERRED_AGAIN, RESUMED, FAILED, DEAD, EXPIRED, REVOKED, DROPPED, COALESCED,
    REDELIVERED, SUSPECTED, SPARE_SLOTS,
)  # fmt: skip


def _named(counted: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {kind.removeprefix(prefix): count for kind, count in counted.items() if kind.startswith(prefix)}


@dataclass(slots=True)
class Tally:
    """What was counted about one breaker: sums and peaks by kind."""

    counts: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)

    def merge(self, other: Tally) -> None:
        """Add another one."""
        self.counts.update(other.counts)
        self.peaks.update({kind: max(value, self.peaks.get(kind, 0)) for kind, value in other.peaks.items()})
