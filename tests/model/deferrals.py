"""Model of a task's way through deferral and back: workers, ticks and a broker, any of which may fail at any moment.

A step is what happens in one go: one script on Redis or Valkey, one publish or one acknowledgement on any other
broker, one write to the index of waiting tasks. Between any two of them a worker may die, a message be delivered
a second time, or the index be lost. What the breaker says is left open: it may admit or refuse at any time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple

from tests.model.explorer import Step, see

MOST_OUTSTANDING = 2  # a tick resumes no more while so many resumed tasks lie in their queue

# what a worker has done about the message in its hands
DELIVERED, RAN, INDEXED, PUBLISHED, DISOWNED = "delivered", "ran", "indexed", "published", "disowned"
# what a tick has done about the one that it has chosen
CHOSEN, UNINDEXED, RESUMED, DEAD_LETTERED, DROPPED, MISSED = (
    "chosen", "unindexed", "resumed", "dead-lettered", "dropped", "missed",
)  # fmt: skip


class Task(NamedTuple):
    """Where the copies of one task's message are, and what else is known of it."""

    queued: int = 1
    unacked: int = 0
    deferred: int = 0
    fetched: int = 0  # by a tick, from a broker that has no scripts
    dead: int = 0
    ended: bool = False  # it has a result
    indexed: bool = False
    redelivered: bool = False  # by the broker, after a fault

    @property
    def copies(self) -> int:
        return self.queued + self.unacked + self.deferred + self.fetched + self.dead


class Hand(NamedTuple):
    """A message in the hands of a worker or a tick."""

    task: int
    stage: str
    owned: bool = True  # the broker would take an acknowledgement


class World(NamedTuple):
    """One state of the model."""

    tasks: tuple[Task, ...]
    workers: tuple[Hand | None, ...]
    ticks: tuple[Hand | None, ...]
    outstanding: int = 0  # resumed tasks that no worker has taken up, as the store counts them
    faults: int = 0  # that may still happen


