"""What happens to every task, written to a local file that no fault touches.

Times are seconds of the machine's monotonic clock: all processes share it, and no clock jump moves it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path


class Event(str, Enum):
    """What can happen to a task."""

    SENT = "sent"  # about to be published
    ACKNOWLEDGED = "acknowledged"  # the broker has taken it
    BEGUN = "begun"  # a run has started
    MOVED = "moved"  # its message is deferred, or resumed
    DONE = "done"  # a run has reached its end, or a fallback has answered
    FAILED = "failed"  # Celery has given it up


@dataclass(frozen=True)
class Entry:
    """One line of the ledger."""

    event: Event
    task_id: str
    at: float
    where: str


class Ledger:
    """Appends to the file and reads it; any number of processes may do so at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, event: Event, task_id: str) -> None:
        """Write one entry, in one piece."""
        line = json.dumps(asdict(Entry(event, task_id, time.monotonic(), f"pid {os.getpid()}"))) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def entries(self) -> Iterator[Entry]:
        """Yield what was written so far."""
        if not self.path.exists():
            return
        with self.path.open() as file:
            for line in file:
                fields = json.loads(line)
                yield Entry(Event(fields.pop("event")), **fields)
