"""What every test gets: an environment free of the developer's own settings, repeatable examples."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator

import celery.app.builtins  # noqa: F401 - its tasks join every app: now, not when the first test finalizes one
import pytest
from celery import _state
from celery._state import _set_task_join_will_block
from hypothesis import settings

from tests.support import forks
from workers import processes
from workers.processes import Server, start_valkey

processes.popen = forks.popen

# no deadline: a shared machine is slow at times, and slow is not wrong
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# a shell that runs the tests in the background has them, and all programs that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _propagating_loggers() -> None:
    """Let ``caplog`` get warnings whatever a program that ran in this process has set up before."""
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.WARNING)
    ours = logging.getLogger("resilient_tasks")
    ours.setLevel(logging.NOTSET)
    ours.disabled, ours.propagate = False, True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let each process of xdist begin with its share of what waits for real programs: what is quick evens them out."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0"))
    if not processes:
        return
    slow = [item for item in items if item.path.parent.name in ("integration", "chaos")]
    quick = [item for item in items if item not in slow]
    slow.sort(key=lambda item: item.get_closest_marker("rabbitmq") is None)  # few processes need a node of their own
    shares = range(processes)
    items[:] = [
        item
        for share in shares
        for kind in (slow, quick)
        for item in kind[len(kind) * share // processes : len(kind) * (share + 1) // processes]
    ]


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in list(os.environ):
        if variable.upper().startswith("RESILIENT_TASKS_"):
            monkeypatch.delenv(variable)


@pytest.fixture(autouse=True)
def _shared_tasks_of_one_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of any app is shared with every other one of its process unless it says otherwise: not here."""
    celerys_own = {each for each in _state._on_app_finalizers if each.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", celerys_own)


@pytest.fixture(autouse=True)
def _outside_any_pool() -> Iterator[None]:
    """A solo pool makes this process a pool process, in which no test may wait for results."""
    yield
    _set_task_join_will_block(False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Valkey of the module's own: a store, a broker, or the tests' side channel."""
    server = start_valkey(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()
