"""Run the whole topology on this machine, without root and without a running server.

``python -m workers.stack up`` starts an embedded Valkey, the flaky HTTP service, two prefork workers,
beat and (if installed) Flower; ``down`` stops every stack that this checkout has started.

Every run has a fresh directory below ``.run/`` with logs and pid files, and free ports, so that whatever
a run leaves behind cannot break the next one. ``docker-compose.yml`` is the same topology in containers.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import httpx

from workers.processes import (
    LOCALHOST,
    PROJECT,
    Program,
    StartError,
    Worker,
    celery_command,
    free_port,
    is_recorded_alive,
    start_beat,
    start_program,
    start_valkey,
    start_worker,
    stop_recorded,
)

APP = "workers.app"
RUNS = PROJECT / ".run"
WORKERS = ("worker-1", "worker-2")
SERVERS = ("redis", "service")
ROLES = (*SERVERS, *WORKERS, "beat", "flower")
CONCURRENCY = 2
LOGIN = "demo:demo"  # changes in Flower need a user

Progress = Callable[[str], object]


# --- the flaky service, as those see it who break it ------------------------------------------------


@dataclass(frozen=True)
class FlakyService:
    """The running HTTP service.

    Attributes:
        program: its process.
        ports: TCP port of ``admin`` and of each dependency.
    """

    program: Program
    ports: Mapping[str, int]

    @property
    def admin_url(self) -> str:
        """Base URL of the admin API."""
        return f"http://{LOCALHOST}:{self.ports['admin']}"

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that say where the dependencies are."""
        names = [name for name in self.ports if name != "admin"]
        return {f"{name.upper()}_URL": f"http://{LOCALHOST}:{self.ports[name]}/{name}" for name in names}

    def make(self, dependency: str, health: str, *, latency: float = 0.0, capacity: int | None = None) -> None:
        """Switch a dependency's health: ``up``, ``5xx``, ``slow``, ``hang`` or ``refuse``; and what it can bear."""
        change = {"health": health, "latency": latency, **({} if capacity is None else {"capacity": capacity})}
        httpx.put(f"{self.admin_url}/{dependency}", json=change, timeout=60).raise_for_status()

    def stats(self) -> dict[str, dict[str, Any]]:
        """Return what reached each dependency so far."""
        response = httpx.get(f"{self.admin_url}/stats", timeout=60).raise_for_status()
        figures: dict[str, dict[str, Any]] = response.json()["dependencies"]
        return figures


def start_service(directory: Path, *, name: str = "service", detached: bool = False) -> FlakyService:
    """Start the flaky HTTP service on free ports and wait until it listens.

    Raises:
        StartError: it did not start.
    """
    command = [sys.executable, "-m", "workers.service", "--ports", "admin=0,payments=0,accounts=0,mail=0"]
    program = start_program(command, name=name, directory=directory, detached=detached)
    program.wait_for_output("}\n")
    return FlakyService(program, json.loads(program.output())["ports"])


