"""Deferred and dead-letter queues on the broker: putting messages in, sifting them out.

A message is in exactly one place. On Redis each operation is one conditional script; on any other
transport it is publish, then acknowledge, so that a crash between the two leaves a second copy and
never none.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

import redis
from celery import Celery
from kombu import Producer, Queue
from kombu.exceptions import OperationalError

from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.worker import seams
from resilient_tasks.worker.ticket import Ticket

logger = logging.getLogger("resilient_tasks")

#: Properties that belong to one delivery, or that kombu takes under a name of their own.
_NOT_COPIED = frozenset({
    "delivery_info", "delivery_tag", "body_encoding", "application_headers", "content_type", "content_encoding",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """One waiting message."""

    message: Any  # kombu's Message
    ticket: Ticket

    @property
    def task_id(self) -> str:
        """Id of the task; empty if the message says none."""
        return self._field("id")

    @property
    def task_name(self) -> str:
        """Name of the task; empty if the message says none."""
        return self._field("task")

    def _field(self, name: str) -> str:
        headers, value = self.message.headers or {}, None
        if name in headers:
            value = headers[name]
        elif isinstance(self.message.payload, dict):  # message protocol 1 has it there
            value = self.message.payload.get(name)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a waiting message goes. ``queue=None`` drops it; ``ticket=None`` takes our header off."""

    entry: Entry
    queue: str | None
    ticket: Ticket | None = None


Choose = Callable[[Sequence[Entry]], Sequence[Move]]


class Queues(ABC):
    """The broker's side of deferring. One instance per thread or guarded by the caller's loop."""

    #: A broker that is away is noticed at once; whoever asked tries again later.
    transport_options: ClassVar[dict[str, Any]] = {"max_retries": 0}

    def __init__(self, app: Celery, namespace: str) -> None:
        self.namespace = namespace
        self._connection = app.connection_for_read(transport_options=self.transport_options)

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

    def _task_entry(self, message: Any) -> Entry | None:
        """Return the entry of a waiting task; None for a message that is none, or has no way back."""
        with contextlib.suppress(Exception):  # whatever a stranger wrote into it
            entry = Entry(message, Ticket.read(message.headers))
            if entry.task_id and entry.task_name and not entry.ticket.origin.startswith(f"{self.namespace}."):
                return entry
        return None

    def _warn_of_stranger(self, breaker: str) -> None:
        logger.warning("moved something that is no task from %s to %s", self.deferred(breaker), self.dead(breaker))

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
    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """Offer the ``scan`` oldest waiting messages, but for the first ``start``, to ``choose``; make its moves.

        The others keep their places, but what is no task goes to the dead-letter queue, so that it is in
        nobody's way. Returns the moves that were made.
        """

    @abstractmethod
    def size(self, *queues: str) -> int:
        """Number of messages that lie in some queues."""


