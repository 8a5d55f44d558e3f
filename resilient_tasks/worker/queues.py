"""Deferred and dead-letter queues on the broker: putting messages in, sifting them out.

A message is in exactly one place. On Redis each operation is one conditional script; on any other
transport it is publish, then acknowledge, so that a crash between the two leaves a second copy and
never none.
"""

from __future__ import annotations

import contextlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from celery import Celery
from kombu import Queue
from kombu.exceptions import DecodeError, OperationalError

from resilient_tasks.core.memory import Memory
from resilient_tasks.core.names import parent_of
from resilient_tasks.monitor.deployment import ServerFacts
from resilient_tasks.monitor.log import about
from resilient_tasks.worker import seams
from resilient_tasks.worker.ticket import Ticket

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
            logger.error(what, queue.name, error)  # noqa: TRY400 - the broker's words say it all


def _exists(connection: Any, queue: str) -> bool:
    with connection.channel() as passing:
        try:
            passing.queue_declare(queue, passive=True)
        except connection.channel_errors:
            return False
    return True


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

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it says for machines."""
        return about(self.task_id, self.task_name, self.ticket.breaker)

    def unreadable(self) -> DecodeError | None:
        """Return the error of a message whose body no worker can decode."""
        try:
            _ = self.message.payload
        except Exception as exc:  # noqa: BLE001 - whatever garbage does to a decoder
            return DecodeError(f"the message cannot be decoded: {type(exc).__name__}")  # its text may hold secrets
        return None

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

    @property
    def resumes(self) -> bool:
        """Whether the message goes back to where it came from."""
        return self.queue is not None and not (self.ticket and self.ticket.died_at)


@dataclass(frozen=True, slots=True)
class Letter:
    """One message in a dead-letter queue.

    Args:
        raw: the message as it lies there; on brokers that show only parts of it, its body.
        entry: what it says about its task; None if it is no task's message, or cannot be decoded.
        message: kombu's Message as it is held open, on brokers that hold messages.
    """

    raw: bytes
    entry: Entry | None
    message: Any = None


Choose = Callable[[Sequence[Entry]], Sequence[Move]]


class Queues(ABC):
    """The broker's side of deferring. One instance per thread or guarded by the caller's loop."""

    #: A broker that is away is noticed at once; whoever asked tries again later.
    transport_options: ClassVar[dict[str, Any]] = {"max_retries": 0}

    def __init__(self, app: Celery, namespace: str) -> None:
        self.namespace = namespace
        self._connection = app.connection_for_read(transport_options=self._options(app))
        self._accept = seams.accepted_types(app.conf.accept_content)

    def _options(self, _app: Celery) -> dict[str, Any]:
        """Return the transport options of our connection, which are added to the app's."""
        return self.transport_options

    def deferred(self, breaker: str) -> str:
        """Name of a breaker's deferred queue."""
        return f"{self.namespace}.deferred.{breaker}"

    def dead(self, breaker: str) -> str:
        """Name of a breaker's dead-letter queue; children share their parent's."""
        return f"{self.namespace}.dead.{parent_of(breaker) or breaker}"

    def place(self, ticket: Ticket) -> str:
        """Name of the queue for a message that is put aside with a ticket."""
        return self.dead(ticket.breaker) if ticket.died_at else self.deferred(ticket.breaker)

    @property
    def channel(self) -> Any:
        """A channel on a connection of our own."""
        return self._connection.default_channel

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What a broker that is away, or refuses something, raises."""
        return *self._connection.connection_errors, *self._connection.channel_errors, OperationalError, OSError

    def close(self) -> None:
        """Close the connection; it reopens when used again."""
        with contextlib.suppress(Exception):
            self._connection.close()

    def _task_entry(self, breaker: str, message: Any) -> Entry | None:
        """Return the entry of a task that lies in a breaker's queue; None for no task's, or one without a way back."""
        with contextlib.suppress(Exception):  # whatever a stranger wrote into it
            message.accept = self._accept
            entry = Entry(message, replace(Ticket.read(message.headers), breaker=breaker))
            if entry.task_id and entry.task_name and not self._is_own(entry.ticket.origin, breaker):
                return entry
        return None

    def _is_own(self, queue: str, breaker: str) -> bool:
        """Whether a queue is one of ours, to which what waits for a breaker can never go back."""
        return queue in (f"{self.namespace}.control", self.deferred(breaker), self.dead(breaker))

    def _warn_of_stranger(self, breaker: str) -> None:
        logger.warning("moved something that is no task from %s to %s", self.deferred(breaker), self.dead(breaker))

    @abstractmethod
    def defer(self, message: Any, ticket: Ticket, *, owned: bool, limit: int | None) -> bool:
        """Put a delivered message aside, into the queue that its ticket says (:meth:`place`).

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
    def put_back(self, message: Any, queue: str, ticket: Ticket, *, owned: bool) -> None:
        """Put a delivered message back to the queue it came from, as the next to be taken where that can be done.

        Args:
            message: the message as it was consumed.
            queue: where it came from.
            ticket: what it shall say about itself from now on.
            owned: the broker still holds it as unacknowledged.
        """

    @abstractmethod
    def sift(self, breaker: str, scan: int, choose: Choose, *, start: int = 0) -> list[Move]:
        """Offer the ``scan`` oldest waiting messages, but for the first ``start``, to ``choose``; make its moves.

        The others keep their places, but what is no task goes to the dead-letter queue, so that it is in
        nobody's way. Returns the moves that were made.
        """

    @abstractmethod
    def letters(self, breaker: str) -> AbstractContextManager[Iterator[Letter]]:
        """Open the dead-letter queue of a breaker: everything in it, oldest first, and it stays there."""

    @abstractmethod
    def revive(self, breaker: str, letter: Letter, queue: str | None) -> bool:
        """Move a letter, while its queue is open, to another queue without our header, or drop it.

        Returns:
            False if it is no longer there, or there is no such queue.
        """

    @abstractmethod
    def size(self, *queues: str) -> int:
        """Number of messages that lie in some queues."""

    def found(self) -> list[str]:
        """Return breakers in whose deferred queues something lies, some at a time; none if the broker does not say."""
        return []

    def memory(self) -> Memory | None:
        """Return how much memory the broker uses; None if it does not say."""
        return None

    def server_facts(self) -> ServerFacts | None:
        """Return what the broker's server tells of itself; None if it is no Redis."""
        return None


def without_ticket(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message's headers as they were before it was ever deferred."""
    headers = dict(headers)
    Ticket.take(headers)
    return headers