# --- the stack ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """A running stack.

    Attributes:
        directory: its logs, pid files and data.
        environment: what a process needs to take part in it as a client or a worker.
        service: the flaky HTTP service.
        workers: the two workers.
        flower_url: where Flower is; None if it is not installed.
    """

    directory: Path
    environment: Mapping[str, str]
    service: FlakyService
    workers: tuple[Worker, ...]
    flower_url: str | None

    def describe(self) -> dict[str, str]:
        """Return what a person needs to explore it."""
        flower = {"Flower": f"{self.flower_url}/breakers  log in as {LOGIN}"} if self.flower_url else {}
        return {**flower, "service admin": self.service.admin_url, "logs": str(self.directory)}

    def stop(self) -> None:
        """Stop everything: those who use the servers first."""
        stop_run(self.directory)


def start_stack(directory: Path, *, detached: bool = False, progress: Progress = click.echo) -> Stack:
    """Start everything and wait until it is ready. If that fails, nothing of it is left running.

    Args:
        directory: for logs, pid files and data; see :func:`new_run`.
        detached: let it outlive this process.
        progress: called with what is being waited for.

    Raises:
        StartError: something did not start.
    """
    try:
        return _start(directory, detached=detached, progress=progress)
    except BaseException:
        stop_run(directory)
        raise


def _start(directory: Path, *, detached: bool, progress: Progress) -> Stack:
    progress("starting Valkey and the HTTP service")
    server = start_valkey(directory, name="redis", detached=detached)
    service = start_service(directory, detached=detached)
    env = {"CELERY_BROKER_URL": server.url(0), "CELERY_RESULT_BACKEND": server.url(1), **service.environment}
    progress("starting two workers, beat and Flower")
    workers = [
        start_worker(APP, name=name, directory=directory, env=env, concurrency=CONCURRENCY, detached=detached)
        for name in WORKERS
    ]
    flower_url = start_flower(directory, env=env, detached=detached) if find_spec("flower") else None
    start_beat(APP, directory=directory, env=env, detached=detached)
    ready = tuple(worker.wait_until_ready() for worker in workers)
    return Stack(directory, env, service, ready, flower_url)


def start_flower(directory: Path, *, env: Mapping[str, str], detached: bool = False) -> str:
    """Start Flower with a Breakers page, wait until it answers, and return its URL.

    Raises:
        StartError: it did not start.
    """
    url = f"http://{LOCALHOST}:{(port := free_port())}"
    command = celery_command(
        APP, "breakers", "flower", f"--address={LOCALHOST}", f"--port={port}", f"--basic-auth={LOGIN}"
    )
    program = start_program(command, name="flower", directory=directory, env=env, detached=detached)
    program.wait_ready(lambda: _answers(f"{url}/healthcheck"))
    return url


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False


# --- runs, also those of other processes ------------------------------------------------------------


def new_run() -> Path:
    """Make a fresh directory below ``.run/``, which git ignores."""
    RUNS.mkdir(exist_ok=True)
    (RUNS / ".gitignore").write_text("*\n")
    return Path(tempfile.mkdtemp(prefix="stack-", dir=RUNS))


def stop_run(directory: Path) -> list[str]:
    """Stop whatever still lives of a run, the servers last, and return the names."""
    servers = [directory / f"{name}.pid" for name in SERVERS]
    others = [record for record in directory.glob("*.pid") if record not in servers]
    return stop_recorded(*others) + stop_recorded(*servers)


def living_runs() -> list[Path]:
    """Return the directories of runs of which something lives."""
    return sorted({record.parent for record in RUNS.glob("*/*.pid") if is_recorded_alive(record)})


def announce(stack: Stack) -> None:
    """Print how to explore a stack and keep that beside its logs."""
    exports = "".join(f"export {name}={value}\n" for name, value in stack.environment.items())
    (stack.directory / "env").write_text(exports)
    lines = [f"{name + ':':<15}{value}" for name, value in stack.describe().items()]
    lines += [
        "",
        f"  . {stack.directory}/env                        # then any celery command, e.g.",
        f"  {Path(sys.executable).parent / 'celery'} -A {APP} inspect active",
        f'  curl -X PUT {stack.service.admin_url}/payments -d \'{{"health": "hang"}}\'',
        "  make down",
    ]
    (stack.directory / "README").write_text("\n".join(lines) + "\n")
    click.echo("\n".join(lines))


def exit_on_sigterm() -> None:
    """Let SIGTERM unwind the program like Ctrl-C does, so that what it has started is stopped."""
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


@click.group(help=__doc__)
def main() -> None:
    """Run the stack."""
    exit_on_sigterm()


@main.command()
def up() -> None:
    """Start a stack that goes on running, or show the one that does."""
    for directory in living_runs():
        if (directory / "README").exists() and all(map(is_recorded_alive, directory.glob("*.pid"))):
            click.echo((directory / "README").read_text(), nl=False)
            return
    try:
        announce(start_stack(new_run(), detached=True))
    except StartError as error:
        raise click.ClickException(str(error)) from error


@main.command()
def down() -> None:
    """Stop every stack of this checkout."""
    for directory in living_runs():
        click.echo(f"{directory.name}: stopping")
        click.echo(f"{directory.name}: stopped {', '.join(stop_run(directory))}")


if __name__ == "__main__":
    main()
