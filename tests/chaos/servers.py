"""The servers of a chaos run, each of which can be killed, frozen and brought back with its data."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import redis

from workers.processes import LOCALHOST, Program, free_port, start_valkey
from workers.rabbitmq import start_rabbitmq

#: Ticks come and go; no test counts on one.
TICKS = "resilient.control"


def redis_url(port: int) -> str:
    """Return the URL of a server on this machine."""
    return f"redis://{LOCALHOST}:{port}/0"


class KeyServer:
    """A Redis or Valkey server; it keeps an append-only file.

    Args:
        directory: its data and log.
        name: names the log.
        binary: the server; default: the embedded one.
        fsync: of the append-only file: ``always`` or ``everysec``.
    """

    def __init__(self, directory: Path, name: str, *, binary: str | None = None, fsync: str = "always") -> None:
        self.port = free_port()
        self._directory = directory
        self._options: dict[str, Any] = {"name": name, "binary": binary, "config": {"appendfsync": fsync}}
        self.start()
        self.client: Any = redis.Redis(LOCALHOST, self.port, decode_responses=True)

    @property
    def url(self) -> str:
        """For clients."""
        return redis_url(self.port)

    def start(self) -> None:
        """Start it, or bring it back."""
        server = start_valkey(self._directory, port=self.port, persistent=True, **self._options)
        self.program: Program = server.program

    def kill(self) -> None:
        """Kill it on the spot."""
        self.program.kill()

    def set_full(self, *, full: bool) -> None:
        """Let it refuse whatever needs memory, or let it have memory again."""
        self.client.config_set("maxmemory", "1" if full else "0")


class Broker(ABC):
    """What every broker of a chaos run can do."""

    transport_options: ClassVar[dict[str, Any]]

    @property
    @abstractmethod
    def port(self) -> int:
        """Its own port; workers go through the proxy."""

    @property
    @abstractmethod
    def program(self) -> Program:
        """Its process, another one after every restart."""

    @abstractmethod
    def url(self, port: int) -> str:
        """Return the URL for clients that come through another port."""

    @abstractmethod
    def start(self) -> None:
        """Bring it back after :meth:`kill`."""

    def kill(self) -> None:
        """Kill it on the spot."""
        self.program.kill()

    @abstractmethod
    def refuse_publishes(self, *, refused: bool) -> None:
        """Let acknowledgements pass and messages not, or everything again."""

    @abstractmethod
    def holds(self) -> int:
        """Return the number of messages that it still has, delivered ones included."""

    def stop(self) -> None:
        """Stop it for good."""
        self.kill()


class RedisBroker(Broker):
    """Redis or Valkey as broker, which soon takes back what a dead worker had."""

    transport_options: ClassVar[dict[str, Any]] = {
        "visibility_timeout": 6,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }

    def __init__(self, directory: Path, *, binary: str | None, fsync: str) -> None:
        self.server = KeyServer(directory, "broker", binary=binary, fsync=fsync)
        self._client = self.server.client

    @property
    def port(self) -> int:
        """See :class:`Broker`."""
        return self.server.port

    @property
    def program(self) -> Program:
        """See :class:`Broker`."""
        return self.server.program

    def url(self, port: int) -> str:
        """See :class:`Broker`."""
        return redis_url(port)

    def start(self) -> None:
        """See :class:`Broker`."""
        self.server.start()

    def refuse_publishes(self, *, refused: bool) -> None:
        """See :class:`Broker`. Every publish is an LPUSH; no acknowledgement is."""
        self._client.execute_command("ACL", "SETUSER", "default", "-lpush" if refused else "+lpush")

    def end_visibility(self) -> None:
        """Let the visibility timeout of everything that is delivered be over."""
        for tag in self._client.zrange("unacked_index", 0, -1):
            self._client.zadd("unacked_index", {tag: 1}, xx=True)

    def holds(self) -> int:
        """See :class:`Broker`."""
        queues = [key for key in self._client.scan_iter(_type="list") if key != TICKS]
        return sum(self._client.llen(queue) for queue in queues) + int(self._client.hlen("unacked"))


class RabbitBroker(Broker):
    """RabbitMQ as broker."""

    transport_options: ClassVar[dict[str, Any]] = {"confirm_publish": True}

    def __init__(self, directory: Path) -> None:
        self._node = start_rabbitmq(directory)

    @property
    def port(self) -> int:
        """See :class:`Broker`."""
        return self._node.port

    @property
    def program(self) -> Program:
        """See :class:`Broker`."""
        return self._node.program

    def url(self, port: int) -> str:
        """See :class:`Broker`."""
        return f"amqp://guest:guest@{LOCALHOST}:{port}//"

    def start(self) -> None:
        """See :class:`Broker`."""
        self._node.start_again()

    def refuse_publishes(self, *, refused: bool) -> None:
        """See :class:`Broker`. Out of memory, RabbitMQ reads from no connection that publishes."""
        self._node.control("set_vm_memory_high_watermark", "0" if refused else "0.6")

    def holds(self) -> int:
        """See :class:`Broker`."""
        lines = self._node.control("list_queues", "name", "messages", "--no-table-headers").splitlines()
        counts = dict(line.rsplit("\t", 1) for line in lines)
        return sum(int(count) for queue, count in counts.items() if queue != TICKS)

    def stop(self) -> None:
        """See :class:`Broker`."""
        super().stop()
        self._node.port_mapper.stop()
