"""``Family``: the children of one breaker that this process has met; those that nobody uses are forgotten."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient_tasks.core.names import child_name

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker, Child

#: Seconds between two looks for children that nobody uses; looked for when a new one is met.
SWEEPING = 60.0
#: Seconds for which a parent without room for more children is not asked again.
FULL_FOR = 10.0


class Family:
    """The children of one breaker. No lock: each step leaves it right, and it is inherited by forks.

    Args:
        parent: whose children.
        make: makes the child of a name.
    """

    def __init__(self, parent: Breaker, make: Callable[[str], Child]) -> None:
        self._parent = parent
        self._make = make
        self._children: dict[str, Child] = {}
        self._full_until = self._swept_at = float("-inf")

    def of_key(self, key: object) -> Breaker:
        """Return the child of a key; the parent itself if it has as many as may be.

        Raises:
            ConfigurationError: the key cannot name a child.
        """
        name = child_name(self._parent.name, key)
        known = self._children.get(name)
        if known is not None:
            return known
        fleet = self._parent.fleet
        if fleet.view.clock() < self._full_until:
            return self._parent
        if not fleet.store.enroll(self._make(name).spec):
            self._full_until = fleet.view.clock() + FULL_FOR
            return self._parent
        return self.named(name)

    def named(self, name: str) -> Child:
        """Return the child of a name, which somebody in the fleet has met."""
        known = self._children.get(name)
        if known is None:
            now = self._parent.fleet.view.clock()
            if now >= self._swept_at + SWEEPING:
                self._swept_at = now
                self._forget_idle()
            known = self._children.setdefault(name, self._make(name))
        return known

    def detach(self) -> None:
        """Forget all children."""
        self._children.clear()

    def _forget_idle(self) -> None:
        for name, child in list(self._children.items()):
            if child.is_idle:
                del self._children[name]
                self._parent.fleet.view.forget(name)
                child.detach()
