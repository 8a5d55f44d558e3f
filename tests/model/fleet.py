"""States of the model of permits and epochs, and how each is written down in one way only.

What decisions do not depend on is left out, and what they only compare is made small: epochs keep their order and
who is next to whom, times are seconds counted from now.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple, TypeVar

from resilient_tasks.core.model import State
from resilient_tasks.core.rules import Kept

SECOND = 1000
NOW = 1000  # ms: later than every epoch of a state
FAR = 10  # epochs farther apart than this are merely older and newer
OUTDATED = -1


class StoreFault(str, Enum):
    EMPTIED = "the store is emptied"
    ROLLED_BACK = "the store loses its last write"
    OUT_OF_REACH = "worker 1 cannot reach the store"


class Permit(NamedTuple):
    holder: str
    left: int  # of its lease, seconds
    unattended: int | None = None  # seconds since it was last renewed


class Breaker(NamedTuple):
    """What a store keeps of the breaker, as far as decisions depend on it."""

    era: int = 0
    epoch: int = 0
    state: State = State.CLOSED
    open_for: int | None = None
    row: int = 0
    successes: int = 0
    failures: int = 0
    permits: tuple[Permit, ...] = ()
    former: tuple[Permit, ...] = ()  # of earlier epochs


class Call(NamedTuple):
    """A guarded call, from its admission until its outcome has been reported.

    What the outcome is may be left open until then; all that shows earlier is that a trial's permit is no
    longer renewed.
    """

    era: int
    epoch: int
    trial: bool
    renews: bool


class World(NamedTuple):
    """One state of the model.

    ``replica`` is the shared breaker without its last write, while it may still take over. ``local`` is the
    breaker of worker 1 while that cannot reach the shared store.
    """

    shared: Breaker = Breaker()
    replica: Breaker | None = None
    local: Breaker | None = None
    calls: tuple[Call | None, ...] = (None, None)
    notified: int = 0  # the latest epoch that listeners were notified of
    without_tick: int = 0  # seconds
    faults: frozenset[StoreFault] = frozenset()  # that may still befall the store


Stay = TypeVar("Stay", Breaker, Call, Breaker | None, Call | None)


def breaker_of(worker: int, world: World) -> Breaker:
    return world.local if worker == 1 and world.local is not None else world.shared


def with_call(world: World, worker: int, call: Call | None) -> World:
    calls = list(world.calls)
    calls[worker] = call
    return world._replace(calls=tuple(calls))


def unrenewed(worker: int, world: World) -> World:
    call = world.calls[worker]
    return world if call is None else with_call(world, worker, call._replace(renews=False))


def written(world: World, shared: Breaker) -> World:
    return world if shared == world.shared else world._replace(shared=shared, replica=world.shared)


def unwatched(breaker: Breaker | None) -> Breaker | None:
    """Return a breaker that no tick looks after: only when one does will the time of its permits be counted."""
    if breaker is None:
        return None
    permits = sorted(permit._replace(unattended=None) for permit in breaker.permits)
    return breaker._replace(permits=tuple(permits), former=tuple(sorted(breaker.former)))


def outdated(world: World, call: Call | None) -> Call | None:
    """Return a call; all are alike whose epoch no store will ever be in again."""
    stores = [store for store in (world.shared, world.replica, world.local) if store is not None]
    if call is None or call.era in {store.era for store in stores} or call.epoch >= min(s.epoch for s in stores):
        return call
    return call._replace(era=OUTDATED, epoch=OUTDATED)


def aged(breaker: Breaker) -> Breaker:
    """Return the breaker a second later; what is over stays over."""
    permits = tuple(
        permit._replace(
            left=max(0, permit.left - 1), unattended=None if permit.unattended is None else permit.unattended + 1
        )
        for permit in breaker.permits
    )
    former = tuple(permit._replace(left=permit.left - 1) for permit in breaker.former)
    open_for = breaker.open_for and breaker.open_for - 1
    return breaker._replace(open_for=open_for, permits=permits, former=_live(former))


def _live(former: Iterable[Permit]) -> tuple[Permit, ...]:
    """Return those whose lease has not run out; the others make no difference any more."""
    return tuple(sorted(permit for permit in former if permit.left > 0))


def frozen(kept: Kept, era: int, former: Iterable[Permit], expired: int = 0) -> Breaker:
    """Write down what a store keeps; permits that have run out are as good as failed trials, if the rules see them."""
    unattended = {permit.holder: permit.unattended for permit in former}
    fields, permits, former = kept.fields, [], []
    for member, end in kept.trials.items():
        epoch, _, holder = member.partition(":")
        if epoch == str(fields["epoch"]) and end <= NOW and expired:
            continue
        if epoch == str(fields["epoch"]):
            permits.append(Permit(holder, max(0, end - NOW) // SECOND, unattended.get(holder)))
        else:
            former.append(Permit(holder, (end - NOW) // SECOND))
    return Breaker(
        era=era,
        epoch=fields["epoch"] - 1,
        state=fields["state"],
        open_for=max(0, fields["open_until"] - NOW) // SECOND if fields.get("open_until") else None,
        row=fields["row"],
        successes=fields["ok"],
        failures=fields["ko"] + expired,
        permits=tuple(permits),
        former=_live(former),
    )


def stays(world: World) -> list[Breaker | Call]:
    """Return everything that belongs to an epoch."""
    stays = (world.shared, world.replica, world.local, *world.calls)
    return [stay for stay in stays if stay is not None and stay.era != OUTDATED]


def next_era(world: World) -> int:
    return 1 + max(stay.era for stay in stays(world))


def renumbered(world: World) -> World:
    """Number epochs and eras anew: only their order, who is next to whom and who is the same make a difference."""
    eras = {era: number for number, era in enumerate(dict.fromkeys(stay.era for stay in stays(world)))}
    epochs: dict[int, int] = {}
    last = number = 0
    for epoch in sorted({world.notified, *(stay.epoch for stay in stays(world))}):
        number += min(epoch - last, FAR) if epochs else 0
        epochs[epoch], last = number, epoch

    def small(stay: Stay) -> Stay:
        if stay is None or stay.era == OUTDATED:
            return stay
        return stay._replace(era=eras[stay.era], epoch=epochs[stay.epoch])

    return world._replace(
        shared=small(world.shared),
        replica=small(world.replica),
        local=small(world.local),
        calls=tuple(small(call) for call in world.calls),
        notified=epochs[world.notified],
    )
