"""Deferred queues on any other broker: publish with confirmation, then acknowledge."""

from __future__ import annotations

import contextlib
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
from resilient_tasks.worker import seams
from resilient_tasks.worker.queues import Choose, Entry, Letter, Move, Queues, declare, own_queue, without_ticket
from resilient_tasks.worker.ticket import Ticket

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


class PublishedQueues(Queues):
    """Any other transport: durable queues without consumers, publish then acknowledge."""

    transport_options: ClassVar[dict[str, Any]] = {
        "max_retries": 0,
        "confirm_publish": True,
        "read_timeout": 10,
        "write_timeout": 10,
    }

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        self._lock = threading.Lock()
        self._declared: set[str] = set()
        self._returned = False
        self._arguments = {"x-queue-type": "quorum"} if _uses_quorum_queues(app) else {}

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except Exception:
                self._declared.clear()
                with contextlib.suppress(Exception):
                    self._connection.collect()  # a farewell would wait for a broker that reads nothing more
                raise

    def _passing_channel(self) -> Any:
        """Return a channel for one question: a broker ends the channel on which it refuses something."""
        _ = self.channel  # opens the connection again if it was closed
        return self._connection.channel()

    def _declare(self, queue: str) -> None:
        if queue in self._declared:
            return
        declare(self._connection, own_queue(queue, self._arguments))
        self._declared.add(queue)

    def _publish(self, message: Any, queue: str, ticket: Ticket | None, expiration: int) -> bool:
        """Publish straight to a queue, to be kept for ``expiration`` ms (0: for ever); False if there is none."""
        headers = without_ticket(message.headers or {})
        return self._send(message, queue, ticket.write(headers) if ticket else headers, expiration)

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
        return seams.is_emulated(self.channel)

    def _note_return(self, *_: Any) -> None:
        self._returned = True

    def _publish_to_own(self, message: Any, queue: str, ticket: Ticket) -> None:
        """Publish to a queue where the broker must let no message expire."""
        self._declare(queue)
        ticket = replace(ticket, expiration=_expiration(message) or ticket.expiration)
        if not self._publish(message, queue, ticket, expiration=0):
            raise OperationalError(f"queue {queue} was deleted a moment ago")

    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """See :meth:`Queues.defer`."""
        queue = self.place(ticket)
        sent_to = message.delivery_info.get("exchange")
        if sent_to:
            ticket = replace(ticket, exchange=sent_to, routing_key=message.delivery_info.get("routing_key") or "")
        with self._exclusive():
            self._declare(queue)
            full = limit is not None and self._size(queue) >= limit
            if not full:
                self._publish_to_own(message, queue, ticket)
        if full:
            raise DeferredQueueFullError(ticket.breaker, limit)
        if owned:
            self._settle(message.ack)
        return True

    def put_back(self, message: Any, queue: str, ticket: Ticket, *, owned: bool) -> None:
        """See :meth:`Queues.put_back`.

        What has changed, or has been put back so often that a quorum queue would soon throw it away, is
        published anew and is then the last of its queue.
        """
        headers = message.headers or {}
        if owned and ticket == Ticket.read(headers) and not _requeued_often(message):
            self._settle(message.requeue)
            return
        with self._exclusive():
            if not self._publish(message, queue, ticket if ticket.breaker else None, _expiration(message)):
                raise OperationalError(f"queue {queue} is gone")
        if owned:
            self._settle(message.ack)

    @staticmethod
    def _settle(settle: Callable[[], None]) -> None:
        """Acknowledge or requeue a delivery; where its channel is dead, the broker delivers it again anyway."""
        try:
            settle()
        except Exception as exc:  # noqa: BLE001 - whatever a dead channel raises
            logger.warning("a message could not be acknowledged or requeued: %s", type(exc).__name__)

    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """See :meth:`Queues.sift`."""
        queue = self.deferred(breaker)
        with self._exclusive():
            self._declare(queue)
            messages = list(_bounded(lambda: self._get(queue), start + scan))
            try:
                return [self._make(breaker, move) for move in choose(self._tasks(breaker, messages[start:]))]
            finally:
                self._requeue(queue, messages)

    def _requeue(self, queue: str, messages: Sequence[Any]) -> None:
        for message in messages if self._emulated else reversed(messages):
            if not message.acknowledged:
                self._return(message, queue)

    def _return(self, message: Any, queue: str) -> None:
        """Return a message that was only looked at; as the last of its queue before the broker throws it away."""
        if not _requeued_often(message):
            message.requeue()
        elif self._send(message, queue, message.headers):
            message.ack()

    def _get(self, queue: str) -> Any:
        message = self.channel.basic_get(queue)
        return None if message is None else self.channel.message_to_python(message)

    def _tasks(self, breaker: str, messages: Sequence[Any]) -> list[Entry]:
        entries = {id(message): self._task_entry(breaker, message) for message in messages}
        for message in messages:
            if entries[id(message)] is None:
                self._warn_of_stranger(breaker)
                self._make(breaker, Move(Entry(message, Ticket()), self.dead(breaker)))
        return [entry for entry in entries.values() if entry is not None]

    def _make(self, breaker: str, move: Move) -> Move:
        """Make a move; return it as it was made: what has no queue to go to any more is a dead letter."""
        message, dead = move.entry.message, self.dead(breaker)
        if move.queue == dead:
            self._publish_to_own(message, dead, move.ticket or move.entry.ticket)
        elif move.queue is not None and not self._send_home(move):
            what = "Task %s is dead-lettered: its queue %s is gone"
            logger.error(what, move.entry.task_id, move.queue, extra=move.entry.log_fields)
            ticket = move.entry.ticket.die(time.time(), f"its queue {move.queue} is gone")
            self._publish_to_own(message, dead, ticket)
            move = replace(move, queue=dead)
        message.ack()
        return move

    def _send_home(self, move: Move) -> bool:
        """Publish to the queue that a task came from, as it was; False if there is no such queue."""
        ticket = replace(move.ticket, expiration=0) if move.ticket else None
        expiration = _expiration(move.entry.message) or move.entry.ticket.expiration
        return self._publish(move.entry.message, str(move.queue), ticket, expiration)

    @contextlib.contextmanager
    def letters(self, breaker: str) -> Iterator[Iterator[Letter]]:
        """See :meth:`Queues.letters`."""
        held: list[Any] = []
        with self._exclusive():
            try:
                yield self._letters(breaker, held)
            finally:
                self._requeue(self.dead(breaker), held)

    def _letters(self, breaker: str, held: list[Any]) -> Iterator[Letter]:
        queue = self.dead(breaker)
        self._declare(queue)
        while (message := self._get(queue)) is not None:
            held.append(message)
            raw = message.body.encode() if isinstance(message.body, str) else bytes(message.body or b"")
            yield Letter(raw, self._task_entry(breaker, message), message)

    def revive(self, breaker: str, letter: Letter, queue: str | None) -> bool:
        """See :meth:`Queues.revive`."""
        del breaker  # the letter itself knows where it lies
        if queue is not None and letter.entry is not None and not self._send_home(Move(letter.entry, queue)):
            return False
        letter.message.ack()
        return True

    def _size(self, queue: str) -> int:
        with self._passing_channel() as passing:
            try:
                return int(passing.queue_declare(queue, passive=True).message_count)
            except self._connection.channel_errors:
                return 0

    def size(self, *queues: str) -> int:
        """See :meth:`Queues.size`."""
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


def _bounded(get: Callable[[], Any], most: int) -> Iterator[Any]:
    for _ in range(most):
        message = get()
        if message is None:
            return
        yield message
