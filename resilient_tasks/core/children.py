"""Children: breakers of single keys (tenants, hosts, credentials) under one parent, and what they mean for it.

Beside its record a child costs its store one entry here. ``store/lua/lib/children.lua`` has the same functions: change
the two together. Times are integer milliseconds on the store's clock.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from resilient_tasks.core.model import HELD_OPEN, State
from resilient_tasks.core.record import Record

IDLE_AFTER = 3_600_000  # ms; a child that nobody has used for so long may be forgotten


@dataclass(slots=True)
class Children:
    """The children of one breaker.

    Attributes:
        used_at: key -> when the child was last used; for ever, while it is held open.
        opened: key -> since when the child is held open.
        hot: keys of those that are not plainly CLOSED: the tick and the views look at no others.
    """

    used_at: dict[str, float] = field(default_factory=dict)
    opened: dict[str, int] = field(default_factory=dict)
    hot: set[str] = field(default_factory=set)

    def enroll(self, key: str, most: int, now: int) -> bool:
        """Return whether there is room for a child of ``key``; idle ones make room."""
        if key not in self.used_at and len(self.used_at) >= most and not self._forget_idle(now):
            return False
        self.used_at[key] = max(self.used_at.get(key, 0), now)
        return True

    def _forget_idle(self, now: int) -> bool:
        idle = [key for key, used_at in self.used_at.items() if used_at <= now - IDLE_AFTER and key not in self.hot]
        for key in idle:
            del self.used_at[key]
        return bool(idle)

    def note(self, key: str, record: Record, now: int) -> None:
        """Take note of what has become of a child."""
        if record.state in HELD_OPEN:
            self.opened.setdefault(key, now)
        else:
            self.opened.pop(key, None)
        self.used_at[key] = math.inf if key in self.opened else now
        if record.state is not State.CLOSED or record.is_ramping(now):
            self.hot.add(key)

    def cool(self, key: str, record: Record, now: int) -> bool:
        """Leave a child alone that is plainly CLOSED again; False if it is not."""
        is_plain = record.state is State.CLOSED and not record.is_ramping(now)
        if is_plain:
            self.hot.discard(key)
        return is_plain

    def active(self, now: int, window: int) -> int:
        """Return the number of children that were used within the window, or are held open."""
        return sum(used_at > now - window for used_at in self.used_at.values())

    def has_room_to_open(self, record: Record, now: int) -> bool:
        """Return whether one more may be held open; ``record`` is that one's, and a call of it is just counted."""
        share = record.rules.max_open_ratio
        if not share:
            return True
        was_active = self.used_at.get(record.name.partition(":")[2], 0) > now - record.rules.window
        active = self.active(now, record.rules.window) + (not was_active)
        return len(self.opened) + 1 <= share * active
