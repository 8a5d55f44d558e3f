"""The producer: publishes every task once, and notes which of them the broker has acknowledged."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Mapping
from typing import Any

from celery import Celery

from tests.chaos.ledger import Event, Ledger

#: Tasks per second.
RATE = 100.0
#: Seconds after which a publish that is not acknowledged is given up.
TIMEOUT = 3.0
#: Seconds to wait after a publish that failed, before the next: not all tasks shall meet a broker that is unavailable.
PAUSE = 0.5
#: How many of each task there are among ten.
MIX = {"charge": 4, "balance": 2, "invoice": 1, "tally": 3}


class Producer(threading.Thread):
    """Publishes by name, as a program without the library does, and tries nothing twice.

    Args:
        url: of the broker.
        transport_options: of the broker.
        ledger: where it notes what it has sent.
        seed: decides which tasks.
        tasks: how many.
    """

    def __init__(
        self, url: str, transport_options: Mapping[str, Any], ledger: Ledger, *, seed: int, tasks: int
    ) -> None:
        super().__init__(name="producer", daemon=True)
        self._app = Celery("producer", broker=url)
        self._app.conf.broker_transport_options = {
            **transport_options, "socket_timeout": TIMEOUT, "socket_connect_timeout": TIMEOUT, "max_retries": 0,
        }  # fmt: skip
        self._ledger = ledger
        self._chance = random.Random(seed)
        self._tasks = tasks
        self._producer: Any = None

    def run(self) -> None:
        """Publish all tasks at a steady rate."""
        began = time.monotonic()
        for number in range(self._tasks):
            time.sleep(max(0.0, began + number / RATE - time.monotonic()))
            (kind,) = self._chance.choices(list(MIX), weights=list(MIX.values()))
            self._publish(kind, f"{kind}-{number}")
        self._hang_up()

    def _publish(self, kind: str, task_id: str) -> None:
        self._ledger.note(Event.SENT, task_id)
        try:
            if self._producer is None:
                self._producer = self._app.amqp.Producer(self._app.connection_for_write())
            self._app.send_task(
                f"tests.chaos.project.{kind}", (task_id,), task_id=task_id, producer=self._producer,
                retry=False, timeout=TIMEOUT, confirm_timeout=TIMEOUT,
            )  # fmt: skip
        except Exception:  # whatever a broker in trouble makes of it: in doubt
            self._hang_up()
            time.sleep(PAUSE)
        else:
            self._ledger.note(Event.ACKNOWLEDGED, task_id)

    def _hang_up(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            with contextlib.suppress(Exception):
                producer.connection.collect()
