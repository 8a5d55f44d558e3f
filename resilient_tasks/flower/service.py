"""What Flower's handlers read and do, without keeping Flower's event loop waiting for the store or the broker."""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from resilient_tasks.core.model import HELD_OPEN, Snapshot, State, Verb, parent_of
from resilient_tasks.core.outage import Outage
from resilient_tasks.errors import DeadLetterError, StoreError
from resilient_tasks.monitor.report import Row, rows_of
from resilient_tasks.operations.waiting import DeadLetters, Deferred, note
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.background import start_thread
from resilient_tasks.worker.context import Runtime
from resilient_tasks.worker.envelope import UNDECODABLE

T = TypeVar("T")
Fields = dict[str, Any]

logger = logging.getLogger("resilient_tasks")

TIMEOUT = 5.0  # seconds for which a handler waits for something to be done
READ_TIMEOUT = 2.0  # the same for the broker's tasks, which a page only shows
LISTED = 100  # most tasks, outages or breakers on one page
SEARCHED = 5_000  # most tasks that a search looks at
DURATIONS_OVER = 300.0  # seconds of which the durations of tasks are shown
CHARTED = 3600.0  # seconds that a breaker's chart shows
REFRESH, IDLE_REFRESH = 1.0, 5.0  # seconds between two reads of all breakers while pages are open, and while none is

_LOOK_TIMEOUT, _CHANGE_TIMEOUT, _NEVER_READ_TIMEOUT = 0.05, 1.0, 5.0  # seconds that a look waits for a new read
_REFRESH_TIMEOUT = 10.0
_QUEUE_SIZE = 1_000

_SEARCHABLE = ("task_id", "task", "args", "kwargs", "reason")  # fields of a task

#: What can be done to tasks, and its name in the log.
TASK_ACTIONS = {
    "deferred/resume": "resumed",
    "deferred/drop": "dropped",
    "dead/drop": "dropped",
    "dead/replay": "replayed",
}


class NoAnswerError(Exception):
    """Store or broker did not answer in time. A change that had begun may still be made."""


