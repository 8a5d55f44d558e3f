"""What a breaker in SHADOW would have done: when it would have opened, and how many calls would have waited.

A model, not a replay: each opening lasts as long as a real one would, then the breaker is taken to have healed with an
empty window. A dependency that is still ill trips it anew; trials and the ramp are left out. Times are integer
milliseconds. ``store/lua/lib/shadow.lua`` has the same functions; change the two together.
"""

from __future__ import annotations

from typing import NamedTuple

MOST_OPENINGS = 20


class Opening(NamedTuple):
    """One opening that the rules asked for in SHADOW.

    Args:
        at: when.
        until: when its open time ended, or will end.
        calls: counted in between: those that would have waited.
        in_a_row: how many openings in a row it is, the exponent of its open time.
    """

    at: int
    until: int
    calls: int = 0
    in_a_row: int = 1

    def next_in_a_row(self, now: int, max_open_time: int) -> int:
        """Return how many in a row an opening at ``now`` is: each ``max_open_time`` in between takes one back."""
        return 1 + max(0, self.in_a_row - max(0, now - self.until) // max_open_time)


Openings = tuple[Opening, ...]


def with_opening(openings: Openings, opening: Opening) -> Openings:
    """Return the latest openings with one more."""
    return (*openings, opening)[-MOST_OPENINGS:]


def with_calls(openings: Openings, count: int) -> Openings:
    """Return the openings with so many more calls that would have waited for the last one to end."""
    *former, last = openings
    return (*former, last._replace(calls=last.calls + count))
