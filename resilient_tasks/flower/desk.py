"""``Desk``: what Flower's handlers ask for, and who does it for them without keeping Flower's event loop waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from functools import cached_property, partial
from typing import Any, TypeVar

from resilient_tasks.core.model import Snapshot, Verb
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.errors import StoreError
from resilient_tasks.flower.errands import Errands, NoAnswerError
from resilient_tasks.flower.watch import Told, Watch
from resilient_tasks.monitor.story import Row, rows_of
from resilient_tasks.monitor.words import counted
from resilient_tasks.worker.dead_letters import DeadLetter, DeadLetters
from resilient_tasks.worker.deferred import Deferred
from resilient_tasks.worker.runtime import Runtime

T = TypeVar("T")

logger = logging.getLogger("resilient_tasks")

#: Seconds that an answer of store or broker is waited for.
PATIENCE = 5.0
#: Most tasks that a page lists.
LISTED = 100
#: Seconds that a breaker's chart shows.
CHARTED = 3600.0
#: Most tasks that are resumed in one go, so that others are served in between.
_BATCH = 500
#: Seconds between two batches of tasks that are resumed at a rate.
_BEAT = 0.1


class Desk:
    """One app's breakers, as Flower's handlers see and steer them.

    Args:
        runtime: the app's runtime.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._store = Errands("store")
        self._broker = Errands("broker")
        self._resuming: dict[str, asyncio.Task[int]] = {}
        self.watch = Watch(lambda: self._told(runtime.read()), self._store)

    @property
    def names(self) -> list[str]:
        """Names of all breakers."""
        return sorted(self._runtime.breakers)

    @property
    def queues(self) -> list[str]:
        """Names of the queues on the broker that are ours, of all breakers and of the children that were last seen."""
        queues, names = self._runtime.queues, {*self.names, *self.watch.seen}
        return [*map(queues.deferred, names), *map(queues.dead, names)]

    def defines(self, name: str) -> bool:
        """Whether there is such a breaker, or the parent of such a child."""
        return self._runtime.defines(name)

    def _told(self, snapshots: Sequence[Snapshot]) -> list[Told]:
        """Return what is told of breakers, with an estimate of when those will be done who wait."""
        estimates: dict[str, Estimate] = {}
        with suppress(StoreError):  # one that keeps no history
            estimates = self._runtime.fleet.story.estimates(snapshots)
        waiting = {name: asdict(estimate) for name, estimate in estimates.items()}
        return [{**snapshot.as_dict(), "estimate": waiting.get(snapshot.name)} for snapshot in snapshots]

    # --- breakers -----------------------------------------------------------------------------------

    async def read(self, name: str) -> Told:
        """Read one breaker: a child that is plainly CLOSED is in no look at all of them."""
        spec = self._runtime.breaker(name).spec

        def read() -> Told:
            return self._told(self._runtime.fleet.store.read_shared([spec]))[0]

        return await self._store.run(read, patience=PATIENCE)

    async def command(self, name: str, verb: Verb, reason: str, actor: str) -> Told:
        """Carry out an operator's verb and return the state that it led to."""
        # the workers' policies stay in force, whatever checkout and environment Flower runs from
        spec = replace(self._runtime.breaker(name).spec, revision=0)
        command = partial(self._runtime.fleet.command, spec, verb, reason, actor)
        snapshot = await self._store.run(command, patience=PATIENCE)
        self.watch.forget()
        return snapshot.as_dict()

    async def history(self, name: str) -> dict[str, Any]:
        """Return a breaker's log, the newest entry first, and what was counted in each minute of the last hour."""
        spec, history = self._runtime.breaker(name).spec, self._runtime.fleet.history

        def look() -> dict[str, Any]:
            [snapshot] = self._runtime.fleet.store.read_shared([spec])
            minutes = history.minutes(name, since=snapshot.now - CHARTED)
            return {
                "now": snapshot.now,
                "state": snapshot.state,
                "transitions": [asdict(transition) for transition in history.transitions(name)],
                "minutes": [{"at": each.at, "refused": each.counts.refused, **each.counts.calls} for each in minutes],
            }

        return await self._store.run(look, patience=PATIENCE)

    async def outages(self, name: str | None) -> list[tuple[Outage, list[Row]]]:
        """Return the outages of one breaker or of all, the newest first, with what is told of them."""
        specs = self._runtime.specs() if name is None else [self._runtime.breaker(name).spec]

        def look() -> list[tuple[Outage, list[Row]]]:
            fleet = self._runtime.fleet
            snapshots = fleet.store.read_shared(specs)
            estimates = fleet.story.estimates(snapshots)
            outages = fleet.story.outages([spec.name for spec in specs])[:LISTED]
            return [(outage, rows_of(outage, estimates.get(outage.breaker))) for outage in outages]

        return await self._store.run(look, patience=PATIENCE)

    async def note(self, name: str, done: str, actor: str) -> None:
        """Log what somebody has done to the tasks of a breaker; without a store nothing is logged."""
        with suppress(StoreError, NoAnswerError):
            note = partial(self._runtime.fleet.history.note, name, done, actor)
            await self._store.run(note, patience=PATIENCE)

    # --- tasks --------------------------------------------------------------------------------------

    @cached_property
    def _deferred(self) -> Deferred:
        return Deferred(self._runtime)

    @cached_property
    def _dead(self) -> DeadLetters:
        return DeadLetters(self._runtime)

    @property
    def broker_errors(self) -> tuple[type[Exception], ...]:
        """What a broker that is away raises."""
        return self._runtime.queues.errors

    async def deferred(self, name: str) -> dict[str, Any]:
        """Return how many tasks wait for a breaker, and those that wait longest."""

        def look() -> dict[str, Any]:
            tasks = self._deferred.list(name, limit=LISTED)
            return {"count": self._deferred.count(name), "tasks": [asdict(task) for task in tasks]}

        return await self._ask_broker(look)

    async def dead(self, name: str) -> dict[str, Any]:
        """Return how many dead letters a breaker has, and the oldest."""

        def look() -> dict[str, Any]:
            letters = self._dead.list(name, limit=LISTED)
            return {"count": self._dead.count(name)[name], "tasks": [_told(letter) for letter in letters]}

        return await self._ask_broker(look)

    async def drop_deferred(self, name: str, task_ids: Sequence[str]) -> list[str]:
        """Drop tasks that wait for a breaker; return the ids of those that were there."""
        return list(await self._ask_broker(lambda: self._deferred.drop(name, frozenset(task_ids))))

    async def replay_dead(self, name: str, task_ids: Sequence[str]) -> list[str]:
        """Send dead letters again as they were first published."""
        await self._ask_broker(lambda: self._dead.replay(*task_ids, breaker=name))
        return list(task_ids)

    async def drop_dead(self, name: str, task_ids: Sequence[str]) -> list[str]:
        """Delete dead letters."""
        await self._ask_broker(lambda: self._dead.drop(*task_ids, breaker=name))
        return list(task_ids)

    async def resume(self, name: str, rate: float | None, actor: str) -> int | None:
        """Resume what waits for a breaker now, without the workers' slow start.

        Args:
            name: of the breaker.
            rate: tasks per second; None: as fast as it goes.
            actor: who wants it.

        Returns:
            How many were resumed; None if that takes longer than :data:`PATIENCE` and goes on.
        """
        task = self._resuming.get(name)
        if task is None:
            task = self._resuming[name] = asyncio.ensure_future(self._resume(name, rate, actor))
            task.add_done_callback(lambda done: self._resumed(name, done))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE)
        return task.result() if done else None

    async def _resume(self, name: str, rate: float | None, actor: str) -> int:
        resumed = 0
        try:
            async for batch in self._batches(name, rate):
                resumed += batch
        finally:
            if resumed:
                await self.note(name, f"{counted(resumed, 'task')} resumed", actor)
        return resumed

    async def _batches(self, name: str, rate: float | None) -> AsyncIterator[int]:
        """Resume what waits at this moment; yield how many went with each batch."""
        waiting = await self._ask_broker(lambda: self._deferred.count(name))
        asked, started = 0, time.monotonic()
        while asked < waiting:
            due = waiting if rate is None else 1 + int((time.monotonic() - started) * rate)
            batch = min(due, waiting, asked + _BATCH) - asked
            asked += batch
            if batch:
                yield await self._ask_broker(partial(self._deferred.resume, name, limit=batch))
            await asyncio.sleep(0 if rate is None else _BEAT)

    def _resumed(self, name: str, done: asyncio.Task[int]) -> None:
        del self._resuming[name]
        self.watch.forget()
        if done.exception() is not None:
            logger.warning("resuming the tasks of breaker %s ended: %s", name, done.exception())

    async def _ask_broker(self, errand: Callable[[], T]) -> T:
        return await self._broker.run(errand, patience=PATIENCE)


def _told(letter: DeadLetter) -> dict[str, Any]:
    """Return what a page tells of a dead letter: not its body and headers, which may hold secrets."""
    told = {field.name: getattr(letter, field.name) for field in fields(letter)}
    del told["headers"], told["body"]
    return {**told, "history": [step._asdict() for step in letter.history]}
