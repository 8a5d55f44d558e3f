"""Model of permits and epochs: two workers, a tick, an operator and a store that fails, over the real rules.

Every decision is made by the store in memory; the contract suite holds the scripts of the shared store to it.
Time passes in steps of a second.

An *era* is what an epoch numbers: one stay in one state. It is never used again, so that a stale report is
known as one even where its number is that of another.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from resilient_tasks.core.model import Answer, Calls, Grant, Outcome, State, Verb
from resilient_tasks.core.rules import Kept
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.local import LocalStore, continued, new
from tests.model.explorer import Step, see
from tests.model.fleet import (
    NOW,
    SECOND,
    Breaker,
    Call,
    StoreFault,
    World,
    aged,
    breaker_of,
    frozen,
    next_era,
    outdated,
    renumbered,
    unrenewed,
    unwatched,
    with_call,
    written,
)  # fmt: skip

NAME = "payments"
LEASE = 2  # seconds
TICKS = 2  # seconds in which a tick runs at least once
NO_HOLDER, NEVER = "no holder", -1

Answered = Answer | Grant | list[bool]


@dataclass
class Permits:
    """The model; other arguments make it one with which something must be wrong.

    Args:
        trial_calls: permits that may live at once.
        trial_successes: of them that close the breaker; None: all.
        store_faults: what may befall the shared store, each once.
        operated: an operator takes part.
        store: with the rules.
        holders: what the two workers ask for permits as.
    """

    trial_calls: int = 1
    trial_successes: int | None = None
    store_faults: frozenset[StoreFault] = frozenset()
    operated: bool = False
    store: type[LocalStore] = LocalStore
    holders: tuple[str, str] = ("worker 0", "worker 1")
    _decided: dict[tuple[Breaker, str, tuple[object, ...]], tuple[Answered, Breaker]] = field(default_factory=dict)
    _written: dict[World, World] = field(default_factory=dict)

    def __post_init__(self) -> None:
        policy = BreakerPolicy(
            consecutive_failures=2, minimum_calls=1000, minimum_tasks=1, open_duration=1.0, open_multiplier=1.0,
            open_jitter=0.0, trial_calls=self.trial_calls, trial_successes=self.trial_successes,
        )  # fmt: skip
        self.spec = Spec(NAME, policy)

    def start(self) -> World:
        return World(faults=self.store_faults)

    def steps(self, world: World) -> Iterator[Step[World]]:
        """Yield all that may happen."""
        for what, after, fault in self._steps(world):
            if after not in self._written:
                self._written[after] = self._small(after)
            yield Step(what, self._written[after], fault)

    def _steps(self, world: World) -> Iterator[Step[World]]:
        for worker, call in enumerate(world.calls):
            yield from self._idle(worker, world) if call is None else self._busy(worker, world, call)
        yield Step("tick", self._decide(world, "advance")[0]._replace(without_tick=0))
        if self._may_time_pass(world):
            yield Step("a second passes", self._later(world))
        if self.operated:
            for verb in (Verb.TRIP, Verb.ISOLATE, Verb.RESET):
                yield Step(f"operator: {verb}", self._decide(world, "command", verb)[0], fault=True)
        for fault in world.faults:
            yield Step(fault.value, self._store_fails(fault, world._replace(faults=world.faults - {fault})), fault=True)
        if world.local is not None:
            yield Step("worker 1 reaches the store again", unrenewed(1, world._replace(local=None)))

    # --- workers ----------------------------------------------------------------------------------------

    def _idle(self, worker: int, world: World) -> Iterator[Step[World]]:
        """Admit a call: by the view in CLOSED (an older view is like a call that began earlier), else by the store."""
        breaker = breaker_of(worker, world)
        if breaker.state is State.CLOSED:
            call = Call(breaker.era, breaker.epoch, trial=False, renews=False)
            yield Step(f"worker {worker} begins", with_call(world, worker, call))
            return
        after, grant = self._decide(world, "acquire", self.holders[worker], worker=worker)
        assert isinstance(grant, Grant)
        if grant.admitted:
            breaker = breaker_of(worker, after)
            after = with_call(after, worker, Call(breaker.era, breaker.epoch, grant.trial, renews=grant.trial))
        yield Step(f"worker {worker} asks and is {'admitted' if grant.admitted else 'refused'}", after)

    def _busy(self, worker: int, world: World, call: Call) -> Iterator[Step[World]]:
        if call.renews:
            yield Step(f"worker {worker} renews", self._renew(worker, world, call))
            yield Step(f"worker {worker} finishes, or hangs", unrenewed(worker, world))
        else:
            for outcome in (Outcome.SUCCESS, Outcome.FAILURE, *([Outcome.IGNORED] if call.trial else [])):
                reported = self._report(worker, world, call, outcome)
                yield Step(f"worker {worker} reports {outcome}", with_call(reported, worker, None))
                yield Step(f"worker {worker} reports {outcome} and receives no answer", reported, fault=True)
        dead = with_call(world, worker, None)
        yield Step(f"worker {worker} is killed", dead._replace(local=None) if worker == 1 else dead, fault=True)

    def _report(self, worker: int, world: World, call: Call, outcome: Outcome) -> World:
        what, holder = ("settle", self.holders[worker]) if call.trial else ("record", NO_HOLDER)
        after, _ = self._decide(world, what, holder, outcome, call.epoch + 1, worker=worker)
        if call.era != breaker_of(worker, world).era:
            unreported = breaker_of(worker, self._decide(world, what, NO_HOLDER, outcome, NEVER, worker=worker)[0])
            changed = breaker_of(worker, after)._replace(former=unreported.former)  # it frees its own permit
            see(changed == unreported, "a report of another epoch has an effect")
        return after

    def _renew(self, worker: int, world: World, call: Call) -> World:
        after, renewed = self._decide(world, "renew", self.holders[worker], worker=worker)
        return after if renewed == [True] else with_call(world, worker, call._replace(renews=False))

    # --- time and the store -----------------------------------------------------------------------------

    def _may_time_pass(self, world: World) -> bool:
        """Who lives and does not hang renews in time, and some worker ticks."""
        renewing = {holder for holder, call in zip(self.holders, world.calls, strict=True) if call and call.renews}
        held = [permit for store in (world.shared, world.local) if store for permit in store.permits + store.former]
        late = any(permit.holder in renewing and permit.left < 2 for permit in held)
        return not late and world.without_tick < TICKS

    @staticmethod
    def _later(world: World) -> World:
        return world._replace(
            shared=aged(world.shared),
            replica=world.replica and aged(world.replica),
            local=world.local and aged(world.local),
            without_tick=world.without_tick + 1,
        )

    def _store_fails(self, fault: StoreFault, world: World) -> World:
        if fault is StoreFault.ROLLED_BACK:
            return self._forgotten(world._replace(shared=world.replica or world.shared))
        if fault is StoreFault.EMPTIED:
            return self._forgotten(world._replace(shared=frozen(self._created(), next_era(world), ())))
        [known] = self._store(world.shared).read([self.spec])
        kept = Kept(continued(known, NOW))
        return unrenewed(1, world._replace(local=frozen(kept, world.shared.era, ())))

    def _forgotten(self, world: World) -> World:
        """A trial whose permit the store has forgotten runs on uncounted."""
        held = {permit.holder for permit in world.shared.permits + world.shared.former if permit.left}
        for worker, holder in enumerate(self.holders):
            if holder not in held and breaker_of(worker, world) is world.shared:
                world = unrenewed(worker, world)
        return world

    # --- decisions --------------------------------------------------------------------------------------

    def _decide(self, world: World, what: str, *details: object, worker: int = 0) -> tuple[World, Answered]:
        """Let the rules decide on the breaker that a worker goes by; see that they keep what they promise."""
        breaker = breaker_of(worker, world)
        question = breaker._replace(era=0), what, details  # many worlds ask the same
        if question not in self._decided:
            self._decided[question] = self._ask(*question)
        answer, after = self._decided[question]
        moved = after.epoch != breaker.epoch
        after = after._replace(era=next_era(world) if moved else breaker.era)
        reported = not isinstance(answer, list) and answer.transition is not None
        see(moved == reported, "an epoch and no event, or an event and no epoch")
        if moved:
            see(after.epoch > world.notified, "two events for one epoch")
            world = world._replace(notified=after.epoch)
        live = sum(permit.left > 0 for permit in after.permits + after.former)
        see(live <= self.trial_calls, "more permits than allowed")
        return world._replace(local=after) if breaker is world.local else written(world, after), answer

    def _ask(self, breaker: Breaker, what: str, details: tuple[Any, ...]) -> tuple[Answered, Breaker]:
        """Return what a store that keeps the breaker answers, and what it keeps then."""
        store = self._store(breaker)
        answer: Answered
        if what == "advance":
            answer = store.advance(self.spec)
        elif what == "command":
            answer = store.command(self.spec, *details)
        elif what == "acquire":
            answer = store.acquire(self.spec, *details, lease=LEASE)
        elif what == "renew":
            answer = store.renew(NAME, details, lease=LEASE)
        else:
            holder, outcome, epoch = details
            report = Evidence(epoch, (Calls(outcome),))
            settles = what == "settle"
            answer = store.settle(self.spec, holder, outcome, report) if settles else store.record(self.spec, report)
        expired = store._seen(self.spec).expired
        return answer, frozen(store._breakers[NAME], breaker.era, breaker.permits, expired)

    def _created(self) -> Kept:
        return Kept({**new(NOW), "rules": self.spec.rules().text()})

    def _store(self, breaker: Breaker) -> LocalStore:
        """Return a store that keeps the breaker; its epochs begin at 1, because 0 means that none is known."""
        kept, epoch = self._created(), breaker.epoch + 1
        kept.fields.update(
            first=NEVER, epoch=epoch, state=breaker.state, row=breaker.row, ok=breaker.successes, ko=breaker.failures,
            open_until="" if breaker.open_for is None else NOW + breaker.open_for * SECOND,
            failure_at=NOW, failure_tasks=int(breaker.row > 0), failure_score=int(breaker.row > 0),
        )  # fmt: skip
        kept.trials = {f"{epoch}:{permit.holder}": NOW + permit.left * SECOND for permit in breaker.permits}
        kept.trials.update({f"0:{permit.holder}": NOW + permit.left * SECOND for permit in breaker.former})
        store = self.store(lambda: NOW / SECOND)
        store._breakers[NAME] = kept
        return store

    # --- one state for all that are alike -----------------------------------------------------------------

    def _small(self, world: World) -> World:
        """See to the promises about a state and write it down in the one way that its likes are written down."""
        for workers in ((0,), (1,)) if world.local else ((0, 1),):
            trials = [call for worker in workers if (call := world.calls[worker]) and call.renews]
            see(len(trials) <= self.trial_calls, "more trials in flight than allowed")
        world = world._replace(
            shared=self._attended(world, world.shared),
            replica=unwatched(world.replica) if StoreFault.ROLLED_BACK in world.faults else None,
            local=unwatched(world.local and self._attended(world, world.local)),
        )
        longest = max((permit.unattended or 0 for permit in world.shared.permits), default=0)
        see(longest <= LEASE + TICKS, "no worker has renewed a permit for longer than its lease and two ticks")
        return renumbered(world._replace(calls=tuple(outdated(world, call) for call in world.calls)))

    def _attended(self, world: World, breaker: Breaker) -> Breaker:
        """Note which permits are not renewed; those of former calls will never be asked for by name again."""
        calls = dict(zip(self.holders, world.calls, strict=True))
        permits, gone = [], 0
        for held in sorted(breaker.permits, key=lambda permit: (permit.left, permit.unattended or 0, permit.holder)):
            call, permit = calls.get(held.holder), held
            if call is None or not call.trial or call.era != breaker.era:
                permit, gone = permit._replace(holder=f"gone {gone}"), gone + 1
            if call is None or not call.renews:
                permit = permit._replace(unattended=permit.unattended or 0)
            permits.append(permit)
        former = [
            permit if (call := calls.get(permit.holder)) and call.trial and call.era != breaker.era
            else permit._replace(holder=f"gone too {number}")
            for number, permit in enumerate(sorted(breaker.former, key=lambda permit: permit.left))
        ]  # fmt: skip
        return breaker._replace(permits=tuple(permits), former=tuple(sorted(former)))
