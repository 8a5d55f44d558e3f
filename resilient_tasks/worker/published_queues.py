"""Deferred queues on any other broker: publish with confirmation, then acknowledge."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, ClassVar

from celery import Celery
from kombu import Producer
from kombu.exceptions import OperationalError

from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.envelope import Envelope, without_envelope
from resilient_tasks.worker.queues import Entry, Move, Queues, declare, own_queue
from resilient_tasks.worker.redis_queues import RedisQueues

logger = logging.getLogger("resilient_tasks")

#: Seconds to wait for a publisher's confirmation: a RabbitMQ short of memory or disk reads nothing more.
LONGEST_CONFIRM = 3.0
#: Times a message may be requeued: RabbitMQ's quorum queues drop one after 20.
MOST_REQUEUED = 10

_DELIVERY_COUNT = "x-delivery-count"

#: Headers of one delivery, or of a body that kombu has unpacked already.
_HEADERS_NOT_COPIED = frozenset({_DELIVERY_COUNT, "compression"})
#: Properties that belong to one delivery, or that kombu takes under a name of their own.
_NOT_COPIED = frozenset({
    "delivery_info", "delivery_tag", "body_encoding", "application_headers", "content_type", "content_encoding",
    "expiration",
})  # fmt: skip


def open_queues(app: Celery, namespace: str) -> Queues:
    """Return the deferred and dead-letter queues of an app's broker."""
    with app.connection_for_read() as unused:
        is_redis = unused.transport.driver_type == "redis"
    return (RedisQueues if is_redis else PublishedQueues)(app, namespace)


