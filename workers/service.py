"""The flaky HTTP service that the tasks call: one process, one port per dependency, one for the admin.

Each dependency answers ``200`` to any ``/<dependency>/.../<id>`` and counts what reached it. Its
health is switched at run time through the admin API::

    PUT /payments {"health": "hang", "latency": 0.02}     -> the dependency's state
    PUT /payments {"capacity": 10}                        -> the same; with more calls in flight 503 at once
    GET /stats                                            -> what reached each dependency, and when

==========  ==================================================================================
health      what a caller sees
==========  ==================================================================================
``up``      200 after ``latency`` seconds
``5xx``     503 after ``latency`` seconds
``slow``    200 after 3 seconds
``hang``    nothing, until the caller gives up
``refuse``  connection refused; the service itself cannot see such a call
==========  ==================================================================================
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import click

DEPENDENCIES = ("payments", "accounts", "mail")
DEFAULT_PORTS = {"admin": 8000, "payments": 8001, "accounts": 8002, "mail": 8003}
SLOW_SECONDS = 3.0
_STARTED_AT = time.time() - time.monotonic()


class Health(str, Enum):
    """What is wrong with a dependency."""

    UP = "up"
    ERROR = "5xx"
    SLOW = "slow"
    HANG = "hang"
    REFUSE = "refuse"


# --- just enough HTTP/1.1 -----------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """One parsed HTTP request."""

    method: str
    path: str
    body: bytes


@dataclass(frozen=True)
class Response:
    """A status and what to send as JSON."""

    status: int
    payload: Mapping[str, Any]


async def read_request(reader: asyncio.StreamReader) -> Request | None:
    """Read the next request of a connection; None when the client has closed it."""
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *header_lines = head.rstrip().split("\r\n")
        method, path, _ = request_line.split(" ", 2)
        headers = {name.strip().lower(): value.strip() for name, _, value in (h.partition(":") for h in header_lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
        return None
    return Request(method, path.partition("?")[0], body)


async def write_response(writer: asyncio.StreamWriter, response: Response) -> None:
    """Send a response and keep the connection open."""
    body = json.dumps(response.payload).encode()
    head = f"HTTP/1.1 {response.status} -\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode("latin-1") + body)
    await writer.drain()


# --- a dependency ---------------------------------------------------------------------------------


@dataclass
class Tally:
    """What reached one dependency. Times are seconds since 1970 that never run backwards, see :func:`now`."""

    in_flight: int = 0
    most_in_flight: int = 0
    calls: Counter[str] = field(default_factory=Counter)  # by health at the time
    probes: Counter[str] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)  # by id: calls that were answered with 200
    arrivals_while_failing: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def call(self, request: Request, health: Health) -> Iterator[None]:
        """Count one call, as long as it lasts."""
        (self.probes if is_probe(request) else self.calls)[health.value] += 1
        if health is not Health.UP:
            self.arrivals_while_failing.append(now())
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-able values."""
        return {
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "calls": dict(self.calls),
            "probes": dict(self.probes),
            "served": sum(self.served.values()),
            "unique": len(self.served),
            "repeated": {id_: count for id_, count in self.served.items() if count > 1},
            "arrivals_while_failing": self.arrivals_while_failing,
        }


def now() -> float:
    """Return seconds since 1970, comparable between processes and steady while this one runs."""
    return _STARTED_AT + time.monotonic()


def is_probe(request: Request) -> bool:
    """Return whether a request is a health check, and no call that does something."""
    return request.path.endswith("/health")


