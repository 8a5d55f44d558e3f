"""``Story``: what has happened to the breakers, and what can be said of when it will be over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.outage import Deadlines, Estimate, Outage, estimate, learned_rate
from resilient_tasks.monitor.words import duration, moment
from resilient_tasks.store.history import History

Row = tuple[str, str]
_T = TypeVar("_T")


class Story:
    """Outages of a fleet's breakers and estimates of their ends, read from the store.

    Every method may raise :class:`~resilient_tasks.errors.StoreError`, within the store's time limit.

    Args:
        history: what has become of the breakers.
    """

    def __init__(self, history: History) -> None:
        self._history = history

    def outages(self, names: Iterable[str], *, since: float = 0.0) -> list[Outage]:
        """Return the outages of some breakers, the newest first; see :meth:`History.outages`."""
        return self._history.outages(names, since=since)

    def estimates(self, snapshots: Sequence[Snapshot]) -> dict[str, Estimate]:
        """Estimate when the waiting tasks of breakers will be done, by breaker; of those that have any."""
        names = [snapshot.name for snapshot in snapshots if snapshot.deferred]
        if not names:
            return {}
        speeds, deadlines = self._history.speeds(names), self._history.deadlines(names)
        outages: dict[str, list[Outage]] = {name: [] for name in names}
        for outage in self._history.outages(names):
            outages[outage.breaker].append(outage)

        def told(snapshot: Snapshot) -> Estimate:
            rate = learned_rate(snapshot, outages[snapshot.name], speeds[snapshot.name])
            return estimate(snapshot, rate, deadlines.get(snapshot.name, Deadlines()))

        return {snapshot.name: told(snapshot) for snapshot in snapshots if snapshot.deferred}


def in_words(told: Estimate) -> str:
    """Return an estimate as a sentence: ``41,200 waiting, oldest 3 h 12 min, done in about 38 min ...``."""
    parts = [f"{told.waiting:,} waiting"]
    if told.oldest_wait is not None:
        parts.append(f"oldest {duration(told.oldest_wait)}")
    if told.done_in is None:
        parts.append("when they will be done is unknown")
    else:
        parts.append(f"done in about {duration(told.done_in)} at the learned rate")
    sentence = ", ".join(parts)
    if told.late:
        sentence += f"; {told.late:,} will miss {'its' if told.late == 1 else 'their'} deadline"
    return f"{sentence}."


def rows_of(outage: Outage, estimate: Estimate | None) -> list[Row]:
    """Return what there is to tell of an outage, in words; ``estimate``: of its breaker, if tasks wait."""
    counts = outage.counts
    rows = (
        ("opened", moment(outage.opened)),
        ("closed", _with(outage.closed, lambda at: f"{moment(at)}, after {duration(at - outage.opened)}") or "not yet"),
        ("drained", _drained(outage)),
        ("outlook", in_words(estimate) if estimate and outage.drained is None else ""),
        ("reason", outage.reason),
        ("by", outage.actor),
        ("openings", str(outage.openings)),
        ("causes", ", ".join(f"{cause} {count}" for cause, count in outage.causes)),
        ("calls that failed", str(outage.failed_calls)),
        ("calls avoided", str(counts.refused)),
        ("tasks deferred", str(counts.deferred)),
        ("tasks resumed", str(counts.resumed)),
        ("served from fallback", ", ".join(f"{source} {count}" for source, count in counts.fallbacks.items())),
        ("how stale", _stale(outage)),
        ("tasks failed", str(counts.failed)),
        ("dead-lettered", f"{counts.dead}, {counts.expired} of them expired" if counts.expired else str(counts.dead)),
        ("revoked or dropped", str(counts.revoked + counts.dropped)),
        ("replaced by a later one", str(counts.coalesced)),
        ("longest wait", duration(outage.longest_wait)),
        ("delivered again", str(counts.redelivered)),
    )
    return [row for row in rows if row[1]]


def _with(value: _T | None, words: Callable[[_T], str]) -> str:
    return "" if value is None else words(value)


def _drained(outage: Outage) -> str:
    if outage.closed is None or outage.drained is None:
        return "not yet"
    words = f"{moment(outage.drained)}, {duration(outage.drained - outage.closed)} after it closed"
    return words + _with(outage.drain_rate, lambda rate: f", {rate:,.1f} tasks/s")


def _stale(outage: Outage) -> str:
    if outage.oldest_answer is None:
        return ""
    average = _with(outage.average_answer_age, lambda age: f", {duration(age)} on average")
    return f"{duration(outage.oldest_answer)} at most{average}"
