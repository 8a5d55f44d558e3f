"""How outages, estimates, times and numbers are written for people: the command line and Flower's pages."""

from __future__ import annotations

from datetime import datetime, timezone

from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.outage import Estimate, Outage

Row = tuple[str, str]

_END_OF_CALENDAR = 253_000_000_000.0  # in the year 9987; datetime has no year 10,000
_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float | None) -> str:
    """Return a duration in its two largest units: ``3 h 12 min``; "" for None."""
    if seconds is None:
        return ""
    left = max(0, round(seconds))
    parts = []
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def moment(seconds: float | None) -> str:
    """Return a time in seconds since the epoch as ISO 8601, in local time; "" for None, or beyond the calendar."""
    if seconds is None or not 0 <= seconds < _END_OF_CALENDAR:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().isoformat(timespec="seconds")


def share(part: float, of: int) -> str:
    """Return a rate as a percentage; "" where nothing was counted."""
    return f"{part:.0%}" if of else ""


def evidence_of(snapshot: Snapshot) -> str:
    """Return how near a breaker is to opening, by failures or by slow calls: ``7 of 10``; "" without evidence."""
    score = round(max(snapshot.evidence, snapshot.slow_evidence) * snapshot.minimum_calls, 1)
    return f"{score:g} of {snapshot.minimum_calls}" if score else ""


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def in_words(estimate: Estimate) -> str:
    """Return an estimate as a sentence: ``41,200 waiting, oldest 3 h 12 min, done in about 38 min ...``."""
    parts = [f"{estimate.waiting:,} waiting"]
    if estimate.oldest_wait is not None:
        parts.append(f"oldest {duration(estimate.oldest_wait)}")
    if estimate.done_in is None:
        parts.append("when they will be done is unknown")
    else:
        parts.append(f"done in about {duration(estimate.done_in)} at the learned rate")
    sentence = ", ".join(parts)
    if estimate.late:
        sentence += f"; {estimate.late:,} will miss {'its' if estimate.late == 1 else 'their'} deadline"
    return f"{sentence}."


def rows_of(outage: Outage, estimate: Estimate | None) -> list[Row]:
    """Return what is known of an outage as names and values; ``estimate``: of its breaker, if tasks wait."""
    counts, closed, drained, oldest = outage.counts, outage.closed, outage.drained, outage.oldest_answer
    rate, average = outage.drain_rate, outage.average_answer_age
    after = f"{moment(drained)}, {duration(drained - closed)} after it closed" if closed and drained else "not yet"
    at_most = "" if oldest is None else f"{duration(oldest)} at most"
    rows = (
        ("opened", moment(outage.opened)),
        ("closed", f"{moment(closed)}, after {duration(closed - outage.opened)}" if closed else "not yet"),
        ("drained", after if rate is None else f"{after}, {rate:,.1f} tasks/s"),
        ("outlook", in_words(estimate) if estimate and drained is None else ""),
        ("reason", outage.reason),
        ("by", outage.actor),
        ("openings", str(outage.openings)),
        ("causes", ", ".join(f"{cause} {count}" for cause, count in outage.causes)),
        ("calls that failed", str(outage.failed_calls)),
        ("calls avoided", str(counts.refused)),
        ("tasks deferred", str(counts.deferred)),
        ("tasks resumed", str(counts.resumed)),
        ("served from fallback", ", ".join(f"{source} {count}" for source, count in counts.fallbacks.items())),
        ("how stale", at_most if average is None else f"{at_most}, {duration(average)} on average"),
        ("tasks failed", str(counts.failed)),
        ("dead-lettered", f"{counts.dead}, {counts.expired} of them expired" if counts.expired else str(counts.dead)),
        ("revoked or dropped", str(counts.revoked + counts.dropped)),
        ("replaced by a later one", str(counts.coalesced)),
        ("longest wait", duration(outage.longest_wait)),
        ("delivered again", str(counts.redelivered)),
    )
    return [row for row in rows if row[1]]
