"""``Desk``: what Flower's handlers ask for, and who does it for them without keeping Flower's event loop waiting."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from functools import cached_property, partial
from typing import Any, TypeVar

from resilient_tasks.core.model import HELD_OPEN, Snapshot, Verb
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.errors import DeadLetterError, StoreError
from resilient_tasks.flower.errands import Errands, NoAnswerError
from resilient_tasks.flower.watch import Told, Watch
from resilient_tasks.monitor.report import Row, counted, rows_of
from resilient_tasks.worker.dead_letters import DeadLetter, DeadLetters
from resilient_tasks.worker.deferred import Deferred
from resilient_tasks.worker.runtime import Runtime

T = TypeVar("T")

logger = logging.getLogger("resilient_tasks")

#: Seconds for which it is waited until something is done.
PATIENCE = 5.0
#: Seconds for which it is waited until the broker has shown its tasks.
PATIENCE_TO_LOOK = 2.0
#: Most tasks, outages or breakers that a page lists whatever they do.
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
        """Names of the queues on the broker that are ours: of all breakers, of many those that were last seen busy."""
        few = len(self._runtime.breakers) <= LISTED
        queues, names = self._runtime.queues, {*self.watch.busy, *(self.names if few else ())}
        return [*map(queues.deferred, names), *map(queues.dead, names)]

    def defines(self, name: str) -> bool:
        """Whether there is such a breaker, or the parent of such a child."""
        return self._runtime.defines(name)

    def _told(self, snapshots: Sequence[Snapshot]) -> list[Told]:
        """Return what is told of breakers, with the outage that lasts and when those will be done who wait."""
        fleet = self._runtime.fleet
        estimates: dict[str, Estimate] = {}
        outages: dict[str, Outage] = {}
        with suppress(StoreError):  # one that keeps no history
            estimates = fleet.history.estimates(snapshots)
            outages = fleet.history.lasting(each.name for each in snapshots if each.state in HELD_OPEN)
        waiting = {name: asdict(estimate) for name, estimate in estimates.items()}
        lasting = {name: _told_of(outage) for name, outage in outages.items()}
        return [
            {**each.as_dict(), "estimate": waiting.get(each.name), "outage": lasting.get(each.name)}
            for each in snapshots
        ]

    # --- breakers -----------------------------------------------------------------------------------

    async def read(self, name: str) -> Told:
        """Read one breaker: a child that is plainly CLOSED is in no look at all of them."""
        spec = self._runtime.breaker(name).spec

        def read() -> Told:
            return self._told(self._runtime.fleet.store.read_shared([spec]))[0]

        return await self._store.run(read, patience=PATIENCE)

    async def command(self, name: str, verb: Verb, reason: str, actor: str) -> Told:
        """Carry out an operator's verb and return the state that it led to."""
        command = partial(self._runtime.fleet.command, self._runtime.breaker(name).spec, verb, reason, actor)
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
        """Return the outages of one breaker or of all, and of their children, the newest first, and what to tell."""

        def look() -> list[tuple[Outage, list[Row]]]:
            fleet = self._runtime.fleet
            names = fleet.with_children(self.names if name is None else [name])
            outages = fleet.history.outages(names)[:LISTED]
            lasting = {outage.breaker for outage in outages if outage.drained is None}
            snapshots = fleet.store.read_shared([self._runtime.breaker(each).spec for each in lasting])
            estimates = fleet.history.estimates(snapshots)
            return [(outage, rows_of(outage, estimates.get(outage.breaker))) for outage in outages]

        return await self._store.run(look, patience=PATIENCE)

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

        return await self._ask_broker(look, patience=PATIENCE_TO_LOOK)

    async def dead(self, name: str) -> dict[str, Any]:
        """Return how many dead letters a breaker has, and the oldest."""

        def look() -> dict[str, Any]:
            letters = self._dead.list(name, limit=LISTED)
            return {"count": self._dead.count(name)[name], "tasks": [_told(letter) for letter in letters]}

        return await self._ask_broker(look, patience=PATIENCE_TO_LOOK)

    async def resume_deferred(self, name: str, task_ids: Sequence[str], actor: str) -> list[str]:
        """Resume tasks that wait for a breaker; return the ids of those that were there."""
        done = await self._ask_broker(lambda: self._deferred.resume_some(name, frozenset(task_ids)))
        await self._log({name: len(done)}, "task", "resumed", actor)
        return list(done)

    async def drop_deferred(self, name: str, task_ids: Sequence[str], actor: str) -> list[str]:
        """Drop tasks that wait for a breaker; return the ids of those that were there."""
        done = await self._ask_broker(lambda: self._deferred.drop(name, frozenset(task_ids)))
        await self._log({name: len(done)}, "task", "dropped", actor)
        return list(done)

    async def replay_dead(self, name: str, task_ids: Sequence[str], actor: str) -> list[str]:
        """Send dead letters again as they were first published."""
        return await self._each_dead(self._dead.replay, "replayed", name, task_ids, actor)

    async def drop_dead(self, name: str, task_ids: Sequence[str], actor: str) -> list[str]:
        """Delete dead letters."""
        return await self._each_dead(self._dead.drop, "dropped", name, task_ids, actor)

    async def _each_dead(
        self, act: Callable[..., dict[str, int]], what: str, name: str, task_ids: Sequence[str], actor: str
    ) -> list[str]:
        """Do something to dead letters, and log how many it was done to, also if it was not all."""
        try:
            done = await self._ask_broker(lambda: act(*task_ids, breaker=name))
        except DeadLetterError as error:
            await self._log(error.done, "dead letter", what, actor)
            raise
        await self._log(done, "dead letter", what, actor)
        return list(task_ids)

    async def _log(self, done: Mapping[str, int], noun: str, what: str, actor: str) -> None:
        """Log what somebody has done to how many tasks of which breakers; without a store nothing is logged."""
        for name, count in done.items():
            if count and self.defines(name):
                with suppress(StoreError, NoAnswerError):
                    note = partial(self._runtime.fleet.history.note, name, f"{counted(count, noun)} {what}", actor)
                    await self._store.run(note, patience=PATIENCE)

    async def resume(self, name: str, rate: float | None, actor: str) -> int | None:
        """Resume what waits for a breaker now, without the workers' slow start; at this rate, if it goes on already.

        Args:
            name: of the breaker.
            rate: tasks per second; None: as fast as it goes.
            actor: who wants it.

        Returns:
            How many were resumed; None if that takes longer than :data:`PATIENCE` and goes on.
        """
        former = self._resuming.get(name)
        if former is not None:
            former.cancel()
        task = self._resuming[name] = asyncio.ensure_future(self._resume(name, rate, actor))
        task.add_done_callback(lambda done: self._resumed(name, done))
        done, _ = await asyncio.wait({task}, timeout=PATIENCE)
        return task.result() if done and not task.cancelled() else None

    async def _resume(self, name: str, rate: float | None, actor: str) -> int:
        resumed = 0
        try:
            async for batch in self._batches(name, rate):
                resumed += batch
        finally:
            await self._log({name: resumed}, "task", "resumed", actor)
        return resumed

    async def _batches(self, name: str, rate: float | None) -> AsyncIterator[int]:
        """Resume what waits at this moment; yield how many went with each batch."""
        waiting = await self._ask_broker(lambda: self._deferred.count(name), patience=PATIENCE_TO_LOOK)
        asked, started = 0, time.monotonic()
        while asked < waiting:
            due = waiting if rate is None else 1 + int((time.monotonic() - started) * rate)
            batch = min(due, waiting, asked + _BATCH) - asked
            asked += batch
            if batch:
                yield await self._ask_broker(partial(self._deferred.resume, name, limit=batch))
            await asyncio.sleep(0 if rate is None else _BEAT)

    def _resumed(self, name: str, done: asyncio.Task[int]) -> None:
        if self._resuming.get(name) is done:
            del self._resuming[name]
        self.watch.forget()
        if not done.cancelled() and done.exception() is not None:
            logger.warning("resuming the tasks of breaker %s ended: %s", name, done.exception())

    async def _ask_broker(self, errand: Callable[[], T], *, patience: float = PATIENCE) -> T:
        return await self._broker.run(errand, patience=patience)


def _told_of(outage: Outage) -> dict[str, Any]:
    """Return what is told of an outage beside the breaker that it is of."""
    return {"opened": outage.opened, "reason": outage.reason, "actor": outage.actor, "causes": outage.causes}


def _told(letter: DeadLetter) -> dict[str, Any]:
    """Return what a page tells of a dead letter: not its body and headers, which may hold secrets."""
    told = {field.name: getattr(letter, field.name) for field in fields(letter)}
    del told["headers"], told["body"]
    return {**told, "history": [step._asdict() for step in letter.history]}
