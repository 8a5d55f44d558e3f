"""Durations, times, rates and numbers as people read them."""

from __future__ import annotations

from datetime import datetime, timezone

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
    """Return a time in seconds since the epoch as ISO 8601, in local time; "" for None, or what is on no calendar."""
    if seconds is None or not 0 <= seconds < _END_OF_CALENDAR:
        return ""
    return datetime.fromtimestamp(seconds, timezone.utc).astimezone().isoformat(timespec="seconds")


def share(part: float, of: int) -> str:
    """Return a rate as a percentage; "" where nothing was counted."""
    return f"{part:.0%}" if of else ""


def counted(count: int, noun: str) -> str:
    """Return a number of things: ``1 task``, ``2 tasks``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
