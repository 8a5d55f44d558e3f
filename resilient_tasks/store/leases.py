"""``Leases``: the permits and slots of this process, renewed while their calls wait or run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import groupby

from resilient_tasks.store.failover import FailoverStore

LEASE = 5.0  # seconds; a permit whose holder dies is free after at most this long
_INTERVAL = LEASE / 3  # seconds between two renewals


class Leases:
    """What this process holds; called by any thread, renewed by one.

    Args:
        store: where leases are renewed.
        clock: monotonic clock in seconds.
    """

    def __init__(self, store: FailoverStore, clock: Callable[[], float]) -> None:
        self._store = store
        self._clock = clock
        self._lock = threading.Lock()
        self._held: dict[tuple[str, str], float] = {}  # breaker and holder -> until when to renew at most
        self._renew_at = 0.0

    @property
    def due_at(self) -> float | None:
        """When to renew, on the clock; None if nothing is held."""
        return self._renew_at if self._held else None

    def hold(self, name: str, holder: str, until: float) -> None:
        """Renew a permit or a slot until it is let go or ``until`` (on the clock) has passed."""
        with self._lock:
            if not self._held:
                self._renew_at = self._clock() + _INTERVAL
            self._held[name, holder] = until

    def let_go(self, name: str, holder: str) -> None:
        """Renew it no longer: it is settled, or lost."""
        with self._lock:
            self._held.pop((name, holder), None)

    def renew(self) -> None:
        """Renew all that is held."""
        now = self._clock()
        self._renew_at = now + _INTERVAL
        with self._lock:
            self._held = {lease: until for lease, until in self._held.items() if until > now}
            held = sorted(self._held)
        for name, leases in groupby(held, key=lambda lease: lease[0]):
            holders = [holder for _, holder in leases]
            for holder, is_alive in zip(holders, self._store.renew(name, holders, lease=LEASE), strict=True):
                if not is_alive:
                    self.let_go(name, holder)