class Executor:
    """Runs functions one after the other in a daemon thread, which delays no exit; ``name`` is what they ask."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(_QUEUE_SIZE)
        self._busy_since: float | None = None
        start_thread(name, self._run)

    async def submit(self, function: Callable[[], T], *, timeout: float = TIMEOUT) -> T:
        """Return what ``function`` returns in the thread, or raise what it raises.

        Raises:
            NoAnswerError: it took longer than ``timeout`` seconds, or another function already has: then at once.
        """
        busy_since = self._busy_since
        if busy_since is not None and (busy_for := time.monotonic() - busy_since) > timeout:
            raise NoAnswerError(f"the {self._name} has not answered for {busy_for:.0f} s")
        future: Future[T] = Future()
        try:
            self._queue.put_nowait((future, function))
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except (queue.Full, asyncio.TimeoutError):
            raise NoAnswerError(f"the {self._name} did not answer within {timeout:g} s") from None

    def _run(self) -> None:
        while True:
            self._busy_since = None
            future, function = self._queue.get()
            self._busy_since = time.monotonic()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 - the caller gets it
                    future.set_exception(error)


@dataclass(frozen=True)
class Look:
    """All breakers at one moment: when they were read, and why they could not be read since."""

    breakers: Mapping[str, Fields] = field(default_factory=dict)  # fields of each, by name
    breakers_json: str = "[]"  # the same as a JSON array; made once, because it is sent to many
    read_at: float | None = None  # seconds since the epoch; None: never
    problem: str = ""

    def freshness(self) -> Fields:
        age = None if self.read_at is None else max(0.0, time.time() - self.read_at)
        return {"read_at": self.read_at, "age": age, "problem": self.problem}

    def as_json(self) -> str:
        return f'{json.dumps(self.freshness())[:-1]}, "breakers": {self.breakers_json}}}'


class Watch:
    """Reads all breakers in the background, so that an unavailable store delays no page."""

    def __init__(self, read: Callable[[], Sequence[Fields]], store: Executor) -> None:
        self._read, self._store = read, store
        self._latest = Look()
        self._old_at = float("-inf")  # monotonic
        self._reading: asyncio.Task[None] | None = None
        self._timeout = _LOOK_TIMEOUT

    @property
    def active(self) -> list[str]:
        """Names of the breakers that were not CLOSED when they were last read, or had deferred tasks."""
        breakers = self._latest.breakers.values()
        return [each["name"] for each in breakers if each["state"] != State.CLOSED or each["deferred"]]

    async def run(self) -> None:
        """Look for as long as the event loop runs, even if no page does."""
        while True:
            await self.look()
            await asyncio.sleep(IDLE_REFRESH)

    async def look(self) -> Look:
        """Return the state in the store; the last one read, if the store does not answer at once."""
        if self._reading is None and time.monotonic() >= self._old_at:
            self.refresh(_LOOK_TIMEOUT)
        if self._reading is not None:
            timeout = _NEVER_READ_TIMEOUT if self._latest.read_at is None else self._timeout
            await asyncio.wait({self._reading}, timeout=timeout)
        return self._latest

    def refresh(self, timeout: float = _CHANGE_TIMEOUT) -> None:
        """Read at once, by default because something has just been changed; looks wait for that so long."""
        self._reading, self._timeout = asyncio.ensure_future(self._refresh()), timeout
        self._old_at = time.monotonic() + REFRESH

    async def _refresh(self) -> None:
        try:
            self._latest = await self._store.submit(self._take, timeout=_REFRESH_TIMEOUT)
        except (StoreError, NoAnswerError) as error:
            self._latest = replace(self._latest, problem=str(error))
        except Exception as error:  # pages go on with what was read before
            logger.exception("Flower cannot read the breakers")
            self._latest = replace(self._latest, problem=f"the breakers cannot be read: {type(error).__name__}")
        if self._reading is asyncio.current_task():
            self._reading = None

    def _take(self) -> Look:
        breakers = self._read()
        return Look({each["name"]: each for each in breakers}, json.dumps(breakers), time.time())


class Service:
    """One app's breakers and their tasks, read and changed for Flower's handlers."""

    def __init__(self, runtime: Runtime, run_times: Callable[[Sequence[str], float], Fields]) -> None:
        self._runtime, self._run_times = runtime, run_times
        self._store, self._broker = Executor("store"), Executor("broker")
        self._deferred, self._dead = Deferred(runtime), DeadLetters(runtime)
        self._resuming: dict[str, asyncio.Task[int]] = {}
        self.watch = Watch(lambda: self._fields(runtime.read()), self._store)
        self.defines = runtime.defines
        self.broker_errors = runtime.queues.errors

    @property
    def names(self) -> list[str]:
        return sorted(self._runtime.breakers)

    @property
    def queues(self) -> list[str]:
        """Names of our queues on the broker: of all breakers, or of the active ones where there are many."""
        few = len(self._runtime.breakers) <= LISTED
        queues, names = self._runtime.queues, {*self.watch.active, *(self.names if few else ())}
        return [*map(queues.deferred, names), *map(queues.dead, names)]

    # --- read in the executors' threads ---------------------------------------------------------------

    def _fields(self, snapshots: Sequence[Snapshot]) -> list[Fields]:
        """Return the fields of breakers, with the outage under way and the estimate of when their tasks are done."""
        estimates: dict[str, Fields] = {}
        outages: dict[str, Fields] = {}
        with suppress(StoreError):  # one that keeps no history
            history = self._runtime.fleet.history
            estimates = {name: asdict(estimate) for name, estimate in history.estimates(snapshots).items()}
            lasting = history.lasting(each.name for each in snapshots if each.state in HELD_OPEN)
            shown = ("opened", "reason", "actor", "causes")
            outages = {name: {each: getattr(outage, each) for each in shown} for name, outage in lasting.items()}
        return [
            {**each.as_dict(), "estimate": estimates.get(each.name), "outage": outages.get(each.name)}
            for each in snapshots
        ]

    def _read(self, names: Sequence[str]) -> list[Snapshot]:
        return self._runtime.fleet.store.read_shared([self._runtime.breaker(name).spec for name in names])

    def _read_history(self, name: str) -> Fields:
        [snapshot], history = self._read([name]), self._runtime.fleet.history
        minutes = history.minutes(name, since=snapshot.now - CHARTED)
        return {
            "now": snapshot.now,
            "state": snapshot.state,
            "transitions": [asdict(transition) for transition in history.transitions(name)],
            "minutes": [{"at": each.at, "refused": each.counts.refused, **each.counts.calls} for each in minutes],
        }

    def _read_outages(self, names: Sequence[str]) -> list[tuple[Outage, list[Row]]]:
        fleet = self._runtime.fleet
        outages = fleet.history.outages(fleet.with_children(names))[:LISTED]
        lasting = {outage.breaker for outage in outages if outage.drained is None}
        estimates = fleet.history.estimates(self._read(list(lasting)))
        return [(outage, rows_of(outage, estimates.get(outage.breaker))) for outage in outages]

    def _read_tasks(self, name: str, part: str, search: str | None) -> Fields:
        limit = LISTED if search is None else SEARCHED
        if part == "deferred":
            count, tasks = self._deferred.count(name), [asdict(each) for each in self._deferred.list(name, limit=limit)]
        else:
            count = self._dead.count(name)[name]
            tasks = [each.public_fields() for each in self._dead.list(name, limit=limit)]
        if search is None:
            return {"count": count, "tasks": tasks}
        wanted = search.casefold()
        found = [each for each in tasks if any(wanted in str(each[field]).casefold() for field in _SEARCHABLE)]
        return {"count": count, "tasks": found[:LISTED], "ids": [each["task_id"] for each in found]}

    def _count_dead(self, names: Sequence[str]) -> dict[str, int]:
        return {name: count for name in names if (count := self._dead.count(name)[name])}

    def _act_on_tasks(self, name: str, action: str, task_ids: Sequence[str], actor: str) -> list[str]:
        ids, what = frozenset(task_ids), TASK_ACTIONS[action]
        if action.startswith("deferred/"):
            found = self._deferred.resume_some(name, ids) if what == "resumed" else self._deferred.drop(name, ids)
            note(self._runtime, {name: len(found)}, "task", what, actor)
            return list(found)
        act = self._dead.replay if what == "replayed" else self._dead.drop
        done: Mapping[str, int] = {}
        try:
            done = act(*task_ids, breaker=name)
        except DeadLetterError as error:
            done = error.done
            raise
        finally:
            note(self._runtime, done, "dead letter", what, actor)
        return list(task_ids)

    # --- for the handlers -----------------------------------------------------------------------------

    async def read(self, name: str) -> Fields:
        """Read one breaker; an idle child is in no look at all of them."""
        return await self._store.submit(lambda: self._fields(self._read([name]))[0])

    def about(self, name: str) -> tuple[BreakerPolicy, list[str]]:
        """Return the policy of a breaker, as this process declares it, and the names of the tasks that it guards."""
        return self._runtime.breaker(name).policy, self._runtime.tasks_by_breaker()[parent_of(name) or name]

    async def part(self, name: str, part: str, search: str | None = None) -> Fields:
        """Return one part of a breaker's page.

        ``history``: its log, what was counted in each minute of the last hour, and how long its tasks take.
        ``deferred`` and ``dead``: how many tasks wait for it or are dead-lettered, and the oldest; with ``search`` the
        oldest in which that text is, and the ids of all of them.
        """
        if part == "history":
            history = await self._store.submit(partial(self._read_history, name))
            tasks = [] if parent_of(name) else self.about(name)[1]  # no event has a task's key
            return {**history, "durations": self._run_times(tasks, history["now"] - DURATIONS_OVER)}
        read = partial(self._read_tasks, name, part, search)
        return await self._broker.submit(read, timeout=READ_TIMEOUT if search is None else TIMEOUT)

    async def dead_letters(self) -> dict[str, int]:
        """Return how many dead letters there are, by breaker that has any; others are served in between."""
        names, counts = [*self.names, UNDECODABLE], dict[str, int]()
        for first in range(0, len(names), LISTED):
            count = partial(self._count_dead, names[first : first + LISTED])
            counts |= await self._broker.submit(count, timeout=READ_TIMEOUT)
        return counts

    async def outages(self, name: str | None) -> list[tuple[Outage, list[Row]]]:
        """Return the outages of one breaker or of all, and of their children, the newest first, with their report."""
        return await self._store.submit(partial(self._read_outages, self.names if name is None else [name]))

    async def command(self, name: str, verb: Verb, reason: str, actor: str) -> Fields:
        """Run an operator command and return the state after it."""
        spec, command = self._runtime.breaker(name).spec, self._runtime.fleet.command
        snapshot = await self._store.submit(partial(command, spec, verb, reason, actor))
        self.watch.refresh()
        return snapshot.as_dict()

    async def act_on_tasks(self, name: str, action: str, task_ids: Sequence[str], actor: str) -> list[str]:
        """Carry out one of :data:`TASK_ACTIONS` on tasks; return the ids of those that were there."""
        return await self._broker.submit(partial(self._act_on_tasks, name, action, task_ids, actor))

    async def resume(self, name: str, rate: float | None, actor: str) -> int | None:
        """Resume a breaker's tasks now, so many per second or as fast as it goes; change the rate if that is under way.

        Return how many were resumed; None if that takes longer than :data:`TIMEOUT` and goes on.
        """
        former = self._resuming.get(name)
        if former is not None:
            former.cancel()
        task = self._resuming[name] = asyncio.ensure_future(self._resume(name, rate, actor))
        task.add_done_callback(partial(self._resumed, name))
        done, _ = await asyncio.wait({task}, timeout=TIMEOUT)
        return task.result() if done and not task.cancelled() else None

    async def _resume(self, name: str, rate: float | None, actor: str) -> int:
        resumed = 0
        try:
            batches = self._deferred.resume_at(name, rate)
            while (batch := await self._broker.submit(lambda: next(batches, None))) is not None:
                count, pause = batch
                resumed += count
                await asyncio.sleep(pause)  # others are served in between
        finally:
            with suppress(NoAnswerError):
                await self._store.submit(partial(note, self._runtime, {name: resumed}, "task", "resumed", actor))
        return resumed

    def _resumed(self, name: str, done: asyncio.Task[int]) -> None:
        self.watch.refresh()
        if not done.cancelled() and done.exception() is not None:
            logger.warning("resuming the tasks of breaker %s ended: %s", name, done.exception())
