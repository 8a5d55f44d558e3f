"""A clock that tests advance, a store that goes away on demand, and a request without a message."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from resilient_tasks.errors import StoreError
from resilient_tasks.store.local import LocalStore


class ManualClock:
    """Time stops until a test advances it."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class Request(SimpleNamespace):
    """As much of a worker's request as its gate looks at; equal to none but itself."""

    def __hash__(self) -> int:  # type: ignore[override]  # namespaces have none
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class FlakyStore:
    """A ``LocalStore`` behind a cable that a test can pull; it counts requests."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.inner = LocalStore(clock)
        self.is_unavailable = False
        self.calls: Counter[str] = Counter()
        self.arguments: list[tuple[str, tuple[Any, ...]]] = []
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.inner, name)

        def passed_on(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.calls[name] += 1
                self.arguments.append((name, args))
            if self.is_unavailable:
                raise StoreError("the cable is pulled")
            return method(*args, **kwargs)

        return passed_on

    def close(self) -> None:
        """Never fails."""

    def wipe(self, clock: Callable[[], float]) -> None:
        """Lose everything, as a server without persistence does when it restarts."""
        self.inner = LocalStore(clock)


def wait_until(condition: Callable[[], object], timeout: float = 60.0) -> None:
    """Wait for a condition that another thread or process brings about."""
    give_up_at = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > give_up_at:
            raise AssertionError(f"not within {timeout} s: {condition}")
        time.sleep(0.002)
