"""Deferred queues on a Redis or Valkey broker: each operation is one conditional script."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib import resources
from typing import Any, ClassVar

import redis
from celery import Celery
from kombu.exceptions import DecodeError

from resilient_tasks.core.memory import Memory, ServerFacts
from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.envelope import Envelope, decode, decode_raw, without_envelope
from resilient_tasks.worker.queues import Entry, Move, Queues

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
            self._known_client = celery_internals.plain_client(channel)
        return self._known_client

    def _run(self, source: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        return self._client.register_script(source)(keys=keys, args=args)

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

    @contextmanager
    def peek(self, queue: str, breaker: str, *, start: int = 0) -> Iterator[Iterator[Entry]]:
        texts = itertools.chain.from_iterable(self._oldest(celery_internals.list_key(self.channel, queue), start))
        yield (self._decoded(queue, breaker, text) for text in texts)

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
        """Return a message as it is sent, with an envelope or without any."""
        raw: dict[str, Any] = message.serializable()
        raw["headers"] = envelope.write(raw["headers"]) if envelope else without_envelope(raw["headers"])
        return raw

    def _oldest(self, key: str, start: int = 0, page: int = _PAGE) -> Iterator[list[bytes]]:
        """Read a list from its oldest message on, but for the first ``start``, reply by reply.

        Large messages come a few at a time: until it is sent, a reply takes memory of the server as well.
        """
        count = 1
        while True:
            reply: list[Any] = self._client.lrange(key, -start - count, -start - 1)
            yield reply[::-1]
            if len(reply) < count:
                return
            start += count
            count = max(1, min(page, _REPLY_SIZE * count // _size_of(reply)))

    def size(self, *queues: str) -> int:
        return sum(map(self._size, queues))

    def _size(self, queue: str) -> int:
        try:
            return celery_internals.queue_size(self.channel, queue)
        except redis.ResponseError:  # a key that is no list: only a forged header names it
            return 0

    def found(self) -> list[str]:
        prefix: str = celery_internals.list_key(self.channel, self.deferred(""))
        keys: set[Any] = set()
        for _ in range(_SCANS):
            self._cursor, some = self._client.scan(
                self._cursor, match=f"{_SPECIAL.sub(_ITSELF, prefix)}*", count=_SCANNED
            )
            keys.update(some)
            if not self._cursor:
                break
        return sorted(key.decode(errors="replace").removeprefix(prefix) for key in keys)

    def memory(self) -> Memory | None:
        return Memory.read(self._client.info("memory"))

    def server_facts(self) -> ServerFacts:
        saves = None
        with suppress(redis.ResponseError):  # managed servers keep their settings to themselves
            saves = self._client.config_get("save").get("save")
        return ServerFacts.of("broker", self._client.info("default"), saves)


def _size_of(texts: Sequence[bytes]) -> int:
    return sum(map(len, texts)) or 1