class PublishedQueues(Queues):
    """Any other transport: durable queues without consumers, publish then acknowledge."""

    transport_options: ClassVar[dict[str, Any]] = {
        "max_retries": 0, "confirm_publish": True, "read_timeout": 10, "write_timeout": 10,
    }  # fmt: skip

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        self._lock = threading.Lock()
        self._declared: set[str] = set()
        self._returned = False
        self._arguments = {"x-queue-type": "quorum"} if _uses_quorum_queues(app) else {}

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Use the connection alone; after an error the next use opens another."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._declared.clear()
                with contextlib.suppress(*self.errors):
                    self._connection.collect()  # closing it would wait for a broker that reads nothing more
                raise

    def _declare(self, queue: str) -> None:
        if queue in self._declared:
            return
        declare(self._connection, own_queue(queue, self._arguments))
        self._declared.add(queue)

    def _check(self, queue: str) -> None:
        with self._exclusive():
            self._declare(queue)
            if self._emulated:  # by kombu, which knows no rights
                return
            publish = Producer(self.channel, auto_declare=False).publish
            publish("", exchange="", routing_key=f"{self.namespace}.nowhere", confirm_timeout=LONGEST_CONFIRM)
            message = self.channel.basic_get(queue)
            if message is not None:
                self._return(self.channel.message_to_python(message), queue)

    def _publish(self, message: Any, queue: str, envelope: Envelope | None) -> bool:
        """Publish straight to a queue; False if there is none. In those of ours the broker must let nothing expire."""
        headers = message.headers or {}
        expiration = _expiration(message) or Envelope.read(headers).expiration
        if not self.owns(queue):
            headers = replace(envelope, expiration=0).write(headers) if envelope else without_envelope(headers)
            return self._send(message, queue, headers, expiration)
        self._declare(queue)
        if not self._send(message, queue, replace(envelope or Envelope(), expiration=expiration).write(headers)):
            raise OperationalError(f"queue {queue} was deleted a moment ago")
        return True

    def _send(self, message: Any, queue: str, headers: Mapping[str, Any], expiration: int = 0) -> bool:
        headers = {name: value for name, value in headers.items() if name not in _HEADERS_NOT_COPIED}
        properties = {name: value for name, value in message.properties.items() if name not in _NOT_COPIED}
        if expiration:  # milliseconds, but kombu takes seconds and truncates
            properties["expiration"] = Fraction(expiration, 1000)
        self._returned = False
        on_return = None if self._emulated else self._note_return
        Producer(self.channel, auto_declare=False, on_return=on_return).publish(
            message.body, exchange="", routing_key=queue, headers=headers, mandatory=True,
            content_type=message.content_type, content_encoding=message.content_encoding,
            confirm_timeout=LONGEST_CONFIRM, **properties,
        )  # fmt: skip
        return not self._returned

    @property
    def _emulated(self) -> bool:
        """Whether kombu plays the broker itself: it then takes everything, and requeues at the end."""
        return celery_internals.is_emulated(self.channel)

    def _note_return(self, *_: Any) -> None:
        self._returned = True

    def put(
        self, message: Any, queue: str, envelope: Envelope | None, *,
        owned: bool, limit: int | None = None, first: bool = False,
    ) -> bool:  # fmt: skip
        """See :meth:`Queues.put`.

        One that goes back to its queue, but has changed or has been requeued so often that a quorum queue would soon
        drop it, is published anew and is then the last of its queue.
        """
        if (
            owned
            and first
            and (envelope or Envelope()) == Envelope.read(message.headers)
            and not _requeued_often(message)
        ):
            self._settle(message.requeue)
            return True
        sent_to = message.delivery_info.get("exchange")
        if envelope and sent_to and self.owns(queue):
            envelope = replace(envelope, exchange=sent_to, routing_key=message.delivery_info.get("routing_key") or "")
        with self._exclusive():
            if self.owns(queue):
                self._declare(queue)
            full = limit is not None and self._size(queue) >= limit
            if not full and not self._publish(message, queue, envelope):
                raise OperationalError(f"queue {queue} is gone")
        if full:
            raise DeferredQueueFullError(envelope.breaker if envelope else "", limit)
        if owned:
            self._settle(message.ack)
        return True

    @staticmethod
    def _settle(settle: Callable[[], None]) -> None:
        """Acknowledge or requeue a delivery; where its channel is dead, the broker delivers it again anyway."""
        try:
            settle()
        except Exception:  # it must not look like a put that failed: the message would be put once more
            logger.warning("a message could not be acknowledged or requeued", exc_info=True)

    @contextlib.contextmanager
    def peek(self, queue: str, breaker: str, *, start: int = 0) -> Iterator[Iterator[Entry]]:
        held: list[Any] = []
        with self._exclusive():
            self._declare(queue)
            try:
                yield itertools.islice(self._entries(queue, breaker, held), start, None)
            finally:
                self._requeue(queue, held)

    def _entries(self, queue: str, breaker: str, held: list[Any]) -> Iterator[Entry]:
        """Yield what is in a queue; the broker holds it as unacknowledged."""
        while (message := self.channel.basic_get(queue)) is not None:
            message = self.channel.message_to_python(message)
            held.append(message)
            raw = message.body.encode() if isinstance(message.body, str) else bytes(message.body or b"")
            yield self._entry(queue, breaker, message, raw)

    def _requeue(self, queue: str, messages: Sequence[Any]) -> None:
        for message in messages if self._emulated else reversed(messages):
            if not message.acknowledged:
                self._return(message, queue)

    def _return(self, message: Any, queue: str) -> None:
        """Return a message that was only looked at; as the last of its queue before the broker drops it."""
        if not _requeued_often(message):
            message.requeue()
        elif self._send(message, queue, message.headers):
            message.ack()

    def move(self, queue: str, moves: Sequence[Move]) -> Iterator[Move]:
        for move in moves:
            message, dead = move.entry.message, self.dead(move.entry.envelope.breaker)
            if move.queue is None or self._publish(message, move.queue, move.envelope):
                message.ack()
                yield move
                continue
            if queue != dead:
                what = "Task %s is dead-lettered: its queue %s is gone"
                logger.error(what, move.entry.task_id, move.queue, extra=move.entry.log_fields)
                envelope = move.entry.envelope.dead_letter(time.time(), f"its queue {move.queue} is gone")
                self._publish(message, dead, envelope)
                message.ack()
            yield replace(move, queue=dead)

    def _size(self, queue: str) -> int:
        _ = self.channel  # opens the connection again if it was closed
        with self._connection.channel() as passing:  # a broker ends the channel on which it refuses something
            try:
                return int(passing.queue_declare(queue, passive=True).message_count)
            except self._connection.channel_errors:
                return 0

    def size(self, *queues: str) -> int:
        with self._exclusive():
            return sum(self._size(queue) for queue in queues)


def _expiration(message: Any) -> int:
    """Return how long the broker would keep a message, ms; 0 for as long as it takes."""
    text = str(message.properties.get("expiration", ""))
    return int(text) if text.isdecimal() and text.isascii() else 0


def _requeued_often(message: Any) -> bool:
    count = (message.headers or {}).get(_DELIVERY_COUNT)
    return isinstance(count, int) and count >= MOST_REQUEUED


def _uses_quorum_queues(app: Celery) -> bool:
    """Whether an app keeps tasks in quorum queues; what is deferred must be as safe."""
    kinds = [(queue.queue_arguments or {}).get("x-queue-type") for queue in app.amqp.queues.values()]
    return "quorum" in (*kinds, app.conf.task_default_queue_type)