@dataclass
class Deferrals:
    """The model; other arguments make it one with which something must be wrong.

    Args:
        atomic: the broker runs scripts (Redis, Valkey); otherwise it is publish, then acknowledge.
        tasks: how many.
        workers: requests in the workers' hands at once.
        ticks: more than one overlap when a tick has outlived its lease.
        faults: how many may happen in all.
        pushes_unowned: a deferral does not look whether the message is still its own.
        acks_first: a deferral acknowledges before it publishes.
        moves_unseen: a tick pushes a message without looking whether it was still there.
        pops_first: a tick takes a message off in one step and pushes it in another.
        reconciles: ticks compare the index with what really waits.
    """

    atomic: bool
    tasks: int = 1
    workers: int = 2
    ticks: int = 2
    faults: int = 3
    pushes_unowned: bool = False
    acks_first: bool = False
    moves_unseen: bool = False
    pops_first: bool = False
    reconciles: bool = True

    def start(self) -> World:
        return World((Task(),) * self.tasks, (None,) * self.workers, (None,) * self.ticks, faults=self.faults)

    def steps(self, world: World) -> Iterator[Step[World]]:
        """Yield all that may happen, and see that no task is lost by it or in two places."""
        for what, after, fault in self._steps(world):
            for task in after.tasks:
                see(task.ended or task.copies > 0, f"{what}: a task is lost")
            self._see_places(after, what)
            yield Step(what, _in_order(after), fault)

    def _see_places(self, world: World, what: str) -> None:
        """On Redis a message is in one place; elsewhere a second copy waits only for its acknowledgement."""
        hands = [hand for hand in (*world.workers, *world.ticks) if hand is not None]
        going = Counter(hand.task for hand in hands if hand.stage in {PUBLISHED, RESUMED, DEAD_LETTERED})
        for number, task in enumerate(world.tasks):
            if self.atomic:
                see(task.copies <= 1, f"{what}: a message is in two places")
            elif not task.redelivered:
                see(task.copies - going[number] <= 1, f"{what}: a message is in two places without any fault")

    def _steps(self, world: World) -> Iterator[Step[World]]:
        for place, hand in enumerate(world.workers):
            if hand is None:
                yield from self._delivered(world, place)
            else:
                yield from self._worked_on(world, place, hand)
        for place, hand in enumerate(world.ticks):
            yield from self._tick_begins(world, place) if hand is None else self._tick_goes_on(world, place, hand)
        if self.reconciles:
            yield from self._reconciled(world)
        yield from self._restored(world)
        if world.faults and any(task.indexed for task in world.tasks):
            tasks = tuple(task._replace(indexed=False) for task in world.tasks)
            yield Step("the index is lost", world._replace(tasks=tasks, faults=world.faults - 1), fault=True)

    # --- a worker's main process --------------------------------------------------------------------------

    def _delivered(self, world: World, place: int) -> Iterator[Step[World]]:
        for number, task in enumerate(world.tasks):
            if task.queued:
                taken = _with(world, number, queued=-1, unacked=+1)._replace(outstanding=max(0, world.outstanding - 1))
                yield Step(f"{number} is delivered", _in_worker(taken, place, Hand(number, DELIVERED)))

    def _worked_on(self, world: World, place: int, hand: Hand) -> Iterator[Step[World]]:
        number, stage = hand.task, hand.stage

        def at(stage: str, world: World = world) -> World:
            return _in_worker(world, place, hand._replace(stage=stage))

        if stage == DELIVERED:
            yield Step(f"{number} runs", at(RAN, _noted(world, number, ended=True)))
            yield Step(f"{number} is indexed", at(INDEXED, _noted(world, number, indexed=True)))
            if world.faults:
                yield Step(f"{number} cannot be indexed", at(INDEXED, _less_faults(world)), fault=True)
        elif stage == RAN:
            yield Step(f"{number} is acknowledged", _in_worker(self._acknowledged(world, hand), place, None))
        elif stage == INDEXED:
            yield from self._defer(world, place, hand)
        elif stage == PUBLISHED:
            after = self._acknowledged(world, hand) if not self.acks_first else _with(world, number, deferred=+1)
            yield Step(f"{number} is out of hand", _in_worker(after, place, None))
        else:
            forgotten = _noted(world, number, indexed=False)
            yield Step(f"{number} is taken off the index: not ours", _in_worker(forgotten, place, None))
        if world.faults:
            yield Step("a worker dies", _in_worker(self._lost(world, hand), place, None), fault=True)

    def _defer(self, world: World, place: int, hand: Hand) -> Iterator[Step[World]]:
        number, mine = hand.task, world.tasks[hand.task].unacked > 0
        if not self.atomic:
            first = self._acknowledged(world, hand) if self.acks_first else _with(world, number, deferred=+1)
            yield Step(f"{number}: half a deferral", _in_worker(first, place, hand._replace(stage=PUBLISHED)))
        elif mine or self.pushes_unowned:
            pushed = _with(world, number, deferred=+1, unacked=-1 if mine else 0)
            yield Step(f"{number} is deferred", _in_worker(pushed, place, None))
        else:
            disowned = _in_worker(world, place, hand._replace(stage=DISOWNED))
            yield Step(f"{number} is not ours any more", disowned)

    def _acknowledged(self, world: World, hand: Hand) -> World:
        """On Redis all deliveries of a message share one tag: who acknowledges first does it for all."""
        owned = world.tasks[hand.task].unacked > 0 if self.atomic else hand.owned
        return _with(world, hand.task, unacked=-1) if owned else world

    def _lost(self, world: World, hand: Hand) -> World:
        """A broker with connections notices at once that a worker has died; Redis waits for the visibility timeout."""
        world = _noted(_less_faults(world), hand.task, redelivered=True)
        if self.atomic or not hand.owned or (self.acks_first and hand.stage == PUBLISHED):
            return world
        return _with(world, hand.task, unacked=-1, queued=+1)

    def _restored(self, world: World) -> Iterator[Step[World]]:
        """What was not acknowledged in time goes back to its queue, whether or not a worker has it in hand."""
        for number, task in enumerate(world.tasks):
            in_hand = [(place, hand) for place, hand in enumerate(world.workers) if hand and hand.task == number]
            if not task.unacked or (in_hand and not world.faults):
                continue
            back = _noted(_with(world, number, unacked=-1, queued=+1), number, redelivered=True)
            if not in_hand:
                yield Step(f"{number} is restored", back)
            elif self.atomic:
                yield Step(f"{number} is restored while in hand", _less_faults(back), fault=True)
            else:
                for place, hand in in_hand:
                    if hand.owned and not (self.acks_first and hand.stage == PUBLISHED):
                        cut = _in_worker(_less_faults(back), place, hand._replace(owned=False))
                        yield Step(f"{number} is restored, its connection was cut", cut, fault=True)

    # --- a tick -------------------------------------------------------------------------------------------

    def _tick_begins(self, world: World, place: int) -> Iterator[Step[World]]:
        """It looks only where the index says that something waits, and while its resumed tasks are taken up."""
        queued = sum(task.queued for task in world.tasks)
        if min(world.outstanding, queued) >= MOST_OUTSTANDING or not any(task.indexed for task in world.tasks):
            return
        for number, task in enumerate(world.tasks):
            if task.deferred:
                fetched = world if self.atomic else _with(world, number, deferred=-1, fetched=+1)
                yield Step(f"a tick chooses {number}", _in_tick(fetched, place, Hand(number, CHOSEN)))

    def _tick_goes_on(self, world: World, place: int, hand: Hand) -> Iterator[Step[World]]:
        number = hand.task
        if hand.stage == CHOSEN:
            unindexed = _in_tick(_noted(world, number, indexed=False), place, hand._replace(stage=UNINDEXED))
            yield Step(f"the tick takes {number} off the index", unindexed)
        elif hand.stage == UNINDEXED:
            yield from self._moved(world, place, hand)
        elif hand.stage == MISSED:
            yield Step(f"the tick indexes {number} again", _in_tick(_noted(world, number, indexed=True), place, None))
        else:
            yield Step(f"the tick is done with {number}", _in_tick(self._completed(world, hand), place, None))
        if world.faults:
            back = world if self.atomic else _with(world, number, fetched=-1, deferred=+1)
            died = _noted(_less_faults(back), number, redelivered=True)
            yield Step("a tick dies", _in_tick(died, place, None), fault=True)

    def _moved(self, world: World, place: int, hand: Hand) -> Iterator[Step[World]]:
        number = hand.task
        there = world.tasks[number].deferred > 0
        if self.atomic and not there and not self.moves_unseen:
            yield Step(f"{number} is gone: another moved it", _in_tick(world, place, hand._replace(stage=MISSED)))
            return
        gone = {"deferred": -1} if self.atomic and there else {}
        ended = _noted(world, number, ended=True)
        counted = world._replace(outstanding=min(MOST_OUTSTANDING, world.outstanding + 1))
        for stage, before, place_of in (
            (RESUMED, counted, {"queued": +1}), (DEAD_LETTERED, ended, {"dead": +1}), (DROPPED, ended, {}),
        ):  # fmt: skip
            first = gone if self.pops_first else {**gone, **place_of}
            moved = _in_tick(_with(before, number, **first), place, hand._replace(stage=stage))
            yield Step(f"{number} is {stage}", moved)

    def _completed(self, world: World, hand: Hand) -> World:
        if self.pops_first:
            place_of = {RESUMED: {"queued": +1}, DEAD_LETTERED: {"dead": +1}, DROPPED: {}}[hand.stage]
            world = _with(world, hand.task, **place_of)
        return world if self.atomic else _with(world, hand.task, fetched=-1)

    @staticmethod
    def _reconciled(world: World) -> Iterator[Step[World]]:
        indexed, waiting = (sum(values) for values in zip(*((t.indexed, t.deferred) for t in world.tasks), strict=True))
        if waiting == 0 and indexed:
            tasks = tuple(task._replace(indexed=False) for task in world.tasks)
            yield Step("reconciling: nothing waits", world._replace(tasks=tasks))
        elif waiting > indexed:
            tasks = tuple(task._replace(indexed=task.indexed or task.deferred > 0) for task in world.tasks)
            yield Step("reconciling: some were missing", world._replace(tasks=tasks))


