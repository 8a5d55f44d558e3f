"""An outage as it is remembered, and what can be said of the end of one that lasts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resilient_tasks.core.counts import LONGEST_WAIT, OLDEST_ANSWER, Counts
from resilient_tasks.core.model import ADMITTING, Outcome, Snapshot

#: A rate is learned from at least so many tasks, and seconds.
_FEWEST_RESUMED, _SHORTEST_DRAIN = 10, 1.0
_SLOW_START = 10.0  # seconds in which tasks return slowly at first, which says nothing
_MINUTE = 60.0


@dataclass(frozen=True, slots=True)
class Outage:
    """The time from the first refusal until calls are admitted again and no task waits any more.

    Times are seconds since the epoch on the store's clock.

    Args:
        breaker: its name.
        opened: when it began to refuse.
        closed: when it admitted again; None while it refuses.
        drained: when the last waiting task was gone; None while some wait.
        reason: why it opened.
        actor: who opened it; "" for the rules.
        openings: how many times it opened, failed trials among them.
        counts: what was counted meanwhile, the calls that tripped it and the tasks that already waited included.
        longest_wait: of a task that was resumed, s.
        oldest_answer: age of the stalest answer of ``cached(...)``, s; None if there was none.
    """

    breaker: str
    opened: float
    closed: float | None
    drained: float | None
    reason: str
    actor: str
    openings: int
    counts: Counts
    longest_wait: float
    oldest_answer: float | None

    @classmethod
    def of(cls, breaker: str, kept: Mapping[str, str]) -> Outage:
        """Return what the store keeps as a hash."""
        counted = {name: int(value) for name, value in kept.items() if name not in _TEXTS}
        times = {name: counted[name] / 1000 if name in counted else None for name in ("closed", "drained")}
        oldest = counted.get(OLDEST_ANSWER)
        return cls(
            breaker=breaker,
            opened=counted["opened"] / 1000,
            reason=kept["reason"],
            actor=kept["actor"],
            openings=counted["openings"],
            counts=Counts.of(counted),
            longest_wait=counted.get(LONGEST_WAIT, 0) / 1000,
            oldest_answer=None if oldest is None else oldest / 1000,
            **times,
        )

    @property
    def failed_calls(self) -> int:
        """Calls that reached the dependency and failed."""
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
        return _rate(self.counts.resumed - self.counts.deferred_again, self.drained - self.closed)


_TEXTS = frozenset({"reason", "actor"})


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Ends of the waits of those tasks that have one.

    Args:
        count: how many there are.
        sample: some of them at equal distances, the earliest first, seconds since the epoch on the store's clock.
    """

    count: int = 0
    sample: Sequence[float] = ()


@dataclass(frozen=True, slots=True)
class Estimate:
    """What can be said of when the tasks that wait will be done.

    Args:
        breaker: its name.
        waiting: tasks that wait.
        oldest_wait: how long the first has waited, s; None if none waits.
        rate: the learned rate, tasks/s; None if there is none.
        done_in: seconds until the last is resumed, if the breaker heals with its next trial; None: unknown.
        late: about how many will be over their deadline by then; None: unknown.
    """

    breaker: str
    waiting: int
    oldest_wait: float | None
    rate: float | None
    done_in: float | None
    late: int | None


def estimate(snapshot: Snapshot, rate: float | None, deadlines: Deadlines) -> Estimate:
    """Estimate when the tasks that wait for a breaker will be done.

    Args:
        snapshot: the breaker now.
        rate: at which they are, or were the last time, resumed, tasks/s; None: not known.
        deadlines: of those that must not wait for ever.
    """
    oldest = snapshot.oldest_deferred_at
    start = 0.0 if snapshot.state in ADMITTING else snapshot.retry_after
    known = rate is not None and start is not None
    return Estimate(
        breaker=snapshot.name,
        waiting=snapshot.deferred,
        oldest_wait=None if oldest is None else max(0.0, snapshot.now - oldest),
        rate=rate,
        done_in=start + snapshot.deferred / rate if known and start is not None and rate else None,
        late=_late(snapshot, start or 0.0, rate, deadlines) if known and rate else None,
    )


def _late(snapshot: Snapshot, start: float, rate: float, deadlines: Deadlines) -> int:
    """Tasks leave in the order in which they came, and so, about, do their deadlines."""
    if not deadlines.sample:
        return 0
    step = snapshot.deferred / len(deadlines.sample)
    missed = sum(
        end < snapshot.now + start + number * step / rate for number, end in enumerate(deadlines.sample, start=1)
    )
    return round(deadlines.count * missed / len(deadlines.sample))


def learned_rate(snapshot: Snapshot, outages: Sequence[Outage], resumed: int) -> float | None:
    """Return the rate at which tasks are resumed, tasks/s; None if there is nothing to learn it from.

    Args:
        snapshot: the breaker now.
        outages: its latest ones, the newest first.
        resumed: tasks that were resumed for good in the present minute and the one before.
    """
    former = next((rate for outage in outages if (rate := outage.drain_rate) is not None), None)
    admitted_for = snapshot.now - snapshot.since
    if snapshot.state not in ADMITTING or admitted_for < _SLOW_START or resumed <= 0:
        return former
    return resumed / min(admitted_for, _MINUTE + snapshot.now % _MINUTE)


def _rate(tasks: int, seconds: float) -> float | None:
    if tasks < _FEWEST_RESUMED:
        return None
    return tasks / max(seconds, _SHORTEST_DRAIN)
