"""Deferred queues on the brokers: on Redis or Valkey each operation is one conditional script.

On any other transport it is publish with confirmation, then acknowledge.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from importlib import resources
from typing import Any, ClassVar

import redis
from celery import Celery
from kombu import Producer
from kombu.exceptions import DecodeError, OperationalError

from resilient_tasks.core.memory import Memory, ServerFacts
from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.envelope import Envelope, decode, decode_raw, without_envelope
from resilient_tasks.worker.queues import Entry, Move, Queues, declare, own_queue

logger = logging.getLogger("resilient_tasks")


def open_queues(app: Celery, namespace: str) -> Queues:
    with app.connection_for_read() as unused:
        is_redis = unused.transport.driver_type == "redis"
    return (RedisQueues if is_redis else PublishedQueues)(app, namespace)


# --- Redis ---------------------------------------------------------------------------------------------

#: Messages that are fetched in one go.
_PAGE = 500
#: Parts of the keyspace that are searched for deferred queues in one go, and keys in each.
_SCANS, _SCANNED = 20, 1000
#: Puts a message into a list and takes it back in one step.
_CHECK = "redis.call('LPUSH', KEYS[1], ARGV[1]); return redis.call('LREM', KEYS[1], 1, ARGV[1])"
#: What a pattern of Redis takes for more than itself.
_SPECIAL, _ITSELF = re.compile(r"[]*?[^\\]"), r"\\\g<0>"
#: Bytes of messages to read, and to move, at a time.
_REPLY_SIZE = 1_000_000
#: What the script that moves messages says of one whose queue is no list.
_DEAD_LETTERED = 2


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
        self._scripts: dict[str, Callable[..., Any]] = {}  # of that client, by their texts
        self._cursor = 0

    def _options(self, app: Celery) -> dict[str, Any]:
        """Return our options; sentinels are asked as the app asks them, but no longer than a server."""
        of_the_app = app.conf.broker_transport_options.get("sentinel_kwargs") or {}
        limits = {name: self.transport_options[name] for name in ("socket_timeout", "socket_connect_timeout")}
        return {
            **self.transport_options,
            "sentinel_kwargs": {**limits, **of_the_app, "retry": celery_internals.no_retry()},
        }

    @property
    def _client(self) -> redis.Redis:
        """A client on the channel's connections; kept, because making one costs as much as a command."""
        channel = self.channel
        if self._known_client is None or self._known_client.connection_pool is not channel.pool:
            self._known_client, self._scripts = celery_internals.plain_client(channel), {}
        return self._known_client

    def _run(self, source: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        client = self._client
        script = self._scripts.get(source) or self._scripts.setdefault(source, client.register_script(source))
        return script(keys=keys, args=args)

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        return (redis.exceptions.NoPermissionError,)

    def _check(self, queue: str) -> None:
        self._run(_CHECK, [celery_internals.list_key(self.channel, queue)], ["resilient-tasks-check"])

    def put(
        self, message: Any, queue: str, envelope: Envelope | None, *,
        owned: bool, limit: int | None = None, first: bool = False,
    ) -> bool:  # fmt: skip
        raw = self._sent(message, envelope)
        raw["properties"] = {**raw["properties"], "delivery_tag": celery_internals.new_delivery_tag(self.channel)}
        tag = message.delivery_tag if owned and celery_internals.emulates_acks(message.channel) else ""
        keys = [*celery_internals.unacked_keys(self.channel), self._key(queue, raw)]
        bound, push = "" if limit is None else str(limit), "RPUSH" if first else "LPUSH"
        answer = int(self._run(self._defer_source, keys, [tag, celery_internals.encode_message(raw), bound, push]))
        if answer < 0:
            raise DeferredQueueFullError(envelope.breaker if envelope else "", limit)
        if owned:
            celery_internals.forget_delivery(message)
        return bool(answer)

    @contextlib.contextmanager
    def peek(self, queue: str, breaker: str, *, start: int = 0, most: int = 0) -> Iterator[Iterator[Entry]]:
        replies = self._oldest(celery_internals.list_key(self.channel, queue), start, most)
        yield (self._decoded(queue, breaker, text) for text in itertools.chain.from_iterable(replies))

    def _decoded(self, queue: str, breaker: str, text: bytes) -> Entry:
        try:
            message = decode(self.channel.Message, decode_raw(celery_internals.decode_message, text), self.channel)
        except DecodeError as exc:
            return Entry(None, Envelope(breaker=breaker), text, str(exc))
        return self._entry(queue, breaker, message, text)

    def move(self, queue: str, moves: Sequence[Move]) -> Iterator[Move]:
        if not moves:
            return
        dead = self.dead(moves[0].entry.envelope.breaker)
        keys = [celery_internals.list_key(self.channel, queue), celery_internals.list_key(self.channel, dead)]
        args: list[str | bytes | int] = []
        for move in moves:
            index, arrives = 0, move.entry.raw
            if move.queue is not None:
                raw = None if move.entry.flaw else self._sent(move.entry.message, move.envelope)
                key = self._key(move.queue, raw)
                if key not in keys[1:]:
                    keys.append(key)
                index = keys.index(key, 1) + 1
                arrives = arrives if raw is None else celery_internals.encode_message(raw).encode()
            args += [move.entry.raw, index, arrives]
        moved = self._run(self._move_source, keys, args)
        for move, made in zip(moves, moved, strict=True):
            if made:
                yield replace(move, queue=dead) if made == _DEAD_LETTERED else move

    def _key(self, queue: str, raw: dict[str, Any] | None) -> str:
        """Return the list that a message goes to; in queues of ours there is but one priority."""
        priority = 0 if raw is None or self.owns(queue) else celery_internals.message_priority(self.channel, raw)
        return celery_internals.list_key(self.channel, queue, priority)

    @staticmethod
    def _sent(message: Any, envelope: Envelope | None) -> dict[str, Any]:
        raw: dict[str, Any] = message.serializable()
        raw["headers"] = envelope.write(raw["headers"]) if envelope else without_envelope(raw["headers"])
        return raw

    def _oldest(self, key: str, start: int, most: int) -> Iterator[list[bytes]]:
        """Read a list from its oldest message on, but for the first ``start``, reply by reply.

        Large messages come a few at a time: until it is sent, a reply takes memory of the server as well.
        """
        count = 1
        while True:
            reply: list[Any] = self._client.lrange(key, -start - count, -start - 1)
            yield reply[::-1]
            if len(reply) < count:
                return
            start, most = start + count, most - count
            page = most if 0 < most < _PAGE else _PAGE
            count = max(1, min(page, 4 * count, _REPLY_SIZE * count // (sum(map(len, reply)) or 1)))

    def size(self, *queues: str) -> int:
        return sum(map(self._size, queues))

    def _size(self, queue: str) -> int:
        try:
            return celery_internals.queue_size(self.channel, queue)
        except redis.ResponseError:  # a key that is no list: only a forged header names it
            return 0

    def found(self) -> list[str]:
        prefix: str = celery_internals.list_key(self.channel, self.deferred(""))
        pattern, keys = f"{_SPECIAL.sub(_ITSELF, prefix)}*", set[Any]()
        for _ in range(_SCANS):
            self._cursor, some = self._client.scan(self._cursor, match=pattern, count=_SCANNED)
            keys.update(some)
            if not self._cursor:
                break
        return sorted(key.decode(errors="replace").removeprefix(prefix) for key in keys)

    def memory(self) -> Memory | None:
        return Memory.read(self._client.info("memory"))

    def server_facts(self) -> ServerFacts:
        saves = None
        with contextlib.suppress(redis.ResponseError):  # managed servers keep their settings to themselves
            saves = self._client.config_get("save").get("save")
        return ServerFacts.of("broker", self._client.info("default"), saves)


# --- any other broker ----------------------------------------------------------------------------------

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
        if queue not in self._declared:
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
        is_unchanged = (envelope or Envelope()) == Envelope.read(message.headers)
        if owned and first and is_unchanged and not _requeued_often(message):
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
    def peek(self, queue: str, breaker: str, *, start: int = 0, most: int = 0) -> Iterator[Iterator[Entry]]:  # noqa: ARG002 - fetched one by one
        held: list[Any] = []
        with self._exclusive():
            self._declare(queue)
            try:
                yield itertools.islice(self._entries(queue, breaker, held), start, None)
            finally:
                for message in held if self._emulated else reversed(held):
                    if not message.acknowledged:
                        self._return(message, queue)

    def _entries(self, queue: str, breaker: str, held: list[Any]) -> Iterator[Entry]:
        while (message := self.channel.basic_get(queue)) is not None:
            message = self.channel.message_to_python(message)
            held.append(message)
            raw = message.body.encode() if isinstance(message.body, str) else bytes(message.body or b"")
            yield self._entry(queue, breaker, message, raw)

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
