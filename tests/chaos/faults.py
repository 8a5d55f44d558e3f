"""Every fault that a chaos run can cause: each begins, lasts as long as its ``with`` block, and is over.

A fault's name is that of its function. Some lead to a second run of tasks that were under way, because the
broker delivers at least once; a second run for which there was no such fault is unexplained.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import psutil

from resilient_tasks.worker.broker_queues import PublishedQueues, RedisQueues
from tests.chaos import traps
from tests.chaos.servers import KeyServer, RedisBroker
from tests.chaos.stack import Stack, faketime_library

Course = Callable[[Stack], Iterator[None]]


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Args:
        target: what it strikes.
        inflict: strikes a stack.
        redelivers: tasks that are under way may run a second time.
        possible: whether it is, by the kind of broker.
    """

    target: str
    inflict: Callable[[Stack], AbstractContextManager[None]]
    redelivers: bool
    possible: Callable[[str], bool]


class MissedError(Exception):
    """A fault has struck nothing."""


FAULTS: dict[str, Fault] = {}


def always(_broker: str) -> bool:
    """Be possible everywhere."""
    return True


def on_redis(broker: str) -> bool:
    """Be possible on Redis and Valkey."""
    return not on_rabbitmq(broker)


def on_rabbitmq(broker: str) -> bool:
    """Be possible on RabbitMQ."""
    return broker == "rabbitmq"


def with_faketime(_broker: str) -> bool:
    """Be possible where libfaketime is installed."""
    return faketime_library() is not None


def possible_faults(broker: str) -> dict[str, Fault]:
    """Return the faults that exist with a broker."""
    return {name: fault for name, fault in FAULTS.items() if fault.possible(broker)}


def fault(
    target: str, *, redelivers: bool = False, possible: Callable[[str], bool] = always, name: str = ""
) -> Callable[..., Course]:
    """Register a generator function as the fault that it is named after."""

    def register(course: Course) -> Course:
        inflict = contextmanager(course)
        FAULTS[name or course.__name__.replace("_", " ")] = Fault(target, inflict, redelivers, possible)
        return course

    return register


# --- the broker ---------------------------------------------------------------------------------


@fault("broker", redelivers=True)
def broker_killed(stack: Stack) -> Iterator[None]:
    """Kill it; it comes back with its data."""
    stack.broker.kill()
    yield
    stack.broker.start()


@fault("broker", redelivers=True)
def broker_frozen(stack: Stack) -> Iterator[None]:
    """Let it hang."""
    yield from _frozen(lambda: stack.broker.program)


@fault("broker", redelivers=True)
def connections_cut(stack: Stack) -> Iterator[None]:
    """Cut all connections to it, twice."""
    stack.proxy.send_signal(signal.SIGUSR1)
    yield
    stack.proxy.send_signal(signal.SIGUSR1)


@fault("broker", redelivers=True)
def network_silent(stack: Stack) -> Iterator[None]:
    """Let nothing pass to it or from it."""
    yield from _frozen(lambda: stack.proxy)


@fault("broker", redelivers=True)
def publishes_refused(stack: Stack) -> Iterator[None]:
    """Let it take acknowledgements and no messages."""
    stack.broker.refuse_publishes(refused=True)
    yield
    stack.broker.refuse_publishes(refused=False)


@fault("broker", redelivers=True, possible=on_redis)
def broker_full(stack: Stack) -> Iterator[None]:
    """Reach its ``maxmemory``."""
    yield from _full(_redis(stack).server)


@fault("broker", redelivers=True, possible=on_redis)
def visibility_over(stack: Stack) -> Iterator[None]:
    """Have it restore what is being run, and what is being deferred."""
    _redis(stack).end_visibility()
    yield
    _redis(stack).end_visibility()


@fault("broker", possible=on_redis)
def broker_scripts_flushed(stack: Stack) -> Iterator[None]:
    """Have it forget all scripts."""
    _redis(stack).server.client.script_flush()
    yield


# --- the store and the result backend -------------------------------------------------------------


@fault("store")
def store_killed(stack: Stack) -> Iterator[None]:
    """Refuse all connections to it; it comes back with its data."""
    yield from _killed(stack.store)