class RedisQueues(Queues):
    """Lists on a Redis broker; kombu's order: newest first, so that an ordinary consumer could drain them."""

    transport_options: ClassVar[dict[str, Any]] = {
        "max_retries": 0,
        "socket_timeout": 5.0,
        "socket_connect_timeout": 2.0,
    }

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        scripts = resources.files("resilient_tasks.worker") / "lua"
        self._defer_source = (scripts / "defer.lua").read_text()
        self._move_source = (scripts / "move.lua").read_text()
        self._known_client: redis.Redis | None = None

    @property
    def _client(self) -> redis.Redis:
        """A client on the channel's connections; kept, because making one costs as much as a command."""
        channel = self.channel
        if self._known_client is None or self._known_client.connection_pool is not channel.pool:
            self._known_client = seams.plain_client(channel)
        return self._known_client

    def _run(self, source: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        return self._client.register_script(source)(keys=keys, args=args)

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

    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """See :meth:`Queues.sift`."""
        source = seams.list_key(self.channel, self.deferred(breaker))
        waiting = self._client.lrange(source, -start - scan, -start - 1)
        texts: dict[int, str | bytes] = {}
        entries: list[Entry] = []
        for text in reversed(waiting):
            entry = self._entry(text)
            if entry is None:
                self._set_aside(breaker, text)
            else:
                entries.append(entry)
                texts[id(entry.message)] = text
        moves = choose(entries)
        return self._make(breaker, [(texts[id(move.entry.message)], move) for move in moves]) if moves else []

    def _entry(self, text: str | bytes) -> Entry | None:
        try:
            message = self.channel.Message(seams.decode_message(text), channel=self.channel)
            deliverable = {"exchange", "routing_key"} <= message.delivery_info.keys()  # or kombu stumbles
            return self._task_entry(message) if deliverable else None
        except Exception:  # noqa: BLE001 - whatever garbage does to a decoder
            return None

    def _keys(self, breaker: str) -> list[str]:
        """Return the first two keys of the script that moves messages."""
        return [seams.list_key(self.channel, self.deferred(breaker)), seams.list_key(self.channel, self.dead(breaker))]

    def _set_aside(self, breaker: str, text: str | bytes) -> None:
        self._warn_of_stranger(breaker)
        self._run(self._move_source, self._keys(breaker), [text, 2, text])

    def _make(self, breaker: str, moves: Sequence[tuple[str | bytes, Move]]) -> list[Move]:
        keys = self._keys(breaker)
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
        return sum(self._size(queue) for queue in queues)

    def _size(self, queue: str) -> int:
        try:
            return seams.queue_size(self.channel, queue)
        except redis.ResponseError:  # a key that is no list: only a forged ticket names it
            return 0


class PublishedQueues(Queues):
    """Any other transport: durable queues without consumers, publish then acknowledge."""

    transport_options: ClassVar[dict[str, Any]] = {"max_retries": 0, "confirm_publish": True}

    def __init__(self, app: Celery, namespace: str) -> None:
        super().__init__(app, namespace)
        self._lock = threading.Lock()
        self._declared: set[str] = set()
        self._returned = False

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

    def _publish(self, message: Any, queue: str, ticket: Ticket | None) -> bool:
        """Publish straight to a queue; False if there is no such queue."""
        headers = _stripped(message.headers or {})
        headers.pop("compression", None)  # kombu has unpacked the body already
        if ticket:
            headers = ticket.write(headers)
        properties = {name: value for name, value in message.properties.items() if name not in _NOT_COPIED}
        if "expiration" in properties:  # milliseconds as text, but kombu takes seconds
            properties["expiration"] = float(properties["expiration"]) / 1000
        self._returned = False
        on_return = self._note_return if hasattr(self.channel, "events") else None  # emulated ones take everything
        Producer(self.channel, auto_declare=False, on_return=on_return).publish(
            message.body, exchange="", routing_key=queue, headers=headers, mandatory=True,
            content_type=message.content_type, content_encoding=message.content_encoding, **properties,
        )  # fmt: skip
        return not self._returned

    def _note_return(self, *_: Any) -> None:
        self._returned = True

    def _publish_to_own(self, message: Any, queue: str, ticket: Ticket | None) -> None:
        self._declare(queue)
        if not self._publish(message, queue, ticket):
            raise OperationalError(f"queue {queue} was deleted a moment ago")

    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """See :meth:`Queues.defer`."""
        queue = self.deferred(ticket.breaker)
        with self._exclusive():
            self._declare(queue)
            full = limit is not None and self._size(queue) >= limit
            if not full:
                self._publish_to_own(message, queue, ticket)
        if full:
            raise DeferredQueueFullError(ticket.breaker, limit or 0)
        if owned:
            self._acknowledge(message)
        return True

    @staticmethod
    def _acknowledge(message: Any) -> None:
        """The message is in its new place, so that cannot be undone: at worst the broker delivers a second copy."""
        try:
            message.ack()
        except Exception as exc:  # noqa: BLE001 - whatever a dead channel raises
            logger.warning("a deferred message could not be acknowledged: %s", type(exc).__name__)

    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """See :meth:`Queues.sift`."""
        queue = self.deferred(breaker)
        with self._exclusive():
            self._declare(queue)
            messages = list(_bounded(lambda: self._get(queue), start + scan))
            try:
                made = list(choose(self._tasks(breaker, messages[start:])))
                for move in made:
                    self._make(breaker, move)
                return made
            finally:
                for message in reversed(messages):
                    if not message.acknowledged:
                        message.requeue()

    def _get(self, queue: str) -> Any:
        message = self.channel.basic_get(queue)
        return None if message is None else self.channel.message_to_python(message)

    def _tasks(self, breaker: str, messages: Sequence[Any]) -> list[Entry]:
        entries = {id(message): self._task_entry(message) for message in messages}
        for message in messages:
            if entries[id(message)] is None:
                self._warn_of_stranger(breaker)
                self._make(breaker, Move(Entry(message, Ticket()), self.dead(breaker)))
        return [entry for entry in entries.values() if entry is not None]

    def _make(self, breaker: str, move: Move) -> None:
        message, dead = move.entry.message, self.dead(breaker)
        if move.queue == dead:
            self._publish_to_own(message, dead, move.ticket)
        elif move.queue is not None and not self._publish(message, move.queue, move.ticket):
            logger.error("Task %s is dead-lettered: its queue %s is gone", move.entry.task_id, move.queue)
            self._publish_to_own(message, dead, move.ticket)
        message.ack()

    def _size(self, queue: str) -> int:
        with self._connection.channel() as passing:  # a broker ends a channel that asks for a queue that is gone
            try:
                return int(passing.queue_declare(queue, passive=True).message_count)
            except self._connection.channel_errors:
                return 0

    def size(self, *queues: str) -> int:
        """See :meth:`Queues.size`."""
        with self._exclusive():
            for queue in queues:
                if queue.startswith(f"{self.namespace}."):  # others have arguments that only their owners know
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
