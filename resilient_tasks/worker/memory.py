"""``MemoryGuard``: nothing more is deferred long before a server refuses to store anything.

A Redis at its ``maxmemory`` refuses publishers and results as well, so waiting tasks must not be what
fills it. The guard is asked for every deferral and looks at the servers a few times a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping

from resilient_tasks.core.memory import Memory, MemoryLimit

logger = logging.getLogger("resilient_tasks")

#: Seconds, and deferrals, between two looks at the servers.
LOOK_INTERVAL = 0.25
LOOK_EVERY = 100


class MemoryGuard:
    """Watches the memory of the servers that deferring fills.

    Args:
        limit: of each server.
        servers: by name, how to ask one; None or one of ``errors``: it does not say.
        errors: what a server raises that is away, or tells nothing.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self,
        limit: MemoryLimit,
        servers: Mapping[str, Callable[[], Memory | None]],
        errors: tuple[type[Exception], ...] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._servers = servers
        self._errors = errors
        self._clock = clock
        self._look_at = float("-inf")
        self._asked = 0
        self._exceeded: int | None = None

    def exceeded(self) -> int | None:
        """Return the limit in bytes that a server has reached, as far as is known; None: there is room."""
        self._asked += 1
        if self._asked >= LOOK_EVERY or self._clock() >= self._look_at:
            self._look()
            self._asked, self._look_at = 0, self._clock() + LOOK_INTERVAL
        return self._exceeded

    def _look(self) -> None:
        before, self._exceeded = self._exceeded, None
        for name, ask in self._servers.items():
            memory = self._ask(name, ask)
            limit = memory and self._limit.exceeded_by(memory)
            if memory and limit:
                self._exceeded = limit
                if before is None:
                    logger.warning(
                        "nothing more is deferred: the %s uses %d bytes of memory, and deferring may fill %d",
                        name, memory.used, limit,
                    )  # fmt: skip
                return
        if before is not None:
            logger.warning("tasks are deferred again: the servers are below their memory limit")

    def _ask(self, name: str, ask: Callable[[], Memory | None]) -> Memory | None:
        try:
            return ask()
        except self._errors as exc:
            logger.debug("the %s does not tell how much memory it uses: %s", name, type(exc).__name__)
            return None
