"""Everything that a chaos run runs on: servers, proxy, dependencies, workers, beat."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.chaos.ledger import Ledger
from tests.chaos.servers import Broker, KeyServer, RabbitBroker, RedisBroker
from workers.processes import LOCALHOST, Program, free_port, is_recorded_alive, start_beat, start_program, start_worker

MODULE = "tests.chaos.project"
SERVICE_PORTS = "admin=0,payments=0,accounts=0,mail=0"


def faketime_library() -> Path | None:
    """Return libfaketime (Debian's package ``faketime``); None if it is not installed."""
    return next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


@dataclass(frozen=True)
class Setup:
    """What is run.

    Args:
        broker: ``redis``, ``valkey`` or ``rabbitmq``.
        plain: plain Celery, without the library.
        fsync: of the Redis or Valkey broker: ``always`` or ``everysec``.
    """

    broker: str
    plain: bool = False
    fsync: str = "always"


class Kept:
    """A program that is started again whenever it has ended."""

    def __init__(self, start: Callable[[], Program]) -> None:
        self._start = start
        self.program = start()

    def keep(self) -> None:
        """Start it again if it has ended, once nothing is left of it."""
        if self.program.running:
            return
        self.program.kill()  # what its main process has left behind
        if not is_recorded_alive(self.program.log.with_suffix(".pid")):
            self.program = self._start()

    def kill(self) -> None:
        """Kill it for good."""
        self.program.kill()


class Stack:
    """One stack; start it with ``with``.

    Args:
        setup: what is run.
        directory: for data, logs and the ledger; must be new.
    """

    def __init__(self, setup: Setup, directory: Path) -> None:
        self.setup = setup
        self.directory = directory.resolve()
        self.ledger = Ledger(self.directory / "ledger.jsonl")
        self.traps = self.directory / "traps"
        self._clock = self.directory / "clock"
        self._running: list[Callable[[], object]] = []

    def __enter__(self) -> Stack:  # noqa: PYI034 - Self needs Python 3.11
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop everything, the last started first."""
        while self._running:
            self._running.pop()()

    def _start(self) -> None:
        self.broker = self._start_broker()
        self._running.append(self.broker.stop)
        self.store, self.backend = (
            self._kept_server(KeyServer(self.directory / name, name)) for name in ("store", "backend")
        )
        self.service = self._program([sys.executable, "-m", "workers.service", "--ports", SERVICE_PORTS], "service")
        self.service.wait_for_output('"ports"')
        self.ports: dict[str, int] = json.loads(self.service.output().splitlines()[0])["ports"]
        self.proxy_port = free_port()
        ends = [str(self.proxy_port), str(self.broker.port)]
        self.proxy = self._program([sys.executable, "-m", "tests.chaos.proxy", *ends], "proxy")
        self.proxy.wait_for_output("proxy ready")
        self.set_clock("+0s")
        self.workers = [
            self._kept(partial(self._start_worker, "worker0", {})),
            self._kept(partial(self._start_worker, "worker1", self._clock_env)),
        ]
        self.beat = self._kept(partial(self.start_beat, "beat"))

    def _start_broker(self) -> Broker:
        directory = self.directory / "broker"
        if self.setup.broker == "rabbitmq":
            return RabbitBroker(directory)
        binary = shutil.which("redis-server") if self.setup.broker == "redis" else None
        return RedisBroker(directory, binary=binary, fsync=self.setup.fsync)

    def _kept_server(self, server: KeyServer) -> KeyServer:
        self._running.append(server.kill)
        return server

    def _program(self, command: list[str], name: str) -> Program:
        program = start_program(command, name=name, directory=self.directory)
        self._running.append(program.kill)
        return program

    def _kept(self, start: Callable[[], Program]) -> Kept:
        kept = Kept(start)
        self._running.append(kept.kill)
        return kept

    @property
    def broker_url(self) -> str:
        """The broker as everybody sees it: through the proxy."""
        return self.broker.url(self.proxy_port)

    @property
    def env(self) -> dict[str, str]:
        """What the project needs to know."""
        return {
            "CHAOS_PLAIN": "1" if self.setup.plain else "",
            "CHAOS_LEDGER": str(self.ledger.path),
            "CHAOS_TRAPS": str(self.traps),
            "CHAOS_SERVICE_PORTS": json.dumps(self.ports),
            "CHAOS_BROKER_URL": self.broker_url,
            "CHAOS_BACKEND_URL": self.backend.url,
            "CHAOS_TRANSPORT_OPTIONS": json.dumps(self.broker.transport_options),
            "RESILIENT_TASKS_STORE_URL": self.store.url,
        }

    def _start_worker(self, name: str, env: Mapping[str, str]) -> Program:
        return start_worker(MODULE, name=name, directory=self.directory, env={**self.env, **env})

    @property
    def _clock_env(self) -> dict[str, str]:
        """What gives a worker a clock of its own; the monotonic one is everybody's."""
        library = faketime_library()
        if library is None:
            return {}
        clock = {"FAKETIME_TIMESTAMP_FILE": str(self._clock), "FAKETIME_CACHE_DURATION": "1"}
        return {"LD_PRELOAD": str(library), "FAKETIME_DONT_FAKE_MONOTONIC": "1", **clock}

    def set_clock(self, shift: str) -> None:
        """Set the clock of the second worker, e.g. ``+60s``."""
        self._clock.write_text(f"{shift}\n")

    def start_beat(self, name: str) -> Program:
        """Start a beat."""
        return start_beat(MODULE, name=name, directory=self.directory, env=self.env)

    def keep_alive(self) -> None:
        """Start again what has died, as a supervisor does."""
        for worker in self.workers:
            worker.keep()

    def set_health(self, dependency: str, health: str) -> None:
        """Switch a dependency's health."""
        body = json.dumps({"health": health}).encode()
        url = f"http://{LOCALHOST}:{self.ports['admin']}/{dependency}"
        urllib.request.urlopen(urllib.request.Request(url, data=body, method="PUT"), timeout=10).close()
