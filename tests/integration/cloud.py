"""Brokers: one as they are for rent, in memory, without order, without priorities, sure of no number; and files."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from kombu.transport import TRANSPORT_ALIASES, filesystem, memory
from kombu.utils.json import dumps

SCHEME, WHOLE_FILES = "cloud", "whole-files"


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


class WholeFiles(filesystem.Channel):
    """As kombu's own, which at times reads a file that another thread or process is still writing, and fails on it."""

    def _put(self, queue: str, payload: Any, **_: Any) -> None:  # type: ignore[override] # as in kombu
        written = Path(self.data_folder_out, f"{time.monotonic_ns()}_{uuid4()}.{queue}.msg.part")
        written.write_text(dumps(payload))
        written.rename(written.with_suffix(""))


class FileTransport(filesystem.Transport):
    """Found by :data:`WHOLE_FILES`."""

    Channel = WholeFiles


TRANSPORT_ALIASES[WHOLE_FILES] = f"{__name__}:FileTransport"
