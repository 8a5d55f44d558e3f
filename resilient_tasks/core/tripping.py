"""When a breaker trips, and why: pure questions about a policy and what has been counted.

``store/lua/lib/tripping.lua`` has the same functions; change the two together.
"""

from __future__ import annotations

from resilient_tasks.core.model import Calls, Outcome
from resilient_tasks.core.record import Rules
from resilient_tasks.core.window import Totals


def rate_trips(rules: Rules, totals: Totals) -> str | None:
    """Return which rate, ``"failure"`` or ``"slow"``, opens the breaker with these sums, or None."""
    if totals.calls < rules.minimum_calls or totals.tasks < rules.minimum_tasks:
        return None
    if totals.failures / totals.calls >= rules.failure_rate:
        return "failure"
    return "slow" if totals.slow / totals.calls >= rules.slow_rate else None


def row_trips(rules: Rules, row: int, totals: Totals) -> bool:
    """Whether so many failures in a row open the breaker, with these sums in the window."""
    return 0 < rules.consecutive <= row and totals.tasks >= rules.minimum_tasks


def trip_point(rules: Rules, totals: Totals, row: int, calls: Calls) -> int | None:
    """Return which of a run of equal outcomes opens the breaker (1 for the first), or None.

    Args:
        rules: of the breaker.
        totals: the sums in the window before the run.
        row: failures in a row before it.
        calls: the run.
    """
    missing, count = rules.minimum_tasks - totals.tasks, calls.number
    if missing > 0 and totals.plus(calls).tasks < rules.minimum_tasks:
        return None
    points = []
    if rules.consecutive and calls.outcome is Outcome.FAILURE:
        points.append(max(1, rules.consecutive - row, missing))
    # Within the rest of a run each rate only grows or only falls, so two looks tell whether it trips at all.
    first = max(1, rules.minimum_calls - totals.calls, missing)
    if first <= count and rate_trips(rules, totals.plus(calls._replace(number=first))):
        points.append(first)
    elif first < count and rate_trips(rules, totals.plus(calls)):
        points.append(_bisect(rules, totals, calls, first))
    tripped_at = min(points, default=count + 1)
    return tripped_at if tripped_at <= count else None


def _bisect(rules: Rules, totals: Totals, calls: Calls, calm: int) -> int:
    """Return the first point of a run that trips, given one that does not; the last one does."""
    tripped = calls.number
    while tripped - calm > 1:
        middle = (calm + tripped) // 2
        if rate_trips(rules, totals.plus(calls._replace(number=middle))):
            tripped = middle
        else:
            calm = middle
    return tripped


def why(rules: Rules, totals: Totals, row: int, cause: str) -> str:
    """Return why the breaker trips now, in words."""
    rate = rate_trips(rules, totals)
    if rate is None:
        return with_cause(f"{row} consecutive failures", cause)
    part = totals.failures if rate == "failure" else totals.slow
    percent = (200 * part + totals.calls) // (2 * totals.calls)
    reason = f"{rate} rate {percent} % of {totals.calls} calls"
    return with_cause(reason, cause) if rate == "failure" else reason


def with_cause(reason: str, cause: str) -> str:
    """Return a reason with what the last failure was, if that is known."""
    return f"{reason}, last: {cause}" if cause else reason