class Dependency:
    """One dependency on a port of its own.

    Everything runs in one event loop, so counting needs no lock.
    """

    def __init__(self, name: str, host: str, port: int) -> None:
        self.name = name
        self.health = Health.UP
        self.latency = 0.0
        self.capacity: float = math.inf  # calls in flight
        self.tally = Tally()
        self._socket = _bound_socket((host, port))
        self._address: tuple[str, int] = self._socket.getsockname()[:2]
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()

    @property
    def port(self) -> int:
        """TCP port."""
        return self._address[1]

    async def set_health(self, health: Health) -> None:
        """Switch the health. Calls that already hang go on hanging."""
        self.health = health
        if health is Health.REFUSE:
            self.refuse()
        else:
            await self.listen()

    async def listen(self) -> None:
        """Accept connections."""
        if self._server is None:
            self._server = await asyncio.start_server(self._converse, sock=self._socket)

    def refuse(self) -> None:
        """Refuse connections and drop those that exist.

        The port stays bound: otherwise some outgoing connection of this machine might take it.
        """
        if self._server is not None:
            self.close()
            self._socket = _bound_socket(self._address)

    def close(self) -> None:
        """Give up the port and drop all connections."""
        if self._server is not None:
            self._server.close()
            self._server = None
        self._socket.close()
        for connection in self._connections:
            connection.transport.abort()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while request := await read_request(reader):
                with self.tally.call(request, self.health):
                    if self.health is Health.HANG:
                        await reader.read(1)  # returns when the caller gives up
                        break
                    await write_response(writer, await self._answer(request))
        except ConnectionError:
            pass  # the caller is gone
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _answer(self, request: Request) -> Response:
        health = self.health
        if self.tally.in_flight > self.capacity:
            return Response(503, {"error": f"{self.name} has more calls than it can bear"})
        await asyncio.sleep(SLOW_SECONDS if health is Health.SLOW else self.latency)
        if health is Health.ERROR:
            return Response(503, {"error": f"{self.name} fails"})
        id_ = request.path.rpartition("/")[2]
        if not is_probe(request):
            self.tally.served[id_] += 1
        return Response(200, {"id": id_, "answer": f"{self.name} did {request.method} {request.path}"})

    def as_dict(self) -> dict[str, Any]:
        """Return state and figures as JSON-able values."""
        state = {"health": self.health.value, "latency": self.latency, "port": self.port}
        return {**state, **self.tally.as_dict()}


def _bound_socket(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


# --- the admin API --------------------------------------------------------------------------------


class Admin:
    """Switches health and returns the figures."""

    def __init__(self, dependencies: Mapping[str, Dependency]) -> None:
        self._dependencies = dependencies

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        with contextlib.suppress(ConnectionError), contextlib.closing(writer):
            while request := await read_request(reader):
                await write_response(writer, await self.answer(request))

    async def answer(self, request: Request) -> Response:
        """Answer one request."""
        if (request.method, request.path) == ("GET", "/stats"):
            figures = {name: dependency.as_dict() for name, dependency in self._dependencies.items()}
            return Response(200, {"now": now(), "dependencies": figures})
        dependency = self._dependencies.get(request.path.strip("/"))
        if dependency is None:
            return Response(404, {"error": f"there are /stats and {', '.join(self._dependencies)}"})
        if request.method == "PUT":
            return await self._change(dependency, request.body)
        return Response(200, dependency.as_dict())

    async def _change(self, dependency: Dependency, body: bytes) -> Response:
        try:
            wanted = json.loads(body)
            health = Health(wanted.get("health", dependency.health))
            latency = float(wanted.get("latency", dependency.latency))
            capacity = float(wanted.get("capacity", dependency.capacity))
        except (ValueError, TypeError, AttributeError):
            allowed = ", ".join(health.value for health in Health)
            return Response(
                400, {"error": f'expected {{"health": one of {allowed}, "latency": seconds, "capacity": calls}}'}
            )
        dependency.latency, dependency.capacity = latency, capacity
        await dependency.set_health(health)
        return Response(200, dependency.as_dict())


@contextlib.asynccontextmanager
async def running_service(host: str, ports: Mapping[str, int]) -> AsyncIterator[dict[str, int]]:
    """Run the service; yields the ports in use (0 in ``ports`` picks a free one)."""
    dependencies = {name: Dependency(name, host, ports[name]) for name in DEPENDENCIES}
    admin = await asyncio.start_server(Admin(dependencies).converse, host, ports["admin"])
    for dependency in dependencies.values():
        await dependency.listen()
    in_use = {name: dependency.port for name, dependency in dependencies.items()}
    try:
        yield {"admin": admin.sockets[0].getsockname()[1], **in_use}
    finally:
        admin.close()
        for dependency in dependencies.values():
            dependency.close()


async def serve_until_stopped(host: str, ports: Mapping[str, int]) -> None:
    """Run the service until SIGTERM or SIGINT; its first line of output names the ports."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with running_service(host, ports) as in_use:
        click.echo(json.dumps({"ports": in_use}))
        await stopped.wait()


@click.command(help=__doc__)
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--ports", default=",".join(f"{name}={port}" for name, port in DEFAULT_PORTS.items()), show_default=True)
def main(host: str, ports: str) -> None:
    """Run the service."""
    chosen = {name: int(port) for name, _, port in (entry.partition("=") for entry in ports.split(","))}
    asyncio.run(serve_until_stopped(host, {**DEFAULT_PORTS, **chosen}))


if __name__ == "__main__":
    main()