@fault("store")
def store_frozen(stack: Stack) -> Iterator[None]:
    """Let it hang."""
    yield from _frozen(lambda: stack.store.program)


@fault("store")
def store_emptied(stack: Stack) -> Iterator[None]:
    """Have it forget everything, twice."""
    stack.store.client.flushall()
    yield
    stack.store.client.flushall()


@fault("store")
def store_scripts_flushed(stack: Stack) -> Iterator[None]:
    """Have it forget all scripts."""
    stack.store.client.script_flush()
    yield


@fault("store")
def store_full(stack: Stack) -> Iterator[None]:
    """Reach its ``maxmemory``."""
    yield from _full(stack.store)


@fault("backend")
def backend_killed(stack: Stack) -> Iterator[None]:
    """Take the result backend away."""
    yield from _killed(stack.backend)


@fault("backend")
def backend_frozen(stack: Stack) -> Iterator[None]:
    """Let it hang."""
    yield from _frozen(lambda: stack.backend.program)


# --- workers and beat -----------------------------------------------------------------------------


@fault("worker 0", redelivers=True)
def worker_killed(stack: Stack) -> Iterator[None]:
    """Kill a worker and its pool."""
    stack.workers[0].program.kill()
    yield


@fault("worker 1", redelivers=True)
def main_process_killed(stack: Stack) -> Iterator[None]:
    """Kill a worker's main process only; its pool is left to itself for a moment."""
    stack.workers[1].program.send_signal(signal.SIGKILL)
    yield


@fault("worker 0", redelivers=True)
def pool_process_killed(stack: Stack) -> Iterator[None]:
    """Kill a process of a pool, as the kernel does when memory is short."""
    for child in psutil.Process(stack.workers[0].program.pid).children()[:1]:
        child.kill()
    yield


@fault("worker 1", redelivers=True)
def worker_terminated(stack: Stack) -> Iterator[None]:
    """Shut a worker down warmly; billiard may stop listening before it has received the last results."""
    stack.workers[1].program.send_signal(signal.SIGTERM)
    yield


@fault("worker 0", redelivers=True)
def worker_frozen(stack: Stack) -> Iterator[None]:
    """Let a worker and its pool hang."""
    yield from _frozen(lambda: stack.workers[0].program)


@fault("worker 1", redelivers=True, possible=with_faketime)
def clock_jumps(stack: Stack) -> Iterator[None]:
    """Let a worker's clock jump ahead by a minute, and back."""
    stack.set_clock("+60s")
    yield
    stack.set_clock("+0s")


@fault("beat")
def beat_dead(stack: Stack) -> Iterator[None]:
    """Be without beat."""
    stack.beat.program.kill()
    yield
    stack.beat.keep()


@fault("beat")
def beat_doubled(stack: Stack) -> Iterator[None]:
    """Have two beats."""
    second = stack.start_beat("second-beat")
    yield
    second.kill()


def _trap(window: str, stack: Stack) -> Iterator[None]:
    """Kill the next worker that passes through a window."""
    traps.arm(stack.traps, window)
    yield
    if traps.disarm(stack.traps, window):
        raise MissedError(window)


_REACHED: dict[type, Callable[[str], bool]] = {RedisQueues: on_redis, PublishedQueues: on_rabbitmq}

for _window, (_owner, _) in traps.WINDOWS.items():
    _where = _REACHED.get(_owner, always)
    fault("window", redelivers=True, possible=_where, name=f"worker dies: {_window}")(partial(_trap, _window))


# --- how ------------------------------------------------------------------------------------------


def _killed(server: KeyServer) -> Iterator[None]:
    server.kill()
    yield
    server.start()


def _frozen(program: Callable[[], Any]) -> Iterator[None]:
    group = program().pid
    os.killpg(group, signal.SIGSTOP)
    yield
    os.killpg(group, signal.SIGCONT)


def _full(server: KeyServer) -> Iterator[None]:
    server.set_full(full=True)
    yield
    server.set_full(full=False)


def _redis(stack: Stack) -> RedisBroker:
    if not isinstance(stack.broker, RedisBroker):
        raise TypeError(f"only Redis has that, not {stack.setup.broker}")
    return stack.broker
