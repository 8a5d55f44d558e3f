"""Deferred and dead-letter queues on the broker, by four primitives: put, peek, move and size.

A message is in exactly one place. On Redis each move is one conditional script; on any other transport it is
publish, then acknowledge, so that a crash between the two leaves a second copy and never none.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from celery import Celery
from kombu import Queue
from kombu.exceptions import DecodeError

from resilient_tasks.core.memory import Memory, ServerFacts
from resilient_tasks.core.model import is_child, parent_of
from resilient_tasks.monitor.events import about
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.envelope import Envelope, payload_of, task_fields

logger = logging.getLogger("resilient_tasks")

#: AMQP's ACCESS_REFUSED, and PRECONDITION_FAILED: there is such a queue, with other arguments than ours.
_NO_RIGHTS, _EXISTS_OTHERWISE = 403, 406
_reported: set[str] = set()  # queues that exist with other arguments


def own_queue(name: str, arguments: Mapping[str, str] | None = None) -> Queue:
    """Return one of our queues: durable, and reached by its name through the default exchange.

    Whatever an app sets for its own queues does not touch it: no process looks our queues up by name.
    """
    return Queue(name, durable=True, queue_arguments=dict(arguments or {}))


def declare(connection: Any, queue: Queue) -> None:
    """Declare one of our queues; one that exists is used as it is, by users without the right to declare it, too."""
    try:
        with connection.channel() as passing:  # a broker ends the channel on which it refuses something
            queue(passing).declare()
    except connection.channel_errors as error:
        code = getattr(error, "reply_code", None)
        if code == _NO_RIGHTS and _exists(connection, queue.name):
            return
        if code != _EXISTS_OTHERWISE:
            raise
        if queue.name not in _reported:
            _reported.add(queue.name)
            what = "queue %s exists otherwise than declared here (%s) and is used as it is: once empty, delete it"
            logger.error(what, queue.name, error)  # noqa: TRY400 - the broker's error says it all


def _exists(connection: Any, queue: str) -> bool:
    with connection.channel() as passing:
        try:
            passing.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return False
    return True


@dataclass(frozen=True, slots=True)
class Entry:
    """One message in a deferred or dead-letter queue."""

    message: Any  # kombu's Message; None if none can be made of it
    envelope: Envelope
    raw: bytes = b""  # as it is stored; on brokers that show only parts of a message, its body
    flaw: str = ""  # why it is no task's message, or cannot go back

    @property
    def task_id(self) -> str:
        return self._field("id")

    @property
    def task_name(self) -> str:
        return self._field("task")

    @property
    def log_fields(self) -> dict[str, str]:
        return about(self.task_id, self.task_name, self.envelope.breaker)

    def unreadable(self) -> DecodeError | None:
        try:
            payload_of(self.message)
        except DecodeError as exc:
            return exc
        return None

    def _field(self, name: str) -> str:
        """Return the id or the name of the task; "" if the message has none."""
        headers = self.message.headers or {}
        value = headers[name] if name in headers else task_fields(self.message).get(name)
        return value if isinstance(value, str) else ""


@dataclass(frozen=True, slots=True)
class Move:
    """Where a waiting message goes. ``queue=None`` drops it; ``envelope=None`` takes our header off."""

    entry: Entry
    queue: str | None
    envelope: Envelope | None = None

    @property
    def resumes(self) -> bool:
        return self.queue is not None and not self.entry.flaw and not (self.envelope and self.envelope.died_at)


class Queues(ABC):
    """The broker's side of deferring. One instance per thread or guarded by the caller's loop."""

    #: An unavailable broker is noticed at once; the caller tries again later.
    transport_options: ClassVar[dict[str, Any]] = {"max_retries": 0}

    def __init__(self, app: Celery, namespace: str) -> None:
        self.namespace = namespace
        self._connection = app.connection_for_read(transport_options=self._options(app))
        self._accept = celery_internals.accepted_types(app.conf.accept_content)

    def _options(self, _app: Celery) -> dict[str, Any]:
        """Return the transport options of our connection, which are added to the app's."""
        return self.transport_options

    def deferred(self, breaker: str) -> str:
        return f"{self.namespace}.deferred.{breaker}"

    def dead(self, breaker: str) -> str:
        return f"{self.namespace}.dead.{parent_of(breaker) or breaker}"

    def owns(self, queue: str) -> bool:
        """Whether a queue is one of ours: nothing that waits goes back to one."""
        ours = self.deferred(""), f"{self.namespace}.dead."
        return queue.startswith(ours) or queue == f"{self.namespace}.control"

    @property
    def channel(self) -> Any:
        return self._connection.default_channel

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What a broker that is unavailable, or refuses something, raises."""
        return celery_internals.broker_errors(self._connection)

    @property
    def refusals(self) -> tuple[type[Exception], ...]:
        """What it raises if it refuses a user something."""
        return tuple(self._connection.channel_errors)

    def check(self, queue: str) -> Exception | None:
        """Try to put a message into one of our queues, and to take one, and change nothing; return what is refused."""
        try:
            self._check(queue)
        except self.refusals as error:
            return error
        return None

    @abstractmethod
    def _check(self, queue: str) -> None: ...

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        with contextlib.suppress(*self.errors):
            self._connection.close()

    def _entry(self, queue: str, breaker: str, message: Any, raw: bytes) -> Entry:
        """Return what a message in one of a breaker's queues says about its task."""
        message.accept = self._accept
        envelope = Envelope.read(message.headers)
        if envelope.breaker != breaker and (
            queue == self.deferred(breaker)
            or not (is_child(envelope.breaker) and parent_of(envelope.breaker) == breaker)
        ):
            envelope = replace(envelope, breaker=breaker)
        try:
            fields = task_fields(message)
        except DecodeError as exc:
            return Entry(message, envelope, raw, str(exc))
        flaw = "" if all(isinstance(fields.get(name), str) and fields[name] for name in ("id", "task")) else "no task"
        if envelope.origin in (self.deferred(breaker), self.dead(breaker), f"{self.namespace}.control"):
            flaw = f"it comes from {envelope.origin}"
        return Entry(message, envelope, raw, flaw)

    @abstractmethod
    def put(
        self, message: Any, queue: str, envelope: Envelope | None, *,
        owned: bool, limit: int | None = None, first: bool = False,
    ) -> bool:  # fmt: skip
        """Put a delivered message into one of our queues, or into the one that it came from.

        ``owned``: the broker still holds it as unacknowledged, as under late acknowledgement; ``first``: it is the next
        to be taken, where that can be done. False if the message is no longer ours because the broker has restored it.
        DeferredQueueFullError if the queue holds ``limit`` messages; after one of :attr:`errors` the message is where
        it was.
        """

    @abstractmethod
    def peek(
        self, queue: str, breaker: str, *, start: int = 0, most: int = 0
    ) -> AbstractContextManager[Iterator[Entry]]:
        """Open one of a breaker's queues: its messages from number ``start`` on, oldest first, stay where they are.

        A caller that knows that it wants ``most`` says so: no more need be fetched.
        """

    @abstractmethod
    def move(self, queue: str, moves: Sequence[Move]) -> Iterator[Move]:
        """Move messages out of a queue that is open by :meth:`peek`, and yield the moves as they were made.

        What another process has moved is left out; what has no queue to go to any more is dead-lettered, or stays so.
        """

    @abstractmethod
    def size(self, *queues: str) -> int: ...

    def found(self) -> list[str]:
        """Return breakers with messages in their deferred queues, some at a time; none if the broker does not say."""
        return []

    def memory(self) -> Memory | None:
        return None

    def server_facts(self) -> ServerFacts | None:
        return None
