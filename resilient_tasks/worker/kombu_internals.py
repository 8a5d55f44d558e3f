"""How a worker takes messages off a Redis broker: kombu's channel, without the moments in which it loses some.

kombu pops a message (BRPOP) and then notes it as unacknowledged, in a second step. If the worker dies in
between, the connection is cut or the server is out of memory, the message is nowhere. Here both are one
script. Only waiting for a message is a command of its own, and changes nothing.

All that is overridden here is undocumented; ``tests/unit/test_celery_internals.py`` fails when it moves.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import resources
from queue import Empty
from time import monotonic, time
from typing import Any, NoReturn

from kombu.exceptions import DecodeError
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from redis.exceptions import NoScriptError, ResponseError

from resilient_tasks.worker.envelope import decode, decode_raw

logger = logging.getLogger("resilient_tasks")

TAKE = (resources.files("resilient_tasks.worker") / "lua" / "take.lua").read_text()
TAKE_DIGEST = hashlib.sha1(TAKE.encode(), usedforsecurity=False).hexdigest()
#: Seconds to wait at one queue before all are looked at again.
WAIT = 0.1

_POP, _TAKE, _WAIT = "pop", "take", "wait"  # what the server has been asked: by kombu's own BRPOP, the script, BLMOVE


def install(unreadable: str, control: str) -> None:
    """Let all connections that this process makes from now on take messages this way; see :class:`TakingChannel`."""
    TakingChannel.unreadable, TakingChannel.control = unreadable, control
    redis.Transport.Channel = TakingChannel
    redis.SentinelTransport.Channel = TakingSentinelChannel


class TakingQoS(redis.QoS):
    """Knows what the script has noted already; needs no memory to acknowledge."""

    def append(self, message: Any, delivery_tag: str) -> None:
        if self.channel.noted:
            virtual.QoS.append(self, message, delivery_tag)
        else:
            super().append(message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        """Acknowledge without MULTI, which a server that is out of memory refuses.

        The message first: an index entry without one does no harm. On a closed channel there is nothing to acknowledge:
        the message has been requeued, and the error would end the worker.
        """
        if self.channel.closed:
            return
        with self.channel.conn_or_acquire() as client:
            pipe = client.pipeline(transaction=False)
            pipe.hdel(self.unacked_key, delivery_tag).zrem(self.unacked_index_key, delivery_tag).execute()
        virtual.QoS.ack(self, delivery_tag)

    def restore_unacked_once(self, *args: Any, **kwargs: Any) -> None:
        """Requeue what was delivered when the channel closes; the rest comes back after its visibility timeout."""
        try:
            super().restore_unacked_once(*args, **kwargs)
        except Exception as exc:  # noqa: BLE001 - kombu fails in many ways on a half-closed connection: no worker ends by it
            logger.warning("unacknowledged messages stay with the broker for now: %s", type(exc).__name__)

    def restore_visible(self, *args: Any, **kwargs: Any) -> None:
        """Restore what dead workers have left, unless the server is out of memory."""
        try:
            super().restore_visible(*args, **kwargs)
        except ResponseError as exc:
            logger.warning("messages of dead workers cannot be restored yet: %s", exc)


class TakingChannel(redis.Channel):
    """Takes and notes each message in one step."""

    QoS = TakingQoS
    # If the server dies while a worker holds the lock on restoring, none restores until this is over; kombu: 300 s.
    unacked_mutex_expire = 30
    noted = False  # what is being delivered has been noted by the script
    unreadable = ""  # name of the queue for what kombu could make no message of
    control = ""  # name of the queue of ticks
    _in_poll: Any  # annotated, because kombu's first values are of narrower types
    _brpop_sent_at: Any
    _asked = _POP
    _all_empty = False
    _full = False
    _knows_script = False  # the server, as far as is known
    _kept_client: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tags_without_acks: set[str] = set()
        super().__init__(*args, **kwargs)

    @contextmanager
    def conn_or_acquire(self, client: Any = None) -> Iterator[Any]:
        """Yield always the same client: kombu makes one per acknowledgement, a quarter of what a task costs it."""
        if self._kept_client is None or self._kept_client.connection_pool is not self.pool:
            self._kept_client = self._create_client()
        yield client or self._kept_client

    def basic_consume(self, queue: str, no_ack: bool, callback: Any, consumer_tag: str, **kwargs: Any) -> Any:  # noqa: FBT001 - kombu's signature
        """Consume a queue; what is never acknowledged must not be noted."""
        if no_ack:
            self._tags_without_acks.add(consumer_tag)
        return super().basic_consume(queue, no_ack, callback, consumer_tag, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Take, or wait after nothing was there; :meth:`_brpop_read` reads the answer."""
        self._tags_without_acks &= self._consumers
        if not self.ack_emulation or self._tags_without_acks:  # such as Celery's of replies before it takes tasks
            self._asked = _POP
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._asked = _WAIT if self._all_empty else _TAKE
        self._in_poll = self.client.connection
        self._brpop_sent_at = monotonic()
        command = self._wait_command(queues) if self._all_empty else self._take_command(queues)
        self.client.connection.send_command(*command)

    def _take_command(self, queues: list[str]) -> list[Any]:
        lists = [self._q_for_pri(queue, priority) for priority in self.priority_steps for queue in queues]
        keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key, *lists)]
        script = ("EVALSHA", TAKE_DIGEST) if self._knows_script else ("EVAL", TAKE)
        return [*script, len(keys), *keys, time()]

    def _wait_command(self, queues: list[str]) -> list[Any]:
        """Moving the oldest message of a list to where it is waits for one, and changes nothing.

        One list at a time: tasks must not wait for the one of ticks, but a tick may wait a moment for tasks.
        """
        queue = next((queue for queue in queues if queue != self.control), queues[0])
        self._queue_cycle.rotate(queue)
        key = self.global_keyprefix + queue
        if self._full:
            return ["BRPOP", f"{key}{self.sep}nothing", WAIT]
        return ["BLMOVE", key, key, "RIGHT", "RIGHT", WAIT]

    def _brpop_read(self, **options: Any) -> Any:
        """Deliver what was taken, or end the wait; ``Empty`` if there is nothing to deliver."""
        if self._asked == _WAIT:
            self._end_wait()
        if self._asked == _POP:
            return super()._brpop_read(**options)
        try:
            taken = self._take()
            self._all_empty = not taken
            raw = self._open(*taken) if taken else None
            if raw is None:
                raise Empty
            queue = bytes_to_str(taken[0]).rsplit(self.sep, 1)[0]  # the list holds one priority of it
            self._queue_cycle.rotate(queue)
            self.noted = True
            self.connection._deliver(raw, queue)
            return True
        finally:
            self.noted = False
            self._end_poll()

    def _take(self) -> Any:
        try:
            taken = self._reply("BRPOP")
        except NoScriptError:  # another server, or the same one emptied: the next time it gets the text
            self._knows_script = False
            raise Empty from None
        self._knows_script = True
        return taken

    def _open(self, key: bytes, text: bytes) -> dict[str, Any] | None:
        """Return the message in a text; None if there is none, and the text is dead-lettered."""
        flaw = ""
        with ExitStack() as failed:  # whatever fails, nothing is lost
            queue = str(bytes_to_str(key)).removeprefix(self.global_keyprefix)  # clients of the channel add it
            failed.callback(lambda: self._put_text(queue, text, "rpush"))
            try:
                raw = decode_raw(loads, text)
                decode(self.decode_body, raw["body"], raw["properties"].get("body_encoding"))
            except DecodeError as exc:
                flaw = str(exc)
            failed.pop_all()
        if not flaw:
            return raw
        logger.error("what was in %s is moved to %s: %s", bytes_to_str(key), self.unreadable, flaw)
        try:
            self._put_text(self.unreadable, text, "lpush")
        except ResponseError as exc:
            logger.error("it cannot be kept: %s", exc)  # noqa: TRY400 - a full server, no mistake in the code
        return None

    def _put_text(self, queue: str, text: bytes, push: str) -> None:
        tag: Any = None
        with suppress(DecodeError):  # the script may have noted what is no message
            match decode(loads, text):
                case {"properties": {"delivery_tag": str(tag)}}:
                    pass
        with self.conn_or_acquire() as client:
            getattr(client, push)(queue, text)
            if tag is not None:
                client.hdel(self.unacked_key, tag)
                client.zrem(self.unacked_index_key, tag)

    def _reply(self, command: str) -> Any:
        try:
            return self.client.parse_response(self.client.connection, command)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise

    def _end_poll(self) -> None:
        self._in_poll = None
        self._flush_brpop_reauth()

    def _end_wait(self) -> NoReturn:
        self._all_empty = False
        try:
            self._reply("BLMOVE")
            self._full = False
        except ResponseError:  # out of memory, it refuses even a move that changes nothing
            self._full = True
        finally:
            self._end_poll()
        raise Empty


class TakingSentinelChannel(TakingChannel, redis.SentinelChannel):
    """The same on the master that Sentinels name."""
