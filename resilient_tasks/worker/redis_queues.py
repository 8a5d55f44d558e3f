"""Deferred queues on a Redis or Valkey broker: each operation is one conditional script."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from typing import Any, ClassVar

import redis
from celery import Celery

from resilient_tasks.core.memory import Memory
from resilient_tasks.errors import DeferredQueueFullError
from resilient_tasks.monitor.deployment import ServerFacts
from resilient_tasks.worker import seams
from resilient_tasks.worker.queues import Choose, Entry, Letter, Move, Queues, without_ticket
from resilient_tasks.worker.ticket import Ticket

logger = logging.getLogger("resilient_tasks")

#: Messages that are fetched in one go.
_PAGE = 500
#: Parts of the keyspace that are searched for deferred queues in one go, and keys in each.
_SCANS, _SCANNED = 20, 1000
#: What a pattern of Redis takes for more than itself.
_SPECIAL, _ITSELF = re.compile(r"[]*?[^\\]"), r"\\\g<0>"
#: Bytes of messages to read, and to move, at a time.
_REPLY_SIZE = 1_000_000


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
        return {**self.transport_options, "sentinel_kwargs": {**limits, **of_the_app, "retry": seams.no_retry()}}

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
        destination = seams.list_key(self.channel, self.place(ticket))
        bound = "" if limit is None else str(limit)
        answer = self._move_delivered(
            message, destination, _with_ticket(message, ticket), owned=owned, push="LPUSH", bound=bound
        )
        if answer < 0:
            raise DeferredQueueFullError(ticket.breaker, limit)
        return bool(answer)

    def put_back(self, message: Any, queue: str, ticket: Ticket, *, owned: bool) -> None:
        """See :meth:`Queues.put_back`."""
        raw = _with_ticket(message, ticket if ticket.breaker else None)
        destination = seams.list_key(self.channel, queue, seams.message_priority(self.channel, raw))
        self._move_delivered(message, destination, raw, owned=owned, push="RPUSH")

    def _move_delivered(
        self, message: Any, destination: str, raw: dict[str, Any], *, owned: bool, push: str, bound: str = ""
    ) -> int:
        raw["properties"] = {**raw["properties"], "delivery_tag": seams.new_delivery_tag(self.channel)}
        tag = message.delivery_tag if owned and seams.emulates_acks(message.channel) else ""
        keys = [*seams.unacked_keys(self.channel), destination]
        answer = int(self._run(self._defer_source, keys, [tag, seams.encode_message(raw), bound, push]))
        if owned and answer >= 0:
            seams.forget_delivery(message)
        return answer

    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """See :meth:`Queues.sift`."""
        source = seams.list_key(self.channel, self.deferred(breaker))
        waiting: list[bytes] = []
        for reply in self._oldest(source, start, page=min(scan, _PAGE)):
            waiting += reply
            if len(waiting) >= scan or _size_of(waiting) >= _REPLY_SIZE:
                break
        texts: dict[int, str | bytes] = {}
        entries: list[Entry] = []
        for text in waiting[:scan]:
            entry = self._entry(breaker, text)
            if entry is None:
                self._set_aside(breaker, text)
            else:
                entries.append(entry)
                texts[id(entry.message)] = text
        moves = choose(entries)
        return self._make(breaker, [(texts[id(move.entry.message)], move) for move in moves]) if moves else []

    def _entry(self, breaker: str, text: str | bytes) -> Entry | None:
        try:
            message = self.channel.Message(seams.decode_message(text), channel=self.channel)
            deliverable = {"exchange", "routing_key"} <= message.delivery_info.keys()  # or kombu stumbles
            return self._task_entry(breaker, message) if deliverable else None
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
            if move.queue == self.dead(breaker):
                index = 2
            elif move.queue is not None:
                key = seams.list_key(self.channel, move.queue, seams.message_priority(self.channel, raw))
                if key not in keys[1:]:
                    keys.append(key)
                index = keys.index(key, 1) + 1
            args += [text, index, seams.encode_message(raw)]
        moved = self._run(self._move_source, keys, args)
        return [move for (_, move), done in zip(moves, moved, strict=True) if done]

    @contextmanager
    def letters(self, breaker: str) -> Iterator[Iterator[Letter]]:
        """See :meth:`Queues.letters`."""
        yield self._letters(breaker)

    def _letters(self, breaker: str) -> Iterator[Letter]:
        key = seams.list_key(self.channel, self.dead(breaker))
        for text in itertools.chain.from_iterable(self._oldest(key)):
            yield Letter(text, self._entry(breaker, text))

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

    def revive(self, breaker: str, letter: Letter, queue: str | None) -> bool:
        """See :meth:`Queues.revive`."""
        dead = seams.list_key(self.channel, self.dead(breaker))
        destination, raw, arrives = dead, letter.raw, 0
        if queue is not None and letter.entry is not None:
            message = _with_ticket(letter.entry.message, None)
            destination = seams.list_key(self.channel, queue, seams.message_priority(self.channel, message))
            raw, arrives = seams.encode_message(message).encode(), 3
        return bool(self._run(self._move_source, [dead, dead, destination], [letter.raw, arrives, raw]) == [1])

    def size(self, *queues: str) -> int:
        """See :meth:`Queues.size`."""
        return sum(self._size(queue) for queue in queues)

    def found(self) -> list[str]:
        """See :meth:`Queues.found`. Each time it goes on in the keyspace where it has ended before."""
        prefix: str = seams.list_key(self.channel, self.deferred(""))
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
        """See :meth:`Queues.memory`."""
        return Memory.read(self._client.info("memory"))

    def server_facts(self) -> ServerFacts:
        """See :meth:`Queues.server_facts`."""
        saves = None
        with suppress(redis.ResponseError):  # managed servers keep their settings to themselves
            saves = self._client.config_get("save").get("save")
        return ServerFacts.of("broker", self._client.info("default"), saves)

    def _size(self, queue: str) -> int:
        try:
            return seams.queue_size(self.channel, queue)
        except redis.ResponseError:  # a key that is no list: only a forged ticket names it
            return 0


def _size_of(texts: Sequence[bytes]) -> int:
    return sum(map(len, texts)) or 1


def _with_ticket(message: Any, ticket: Ticket | None) -> dict[str, Any]:
    raw: dict[str, Any] = message.serializable()
    raw["headers"] = ticket.write(raw["headers"]) if ticket else without_ticket(raw["headers"])
    return raw
