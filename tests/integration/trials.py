"""What trials look like to the service that they try, and the processes that make them in ``test_permits.py``."""

from __future__ import annotations

import os
import random
import select
import socket
import socketserver
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from resilient_tasks import BreakerOpenError, Resilience
from resilient_tasks.policy import BreakerPolicy

LOCALHOST = "127.0.0.1"
LISTEN_BACKLOG = 128
NAMES = [f"service-{number}" for number in range(6)]
TRIAL_CALLS = 3
POLICY = BreakerPolicy(
    consecutive_failures=1, trial_calls=TRIAL_CALLS, open_duration=0.1, open_multiplier=1.0, open_jitter=0.0
)
PACE = 0.005  # seconds between two calls of one process
SHORT, LONG = 0.01, 0.4  # seconds that a trial takes; long ones outlive the HALF_OPEN in which they began


class Service:
    """Sees every trial from its first to its last moment, for it holds a connection meanwhile.

    A trial ends when it is answered, or when the kernel closes the connection of a killed process.

    Args:
        choices: decides how long a trial takes and how it ends.
        healthy: share of the trials that succeed.
    """

    def __init__(self, choices: random.Random, *, healthy: float) -> None:
        self.healthy = healthy
        self.most: Counter[str] = Counter()  # trials in flight at once, by breaker
        self._choices = choices
        self._visitors: dict[str, list[int]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def open(self) -> Iterator[str]:
        """Serve, and yield the address."""
        service = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                name, caller = self.rfile.readline().split()
                service._serve(self.request, name.decode(), int(caller))

        with socketserver.ThreadingTCPServer((LOCALHOST, 0), Handler) as server:
            server.daemon_threads, server.block_on_close = True, False
            server.socket.listen(LISTEN_BACKLOG)  # a full one has a caller wait for half a minute, permit in hand
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            yield f"{LOCALHOST}:{server.server_address[1]}"
            server.shutdown()

    def visitors(self) -> list[int]:
        """The callers that have a trial in flight."""
        with self._lock:
            return sorted(caller for callers in self._visitors.values() for caller in callers)

    def _serve(self, connection: socket.socket, name: str, caller: int) -> None:
        with self._lock:
            self._visitors[name].append(caller)
            self.most[name] = max(self.most[name], len(self._visitors[name]))
            seconds, verdict = self._choices.choice((SHORT, LONG)), self._choices.random() < self.healthy
        gone, _, _ = select.select([connection], [], [], seconds)
        with self._lock:
            self._visitors[name].remove(caller)
        if not gone:
            connection.sendall(b"y" if verdict else b"n")


def visit(address: str, name: str, *, caller: int) -> None:
    """Call the service for a breaker, and say who calls; fail if it says so."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{name} {caller}\n".encode())
        if connection.recv(1) != b"y":
            raise ConnectionError(f"{name} is down")


def call_all_the_time(store_url: str, address: str, seed: int) -> None:
    """Call one dependency after the other; whatever is no trial fails, so that breakers soon open again."""
    choices = random.Random(seed)
    resilience = Resilience(store_url=store_url, store_timeout=20, namespace="permits")
    breakers = [resilience.breaker(name, POLICY) for name in NAMES]
    while True:
        breaker = choices.choice(breakers)
        guard = breaker.guard()
        with suppress(BreakerOpenError, ConnectionError), guard:
            if not _holds_permit(guard):
                raise ConnectionError("closed")
            visit(address, breaker.name, caller=os.getpid())
        time.sleep(PACE)


def _holds_permit(guard: Any) -> bool:
    call = None if guard._inside is not None else guard._call
    return any(held.leased for held in getattr(call, "admitted_by", {}).values())
