"""Start Celery's programs as forks of a process that has imported it: three quarters of a start are imports.

Forked with :mod:`multiprocessing`'s own server, which has no thread and no connection, and from there on
a program like any other: a session, an environment and a log of its own, ``celery`` as its main module.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import reduction
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from workers.processes import PROJECT, die_with

#: What every forked program has imported; no module that makes an app, opens a connection or starts a thread.
PRELOADED = [
    "celery.bin.celery", "celery.apps.worker", "celery.apps.beat", "celery.concurrency.prefork",
    "celery.concurrency.thread", "celery.backends.redis", "kombu.transport.redis", "kombu.transport.pyamqp",
    "tenacity", "resilient_tasks.app", "resilient_tasks.cli", "tests.support.forks", "tests.contract.fleet",
    "tests.integration.trials",
]  # fmt: skip


#: Whatever a test forks comes from one server per process of pytest.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


class _Files:
    """File descriptors that a fork inherits."""

    def __init__(self, *descriptors: int) -> None:
        self.descriptors = descriptors

    def __getstate__(self) -> list[Any]:
        return [reduction.DupFd(each) for each in self.descriptors]

    def __setstate__(self, state: list[Any]) -> None:
        self.descriptors = tuple(each.detach() for each in state)


class Fork:
    """A forked program; what :class:`~workers.processes.Program` uses of a ``Popen``."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, files: _Files) -> None:
        is_set_up, set_up = CONTEXT.Pipe(duplex=False)
        args = (command, dict(env), str(cwd), files, set_up)
        self._process = CONTEXT.Process(target=_run, args=args, daemon=True)
        self._process.start()
        set_up.close()
        is_set_up.poll(None)  # it leads a session now, or has ended
        is_set_up.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("celery", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)


def popen(command: Sequence[str], *, env: Mapping[str, str], cwd: Path, **options: Any) -> Any:
    """Fork ``celery`` where a fork is the same as a fresh start, else start the program as usual."""
    is_celery = list(command[:3]) == [sys.executable, "-m", "celery"]
    if not is_celery or "gevent" in command or "LD_PRELOAD" in env:
        return subprocess.Popen(command, env=env, cwd=cwd, **options)
    output = options["stdout"].fileno()
    with Path(os.devnull).open() as nothing:
        return Fork(command, env, cwd, _Files(nothing.fileno(), output, output, *options["pass_fds"]))


def run(
    command: Sequence[str], *, env: Mapping[str, str], text: str = "", timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """Run a ``celery`` command as ``subprocess.run`` does with ``input=text`` and captured output."""
    with TemporaryFile("w+") as stdin, TemporaryFile("w+") as stdout, TemporaryFile("w+") as stderr:
        stdin.write(text)
        stdin.seek(0)
        files = stdin, stdout, stderr
        environment = {**os.environ, **env}
        code = Fork(command, environment, PROJECT, _Files(*(file.fileno() for file in files))).wait(timeout)
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


def _run(command: list[str], env: dict[str, str], cwd: str, files: _Files, set_up: Any) -> None:
    os.setsid()
    if follow := die_with(os.getppid()):
        follow()
    for standard in range(3):
        os.dup2(files.descriptors[standard], standard)
    streams: tuple[Any, ...] = sys.stdout, sys.stderr
    for stream in streams:
        stream.reconfigure(write_through=True)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has closed it
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = command[2:]
    multiprocessing.current_process().name = "MainProcess"
    set_up.close()
    try:
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    finally:  # as the interpreter does at its end
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
