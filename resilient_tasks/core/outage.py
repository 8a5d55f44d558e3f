"""What is remembered of a breaker: counts by kind, outages, and when a lasting outage may end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from resilient_tasks.core.model import ADMITTING, Outcome, Snapshot, State

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
    """What was counted about one breaker in some span of time. What did not happen is 0, or missing in a mapping."""

    # guarded calls by outcome (``SUCCESS``, ``FAILURE``, ``SLOW``), trials included
    calls: Mapping[Outcome, int] = field(default_factory=dict)
    # failures by what they were, e.g. ``{"ReadTimeout": 3}``; rare ones as ``"other"``. Not kept for ever
    causes: Mapping[str, int] = field(default_factory=dict)
    trials: int = 0  # calls made under a permit
    refused: int = 0  # calls that the breaker refused, of tasks and of guards
    deferred: int = 0  # tasks deferred for the first time
    deferred_again: int = 0  # deferrals of tasks that had been resumed before
    resumed: int = 0  # tasks sent back to their queues
    fallbacks: Mapping[str, int] = field(default_factory=dict)  # answers of fallbacks by source
    cached_age: float = 0.0  # sum of the ages of all answers of ``cached(...)``, s
    failed: int = 0  # tasks that have failed for good, by a refusal or through the dependency
    dead: int = 0  # tasks that went to the dead-letter queue
    expired: int = 0  # those of them that had waited too long, by ``defer_for`` or ``expires``
    revoked: int = 0  # tasks that were revoked while they waited
    dropped: int = 0  # waiting tasks that an operator dropped
    coalesced: int = 0  # waiting tasks that a later one with the same key has replaced
    redelivered: int = 0  # tasks that the broker delivered again: some may have run twice
    suspected: int = 0  # how often it became suspect in a worker, because a call was late
    spare_slots: int = 0  # pool slots that workers have added because of its late calls
    entered: Mapping[State, int] = field(default_factory=dict)  # transitions by the state that was entered
    # exceptions that ended guarded calls and are not counted, because no rule knows them, by type
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


_PLAIN = [each.name for each in fields(Counts) if each.default == 0 and each.name != "cached_age"]


def _named(counted: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {kind.removeprefix(prefix): count for kind, count in counted.items() if kind.startswith(prefix)}


@dataclass(slots=True)
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)

    def merge(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.peaks.update({kind: max(value, self.peaks.get(kind, 0)) for kind, value in other.peaks.items()})


#: A rate is learned from at least so many tasks, and seconds.
_FEWEST_RESUMED, _SHORTEST_DRAIN = 10, 1.0
_SLOW_START = 10.0  # seconds in which tasks return slowly at first, which says nothing
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Outage:
    """The time from the first refusal until calls are admitted again and no task waits any more.

    Times are seconds since the epoch on the store's clock.
    """

    breaker: str  # its name
    opened: float  # when it began to refuse
    closed: float | None  # when it admitted again; None while it refuses
    drained: float | None  # when the last waiting task was gone; None while some wait
    reason: str  # why it opened
    actor: str  # who opened it; "" for the rules
    openings: int  # how many times it opened, failed trials among them
    counts: Counts  # what was counted meanwhile, the calls that tripped it and the tasks that already waited included
    longest_wait: float  # of a task that was resumed, s
    oldest_answer: float | None  # age of the stalest answer of ``cached(...)``, s; None if there was none

    @classmethod
    def of(cls, breaker: str, kept: Mapping[str, str]) -> Outage:
        """Return what the store keeps as a hash; times in it are ms."""
        counted = {name: int(value) for name, value in kept.items() if name not in ("reason", "actor")}
        seconds = {name: counted[name] / 1000 for name in _TIMES if name in counted}
        return cls(
            breaker=breaker,
            opened=seconds["opened"],
            closed=seconds.get("closed"),
            drained=seconds.get("drained"),
            reason=kept["reason"],
            actor=kept["actor"],
            openings=counted["openings"],
            counts=Counts.of(counted),
            longest_wait=seconds.get(LONGEST_WAIT, 0.0),
            oldest_answer=seconds.get(OLDEST_ANSWER),
        )

    @property
    def failed_calls(self) -> int:
        return self.counts.calls.get(Outcome.FAILURE, 0)

    @property
    def causes(self) -> list[tuple[str, int]]:
        """What the failures were, the commonest first."""
        return sorted(self.counts.causes.items(), key=lambda cause: -cause[1])

    @property
    def average_answer_age(self) -> float | None:
        """Average age of the answers of ``cached(...)``, s; None if there was none."""
        cached = self.counts.fallbacks.get("cached", 0)
        return self.counts.cached_age / cached if cached else None

    @property
    def drain_rate(self) -> float | None:
        """Tasks per second that went back to work for good after it closed; None if too few did, or it goes on."""
        if self.closed is None or self.drained is None:
            return None
        tasks = self.counts.resumed - self.counts.deferred_again
        return None if tasks < _FEWEST_RESUMED else tasks / max(self.drained - self.closed, _SHORTEST_DRAIN)


_TIMES = ("opened", "closed", "drained", LONGEST_WAIT, OLDEST_ANSWER)


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Ends of the waits of those tasks that have one."""

    count: int = 0  # how many there are
    # some of them at equal distances, the earliest first, seconds since the epoch on the store's clock
    sample: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What can be said of when the tasks that wait will be done."""

    breaker: str  # its name
    waiting: int  # tasks that wait
    oldest_wait: float | None  # how long the first has waited, s; None if none waits
    rate: float | None  # the learned rate, tasks/s; None if there is none
    # seconds until the last is resumed, if the breaker heals with its next trial; None: unknown
    done_in: float | None
    late: int | None  # about how many will be over their deadline by then; None: unknown


def estimate(snapshot: Snapshot, rate: float | None, deadlines: Deadlines) -> Estimate:
    """Estimate when the tasks that wait for a breaker will be done, if ``rate`` tasks/s are resumed."""
    oldest = snapshot.oldest_deferred_at
    start = 0.0 if snapshot.state in ADMITTING else snapshot.retry_after
    done_in = late = None
    if rate and start is not None:
        done_in, late = start + snapshot.deferred / rate, 0
        if deadlines.sample:  # tasks leave in the order in which they came, and so, about, do their deadlines
            size, began = len(deadlines.sample), snapshot.now + start
            step = snapshot.deferred / size / rate
            missed = sum(end < began + number * step for number, end in enumerate(deadlines.sample, start=1))
            late = round(deadlines.count * missed / size)
    return Estimate(
        breaker=snapshot.name,
        waiting=snapshot.deferred,
        oldest_wait=None if oldest is None else max(0.0, snapshot.now - oldest),
        rate=rate,
        done_in=done_in,
        late=late,
    )


def learned_rate(snapshot: Snapshot, outages: Sequence[Outage], resumed: int) -> float | None:
    """Return the rate at which tasks are resumed, tasks/s; None if there is nothing to learn it from.

    ``outages`` are the latest ones, the newest first; so many were ``resumed`` for good in this minute and the last.
    """
    former = next((rate for outage in outages if (rate := outage.drain_rate) is not None), None)
    admitted_for = snapshot.now - snapshot.since
    if snapshot.state not in ADMITTING or admitted_for < _SLOW_START or resumed <= 0:
        return former
    return resumed / min(admitted_for, _MINUTE + snapshot.now % _MINUTE)
