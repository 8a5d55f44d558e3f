"""A broker as they are for rent, in memory: without order, without priorities, sure of no number. Like SQS."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any, ClassVar

from kombu.transport import TRANSPORT_ALIASES, memory

SCHEME = "cloud"


class Channel(memory.Channel):
    """Delivers in any order, and counts what lay in a queue when it was last asked."""

    queues: dict[str, Any] = {}  # noqa: RUF012 - one broker for all channels, as in the base class
    counted: ClassVar[dict[str, int]] = defaultdict(int)
    supports_fanout = False

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        with self._queue_for(queue).mutex:
            random.shuffle(self._queue_for(queue).queue)
        return super()._get(queue, timeout)

    def _size(self, queue: str) -> int:
        answer, self.counted[queue] = self.counted[queue], super()._size(queue)
        return answer


class Transport(memory.Transport):
    """Found by :data:`SCHEME`."""

    Channel = Channel


TRANSPORT_ALIASES[SCHEME] = f"{__name__}:Transport"
