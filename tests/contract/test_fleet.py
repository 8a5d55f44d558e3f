"""Many processes and one server: what is decided is decided once, for all of them."""

from __future__ import annotations

import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from resilient_tasks.core.model import Calls, Outcome, State, Verb
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from tests.contract import fleet
from tests.support import forks
from workers.processes import Server, wait_until


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    """Start a process; it is gone when the test ends."""
    started = []

    def start_one(target: Callable[..., None], *args: Any) -> Any:
        process = forks.CONTEXT.Process(target=target, args=args)
        process.start()
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.join()


def all_end_well(running: list[Any], *, timeout: float = 120.0) -> None:
    deadline = time.monotonic() + timeout
    for process in running:
        process.join(max(0.0, deadline - time.monotonic()))
    assert [process.exitcode for process in running] == [0] * len(running)


def test_twelve_processes_open_it_after_ten_failures_in_all(server: Server, start: Callable[..., Any]) -> None:
    begin, calls = forks.CONTEXT.Barrier(12), forks.CONTEXT.Value("i", 0)
    all_end_well([start(fleet.call_a_dead_service, server.url(), begin, calls) for _ in range(12)])
    snapshot = fleet.open_store(server.url()).read([fleet.BUSY])[0]
    assert (snapshot.state, snapshot.openings) == (State.OPEN, 1)
    assert 10 <= snapshot.calls <= calls.value < 10 + 12, "each may have had one call in flight"


def test_no_failure_of_eight_processes_is_lost(server: Server, start: Callable[..., Any]) -> None:
    store = fleet.open_store(server.url())
    store.command(fleet.WIDE, Verb.SHADOW)
    all_end_well([start(fleet.count_failures, server.url()) for _ in range(8)])
    snapshot = store.read([fleet.WIDE])[0]
    assert (snapshot.state, snapshot.calls, snapshot.failures) == (State.SHADOW, 8000, 8000)
    assert snapshot.total_failures == 8000


def test_sixteen_processes_share_the_permits(server: Server, start: Callable[..., Any]) -> None:
    """A quarter of them joins while the others are at it."""
    in_flight, most_in_flight = forks.CONTEXT.Value("i", 0), forks.CONTEXT.Value("i", 0)
    fleet.open_store(server.url()).command(fleet.ON_TRIAL, Verb.TRIP)
    args = (fleet.make_trials, server.url(), 15, in_flight, most_in_flight)
    running = [start(*args) for _ in range(12)]
    wait_until(lambda: most_in_flight.value > 0, what="the first trial")
    running += [start(*args) for _ in range(4)]
    all_end_well(running)
    assert most_in_flight.value == fleet.TRIAL_CALLS
    assert fleet.open_store(server.url()).read([fleet.ON_TRIAL])[0].state is State.HALF_OPEN


def test_a_killed_holder_blocks_no_trial_for_longer_than_its_lease(server: Server, start: Callable[..., Any]) -> None:
    store, lease = fleet.open_store(server.url()), 0.5
    store.command(fleet.ONE_AT_A_TIME, Verb.TRIP)
    dead = start(fleet.take_a_permit_and_die, server.url(), lease)
    dead.join(60)
    assert dead.exitcode == -signal.SIGKILL
    held_since = store.read([fleet.ONE_AT_A_TIME])[0].since
    all_end_well([start(fleet.heal, server.url(), 60.0) for _ in range(3)])
    snapshot = store.read([fleet.ONE_AT_A_TIME])[0]
    assert snapshot.state is State.CLOSED
    assert snapshot.since >= held_since + lease, "none was let in meanwhile"
    assert (snapshot.openings, snapshot.total_failures) == (2, 1), "the lost permit was a failure"


def test_an_operators_state_survives_the_processes(server: Server, start: Callable[..., Any]) -> None:
    all_end_well([start(fleet.isolate, server.url())])
    all_end_well([start(fleet.is_refused, server.url())])


def test_every_process_receives_every_change(server: Server, start: Callable[..., Any]) -> None:
    ready, received = forks.CONTEXT.Semaphore(0), forks.CONTEXT.Queue()
    listeners = [start(fleet.listen, server.url(), ready, received) for _ in range(3)]
    for _ in listeners:
        assert ready.acquire(timeout=60)
    store = fleet.open_store(server.url())
    made = [store.command(fleet.BUSY, verb).snapshot for verb in (Verb.TRIP, Verb.RESET, Verb.ISOLATE)]
    all_received = sorted(received.get(timeout=60) for _ in range(9))
    assert all_received == sorted([("busy", s.state.value, s.version) for s in made] * 3)
    all_end_well(listeners)


def test_machines_with_different_clocks_agree(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    spec = Spec("payments", BreakerPolicy(minimum_calls=5, trial_calls=1, open_duration=0.2, open_jitter=0.0))
    stores = {offset: fleet.open_store(server.url()) for offset in (-60.0, 60.0)}

    def on_machine(offset: float) -> Any:
        monkeypatch.setattr(time, "time", lambda: real() + offset)
        return stores[offset]

    failures = Evidence(0, (Calls(Outcome.FAILURE, 3),))
    assert on_machine(-60.0).record(spec, failures).snapshot.state is State.CLOSED
    opened = on_machine(60.0).record(spec, failures).snapshot
    assert opened.state is State.OPEN
    assert on_machine(-60.0).read([spec])[0].open_until == opened.open_until == pytest.approx(opened.now + 0.2)
    grant = wait_until(lambda: permit(on_machine(-60.0), spec), what="the open time to end")
    assert opened.open_until <= grant.snapshot.now < opened.open_until + 30
    closed = on_machine(60.0).settle(spec, "a", Outcome.SUCCESS, Evidence(grant.snapshot.epoch, ()))
    assert on_machine(-60.0).acquire(spec, "b", lease=1).snapshot.epoch == closed.snapshot.epoch


def permit(store: Any, spec: Spec) -> Any:
    grant = store.acquire(spec, "a", lease=60)
    return grant if grant.trial else None


def test_a_store_may_be_used_on_both_sides_of_a_fork(server: Server) -> None:
    store = fleet.open_store(server.url())
    store.command(fleet.WIDE, Verb.SHADOW)
    child = multiprocessing.get_context("fork").Process(target=count_with, args=(store,))
    child.start()
    count_with(store)
    child.join(60)
    assert child.exitcode == 0
    assert store.read([fleet.WIDE])[0].calls == 400


def count_with(store: Any) -> None:
    for _ in range(200):
        answer = store.record(fleet.WIDE, Evidence(store.read([fleet.WIDE])[0].epoch, fleet.FAILURE))
        assert answer.snapshot.name == "wide"


FORK_WITH_A_LOCK_HELD = """
import multiprocessing, sys, threading
from resilient_tasks.store.base import Spec
from resilient_tasks.store.local import LocalStore

store, held, done = LocalStore(), threading.Event(), threading.Event()

def hold():
    with store._lock:
        held.set()
        done.wait(60)

threading.Thread(target=hold, daemon=True).start()
held.wait()
child = multiprocessing.get_context("fork").Process(target=store.read, args=([Spec("payments")],), daemon=True)
child.start()
child.join(60)
sys.exit(child.exitcode != 0)
"""


def test_a_lock_held_during_a_fork_does_not_block_the_child() -> None:
    """In an interpreter of its own: what other tests have imported may have locks that block a child."""
    assert subprocess.run([sys.executable, "-c", FORK_WITH_A_LOCK_HELD], check=False, timeout=120).returncode == 0
