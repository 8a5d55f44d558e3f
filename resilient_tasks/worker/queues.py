"""Deferred and dead-letter queues on the broker: putting messages in, sifting them out.

A message is in exactly one place. On Redis each operation is one conditional script; on any other
transport it is publish, then acknowledge, so that a crash between the two leaves a second copy and
never none.
"""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from celery import Celery
from kombu import Producer, Queue

from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.worker import seams
from resilient_tasks.worker.ticket import Ticket

#: Properties that belong to one delivery, not to the message.
_OF_ONE_DELIVERY = frozenset({"delivery_info", "delivery_tag", "body_encoding", "application_headers"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One waiting message."""

    message: Any  # kombu's Message
    ticket: Ticket

    @property
    def task_id(self) -> str:
        """Id of the task; empty if the message says none."""
        return str((self.message.headers or {}).get("id", ""))

    @property
    def task_name(self) -> str:
        """Name of the task; empty if the message says none."""
        return str((self.message.headers or {}).get("task", ""))


@dataclass(frozen=True, slots=True)
class Move:
    """Where a waiting message goes. ``queue=None`` drops it; ``ticket=None`` takes our header off."""

    entry: Entry
    queue: str | None
    ticket: Ticket | None = None


class Queues(ABC):
    """The broker's side of deferring. One instance per thread or guarded by the caller's loop."""

    def __init__(self, app: Celery, namespace: str) -> None:
        self.namespace = namespace
        self._connection = app.connection_for_read()

    def deferred(self, breaker: str) -> str:
        """Name of a breaker's deferred queue."""
        return f"{self.namespace}.deferred.{breaker}"

    def dead(self, breaker: str) -> str:
        """Name of a breaker's dead-letter queue."""
        return f"{self.namespace}.dead.{breaker}"

    @property
    def channel(self) -> Any:
        """A channel on a connection of our own."""
        return self._connection.default_channel

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        with contextlib.suppress(Exception):
            self._connection.close()

    @abstractmethod
    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """Put a delivered message aside.

        Args:
            message: the message as it was consumed.
            ticket: what it shall say about itself while it waits.
            owned: the broker still holds it as unacknowledged; False under early acknowledgement.
            limit: most messages that the queue may hold; None: no bound.

        Returns:
            False if the message is no longer ours because the broker has restored it.

        Raises:
            DeferredQueueFullError: the queue holds ``limit`` messages.
        """

    @abstractmethod
    def sift(self, breaker: str, scan: int, choose: Callable[[Sequence[Entry]], Sequence[Move]]) -> list[Move]:
        """Offer the ``scan`` oldest waiting messages to ``choose`` and make the moves that it returns.

        The others keep their places. Returns the moves that were made.
        """

    @abstractmethod
    def size(self, *queues: str) -> int:
        """Number of messages that lie in some queues."""


class RedisQueues(Queues):
    """Lists on a Redis broker; kombu's order: newest first, so that an ordinary consumer could drain them."""

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        scripts = resources.files("resilient_tasks.worker") / "lua"
        self._defer_source = (scripts / "defer.lua").read_text()
        self._move_source = (scripts / "move.lua").read_text()

    def _run(self, source: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        client = seams.plain_client(self.channel)
        return client.register_script(source)(keys=keys, args=args)

    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """See :meth:`Queues.defer`."""
        raw = message.serializable()
        raw["headers"] = ticket.write(raw["headers"])
        raw["properties"] = {**raw["properties"], "delivery_tag": seams.new_delivery_tag(self.channel)}
        keys = [*seams.unacked_keys(self.channel), seams.list_key(self.channel, self.deferred(ticket.breaker))]
        bound = "" if limit is None else str(limit)
        tag = message.delivery_tag if owned and seams.emulates_acks(message.channel) else ""
        answer = self._run(self._defer_source, keys, [tag, seams.encode_message(raw), bound])
        if answer < 0:
            raise DeferredQueueFullError(ticket.breaker, limit or 0)
        if owned:
            seams.forget_delivery(message)
        return bool(answer)

    def sift(self, breaker: str, scan: int, choose: Callable[[Sequence[Entry]], Sequence[Move]]) -> list[Move]:
        """See :meth:`Queues.sift`."""
        source = seams.list_key(self.channel, self.deferred(breaker))
        waiting = seams.plain_client(self.channel).lrange(source, -scan, -1)
        texts: dict[int, str | bytes] = {}
        entries: list[Entry] = []
        for text in reversed(waiting):
            with contextlib.suppress(Exception):  # an undecodable element stays where it is
                raw = seams.decode_message(text)
                message = self.channel.Message(raw, channel=self.channel)
                entries.append(Entry(message, Ticket.read(message.headers)))
                texts[id(message)] = text
        moves = choose(entries)
        return self._make(source, [(texts[id(move.entry.message)], move) for move in moves]) if moves else []

    def _make(self, source: str, moves: Sequence[tuple[str | bytes, Move]]) -> list[Move]:
        keys = [source]
        args: list[str | bytes | int] = []
        for text, move in moves:
            raw = _with_ticket(move.entry.message, move.ticket)
            index = 0
            if move.queue is not None:
                key = seams.list_key(self.channel, move.queue, seams.message_priority(self.channel, raw))
                if key not in keys[1:]:
                    keys.append(key)
                index = keys.index(key, 1) + 1
            args += [text, index, seams.encode_message(raw)]
        moved = self._run(self._move_source, keys, args)
        return [move for (_, move), done in zip(moves, moved, strict=True) if done]

    def size(self, *queues: str) -> int:
        """See :meth:`Queues.size`."""
        return sum(seams.queue_size(self.channel, queue) for queue in queues)


class PublishedQueues(Queues):
    """Any other transport: durable queues without consumers, publish then acknowledge."""

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        self._connection.transport_options = {**self._connection.transport_options, "confirm_publish": True}
        self._lock = threading.Lock()
        self._declared: set[str] = set()

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            except Exception:
                self._declared.clear()
                self.close()
                raise

    def _declare(self, queue: str) -> None:
        if queue not in self._declared:
            Queue(queue, durable=True)(self.channel).declare()
            self._declared.add(queue)

    def _publish(self, message: Any, queue: str, ticket: Ticket | None) -> None:
        headers = _stripped(message.headers or {})
        headers.pop("compression", None)  # kombu has unpacked the body already
        if ticket:
            headers = ticket.write(headers)
        properties = {name: value for name, value in message.properties.items() if name not in _OF_ONE_DELIVERY}
        Producer(self.channel, auto_declare=False).publish(
            message.body, exchange="", routing_key=queue, headers=headers,
            content_type=message.content_type, content_encoding=message.content_encoding, **properties,
        )  # fmt: skip

    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """See :meth:`Queues.defer`."""
        queue = self.deferred(ticket.breaker)
        with self._exclusive():
            self._declare(queue)
            if limit is not None and self._size(queue) >= limit:
                raise DeferredQueueFullError(ticket.breaker, limit)
            self._publish(message, queue, ticket)
        if owned:
            message.ack()
        return True

    def sift(self, breaker: str, scan: int, choose: Callable[[Sequence[Entry]], Sequence[Move]]) -> list[Move]:
        """See :meth:`Queues.sift`."""
        queue = self.deferred(breaker)
        with self._exclusive():
            self._declare(queue)
            messages = list(_bounded(lambda: self.channel.basic_get(queue), scan))
            try:
                entries = [Entry(message, Ticket.read(message.headers)) for message in messages]
                made = list(choose(entries))
                for move in made:
                    if move.queue is not None:
                        self._publish(move.entry.message, move.queue, move.ticket)
                    move.entry.message.ack()
                return made
            finally:
                for message in reversed(messages):
                    if not message.acknowledged:
                        message.requeue()

    def _size(self, queue: str) -> int:
        return int(self.channel.queue_declare(queue, passive=True).message_count)

    def size(self, *queues: str) -> int:
        """See :meth:`Queues.size`."""
        with self._exclusive():
            for queue in queues:
                self._declare(queue)
            return sum(self._size(queue) for queue in queues)


def open_queues(app: Celery, namespace: str) -> Queues:
    """Return the queues of an app's broker."""
    with app.connection_for_read() as probe:
        is_redis = probe.transport.driver_type == "redis"
    return (RedisQueues if is_redis else PublishedQueues)(app, namespace)


def _bounded(get: Callable[[], Any], most: int) -> Iterator[Any]:
    for _ in range(most):
        message = get()
        if message is None:
            return
        yield message


def _stripped(headers: Mapping[str, Any]) -> dict[str, Any]:
    headers = dict(headers)
    Ticket.take(headers)
    return headers


def _with_ticket(message: Any, ticket: Ticket | None) -> dict[str, Any]:
    raw: dict[str, Any] = message.serializable()
    raw["headers"] = ticket.write(raw["headers"]) if ticket else _stripped(raw["headers"])
    return raw
