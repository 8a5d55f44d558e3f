"""Blocked queues: what is blocked on one connection says nothing about the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from resilient_tasks.worker.compensation import Overflow
from resilient_tasks.worker.envelope import Envelope


class TaskConsumer:
    """One connection's consumer of a queue."""

    def __init__(self) -> None:
        self.cancelled: list[str] = []
        self._active_tags = {"work": "a-tag"}
        self.channel = SimpleNamespace(basic_cancel=self.cancelled.append)


def test_a_queue_is_blocked_again_after_a_reconnect() -> None:
    consumer = SimpleNamespace(
        task_consumer=TaskConsumer(), event_dispatcher=None, call_soon=lambda call, *args: call(*args)
    )
    deferral: Any = SimpleNamespace(requeue=lambda *_: None)
    overflow = Overflow(deferral, lambda _: True)
    request: Any = SimpleNamespace(arrival=0)
    for _ in range(2):
        consumer.task_consumer = TaskConsumer()
        overflow.start(consumer)
        overflow.requeue(request, Envelope(), "work", "payments")
        assert consumer.task_consumer.cancelled == ["a-tag"]
