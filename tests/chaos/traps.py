"""Traps: windows in which a worker dies when it passes through one that is armed.

Arming is a file; the process that removes it dies. They are laid around the library's own methods by the project
that the chaos runs on, so the library knows nothing of them.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from resilient_tasks.dependency import Fleet
from resilient_tasks.worker.broker_queues import PublishedQueues, RedisQueues
from resilient_tasks.worker.deferral import Deferral
from resilient_tasks.worker.deferred_tasks import DeferredTasks, Resumer
from resilient_tasks.worker.pipeline import Pipeline

#: By name: the method that a worker dies after.
WINDOWS: dict[str, tuple[type, str]] = {
    "state written, message not moved": (Deferral, "_write_state"),
    "message moved by script": (RedisQueues, "put"),
    "message copied, not acknowledged": (PublishedQueues, "_publish"),
    "permit taken": (Fleet, "acquire"),
    "trial reported, not acknowledged": (Pipeline, "_settle"),
    "resume promised, not made": (Resumer, "_has_not_moved"),
    "resumed by script": (DeferredTasks, "_note_unmade"),
}


def lay(directory: Path) -> None:
    """Lay all traps, harmless until :func:`arm`."""
    for name, (owner, method) in WINDOWS.items():
        setattr(owner, method, _trapped(owner.__dict__[method], _file(directory, name)))


def watch_moves(note: Callable[[str], object]) -> None:
    """Give ``note`` the id of every task whose message the library is about to move."""
    defer, resume = Deferral.defer, DeferredTasks.resume

    @wraps(defer)
    def watched_defer(self: Deferral, request: Any, *args: Any, **kwargs: Any) -> Any:
        note(request.id)
        return defer(self, request, *args, **kwargs)

    @wraps(resume)
    def watched_resume(self: DeferredTasks, entries: Any, *args: Any, **kwargs: Any) -> Any:
        for entry in entries:
            note(entry.task_id)
        return resume(self, entries, *args, **kwargs)

    setattr(Deferral, "defer", watched_defer)  # noqa: B010 - a plain assignment is one that mypy refuses
    setattr(DeferredTasks, "resume", watched_resume)  # noqa: B010


def arm(directory: Path, name: str) -> None:
    """Let the next process that passes die."""
    directory.mkdir(parents=True, exist_ok=True)
    _file(directory, name).touch()


def disarm(directory: Path, name: str) -> bool:
    """Make it harmless again; True if no process had passed."""
    armed = _file(directory, name)
    waiting = armed.exists()
    armed.unlink(missing_ok=True)
    return waiting


def _file(directory: Path, name: str) -> Path:
    return directory / name.replace(" ", "-")


def _trapped(method: Any, armed: Path) -> Any:
    function: Callable[..., Any] = method.__func__ if isinstance(method, staticmethod) else method

    @wraps(function)
    def passing(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        finally:
            _spring(armed)

    return staticmethod(passing) if isinstance(method, staticmethod) else passing


def _spring(armed: Path) -> None:
    try:
        armed.unlink()
    except FileNotFoundError:
        return
    os.kill(os.getpid(), signal.SIGKILL)