def is_over(world: World) -> bool:
    """Whether every task has its result and nothing of it is under way; a dead letter stays for people to see."""
    return all(task.ended and task.copies == task.dead for task in world.tasks) and not any(world.workers + world.ticks)


def _with(world: World, number: int, **changes: int) -> World:
    """Return the world with some more or fewer copies of a task's message."""
    task = world.tasks[number]
    return _noted(world, number, **{name: getattr(task, name) + change for name, change in changes.items()})


def _noted(world: World, number: int, **values: int) -> World:
    tasks = list(world.tasks)
    tasks[number] = tasks[number]._replace(**values)  # type: ignore[arg-type] # names and values go together
    return world._replace(tasks=tuple(tasks))


def _in_worker(world: World, place: int, hand: Hand | None) -> World:
    return world._replace(workers=(*world.workers[:place], hand, *world.workers[place + 1 :]))


def _in_tick(world: World, place: int, hand: Hand | None) -> World:
    return world._replace(ticks=(*world.ticks[:place], hand, *world.ticks[place + 1 :]))


def _less_faults(world: World) -> World:
    return world._replace(faults=world.faults - 1)


def _in_order(world: World) -> World:
    """Return one state for all that differ only in who is who."""
    return min(_renamed(world, order) for order in permutations(range(len(world.tasks))))


def _renamed(world: World, order: tuple[int, ...]) -> World:
    def sorted_hands(hands: tuple[Hand | None, ...]) -> tuple[Hand | None, ...]:
        renamed = [hand and hand._replace(task=order[hand.task]) for hand in hands]
        return tuple(sorted(renamed, key=lambda hand: hand or ()))

    tasks = [task for _, task in sorted(zip(order, world.tasks, strict=True))]
    return world._replace(tasks=tuple(tasks), workers=sorted_hands(world.workers), ticks=sorted_hands(world.ticks))
