"""How a worker takes messages off a Redis broker: kombu's channel, without the moments in which it loses some.

kombu pops a message (BRPOP) and then notes it as unacknowledged, in a second step. If the worker dies in
between, the connection is cut or the server is out of memory, the message is nowhere. Here both are one
script. Waiting for a message is separate from it, and changes nothing.

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
from typing import Any

from kombu.exceptions import DecodeError
from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads
from kombu.utils.scheduling import priority_cycle
from redis.exceptions import NoScriptError, ResponseError

from resilient_tasks.worker.envelope import decode, decode_raw

logger = logging.getLogger("resilient_tasks")

TAKE = (resources.files("resilient_tasks.worker") / "lua" / "take.lua").read_text()
TAKE_DIGEST = hashlib.sha1(TAKE.encode(), usedforsecurity=False).hexdigest()
#: Seconds after which the lists are looked at without a report by the server, which shows a dead connection, too.
LONGEST_WAIT = 1.0
#: The same if the server reports nothing.
POLL_INTERVAL = 0.1
#: Messages of other queues that are taken for one that is deferred. That costs the main process as much as 3 to 8 tasks
#: that run, and what is prefetched of its queue comes first: with ten, healthy tasks on other queues keep about half of
#: their rate beside a queue full of tasks that fail; taken in turn, a fifth.
TURNS = 10

# What goes on: kombu's own BRPOP, the script, a look at all lists that the server remembers, the wait for its report.
_POP, _TAKE, _WATCH, _WAIT = "pop", "take", "watch", "wait"


def install(unreadable: str) -> None:
    """Let all connections that this process makes from now on take messages this way; see :class:`TakingChannel`."""
    TakingChannel.unreadable = unreadable
    redis.Transport.Channel = TakingChannel
    redis.SentinelTransport.Channel = TakingSentinelChannel


def give_up_turns(message: Any, queue: str) -> None:
    """Take messages of other queues, as far as there are any, before the next of that whose message is deferred."""
    if isinstance(message.channel, TakingChannel):
        message.channel.turns_given_up[queue] = TURNS


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
    """Takes and notes each message in one step.

    Redis can block on many lists only by popping, and a message popped to a worker that dies is lost. So an idle worker
    looks whether any list exists, with client-side caching switched on: the server then reports the first change of
    each, by any producer. Nothing is popped, no command is pending, and two commands a second are sent.
    """

    QoS = TakingQoS
    # If the server dies while a worker holds the lock on restoring, none restores until this is over; kombu: 300 s.
    unacked_mutex_expire = 30
    noted = False  # what is being delivered has been noted by the script
    unreadable = ""  # name of the queue for what kombu could make no message of
    _in_poll: Any  # annotated, because kombu's first values are of narrower types
    _brpop_sent_at: Any
    _asked = _POP
    _all_empty = False
    _tracked_by: Any = None  # the socket on which the server reports changes
    _can_track = True  # as far as is known
    _wait_until = 0.0
    _knows_script = False  # the server, as far as is known
    _kept_client: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._tags_without_acks: set[str] = set()
        self.turns_given_up: dict[str, int] = {}  # by queue
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

    def _connparams(self, asynchronous: bool = False) -> dict[str, Any]:  # noqa: FBT001, FBT002 - kombu's signature
        """Return the settings of connections; that on which messages are taken needs RESP3 for the server's reports."""
        params: dict[str, Any] = super()._connparams(asynchronous=asynchronous)
        return {**params, "protocol": 3} if asynchronous else params

    def _update_queue_cycle(self) -> None:
        super()._update_queue_cycle()
        self._wait_until = 0.0  # the lists are others

    def _brpop_start(self, timeout: float | None = None) -> None:
        """Take, or wait after nothing was there; :meth:`_brpop_read` reads the answer."""
        if self._asked == _WAIT and monotonic() < self._wait_until:
            return
        connection = self.client.connection
        self._tags_without_acks &= self._consumers
        if not self.ack_emulation or self._tags_without_acks:  # such as Celery's of replies before it takes tasks
            if self._is_tracked():  # a report would look like BRPOP's answer
                connection.send_command("CLIENT", "TRACKING", "OFF")
                self._reply("CLIENT")
                self._tracked_by = None
            self._asked = _POP
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        if self.turns_given_up and not isinstance(self._queue_cycle, priority_cycle):
            queues = sorted(queues, key=self.turns_given_up.__contains__)
        lists = [
            self.global_keyprefix + self._q_for_pri(queue, priority)
            for priority in self.priority_steps
            for queue in queues
        ]
        self._asked = _WATCH if self._all_empty else _TAKE
        self._in_poll = connection
        self._brpop_sent_at = monotonic()
        commands = self._watch_commands(lists) if self._all_empty else self._take_commands(lists)
        connection.send_packed_command(connection.pack_commands(commands))

    def _is_tracked(self) -> bool:
        return self._tracked_by is not None and self._tracked_by is self.client.connection._sock

    def _take_commands(self, lists: list[str]) -> list[list[Any]]:
        keys = [self.global_keyprefix + key for key in (self.unacked_key, self.unacked_index_key)] + lists
        script = ("EVALSHA", TAKE_DIGEST) if self._knows_script else ("EVAL", TAKE)
        take = [*script, len(keys), *keys, time()]
        # No reports unless they are waited for: kombu drops a connection on which one arrives while its window is full.
        return [["CLIENT", "TRACKING", "OFF"], take] if self._is_tracked() else [take]

    def _watch_commands(self, lists: list[str]) -> list[list[Any]]:
        if self._can_track:
            return [["CLIENT", "TRACKING", "ON"], ["EXISTS", *lists]]
        return [["BRPOP", f"{lists[0]}{self.sep}nothing", POLL_INTERVAL]]

    def _brpop_read(self, **options: Any) -> Any:
        """Deliver what was taken, or end the wait; ``Empty`` if there is nothing to deliver."""
        if self._asked == _POP:
            return super()._brpop_read(**options)
        if self._asked != _TAKE:
            self._watch() if self._asked == _WATCH else self._read_report()
            raise Empty
        try:
            taken = self._take()
            self._all_empty = not taken
            raw = self._open(*taken) if taken else None
            if raw is None:
                raise Empty
            queue = bytes_to_str(taken[0]).rsplit(self.sep, 1)[0]  # the list holds one priority of it
            self._queue_cycle.rotate(queue)
            given_up = list(self.turns_given_up.items())  # other threads add to it
            self.turns_given_up = {each: turns - 1 for each, turns in given_up if turns > 1}
            self.noted = True
            self.connection._deliver(raw, queue)
            return True
        finally:
            self.noted = False
            self._end_poll()

    def _watch(self) -> None:
        """Learn whether all lists are empty; if so, the wait begins."""
        connection = self.client.connection
        try:
            if not self._can_track:
                self._reply("BRPOP")
                self._all_empty = False
                return
            try:
                self._reply("CLIENT")
                self._tracked_by = connection._sock
            except ResponseError as exc:
                logger.info("tasks are noticed up to %s s late: the broker reports no changes: %s", POLL_INTERVAL, exc)
                self._can_track = False
            self._all_empty = not self._reply("EXISTS") and not connection.can_read(timeout=0)
            if self._all_empty and self._can_track:
                self._asked, self._wait_until = _WAIT, monotonic() + LONGEST_WAIT
        finally:
            self._end_poll()

    def _read_report(self) -> None:
        """Read that a list has changed; more of such reports are skipped with the next answer."""
        self._all_empty, self._wait_until = False, 0.0
        self._reply("", report=True)

    def _take(self) -> Any:
        if self._is_tracked():
            self._reply("CLIENT")
            self._tracked_by = None
        try:
            taken = self._reply("BRPOP")  # under this name kombu takes its prefix off the key
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

    def _reply(self, command: str, *, report: bool = False) -> Any:
        client = self.client
        try:
            if report:
                return client.connection.read_response(push_request=True)
            return client.parse_response(client.connection, command)
        except self.connection_errors:
            self.client.connection.disconnect()
            raise

    def _end_poll(self) -> None:
        self._in_poll = None
        self._flush_brpop_reauth()


class TakingSentinelChannel(TakingChannel, redis.SentinelChannel):
    """The same on the master that Sentinels name."""
