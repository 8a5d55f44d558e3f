"""No interleaving of workers, ticks, faults and time breaks the protocol of permits and epochs.

And the search does find what it is there for: with one rule of the protocol broken, it tells of a promise broken.
"""

from __future__ import annotations

from typing import Any

import pytest

from resilient_tasks.core.machine import Decision
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.core.record import Record
from tests.model.explorer import BrokenRule, Space
from tests.model.fleet import SECOND, StoreFault, World
from tests.model.permits import Permits

EMPTIED = frozenset({StoreFault.EMPTIED})
ROLLED_BACK = frozenset({StoreFault.ROLLED_BACK})
OUT_OF_REACH = frozenset({StoreFault.OUT_OF_REACH})


def is_settled(world: World) -> bool:
    """Whether the breaker has healed, or only an operator can heal it."""
    return world.shared.state in {State.CLOSED, State.FORCED_OPEN}


def explore(**arguments: Any) -> Space[World]:
    space = Space(Permits(**arguments))
    space.always_leads_to(is_settled, "CLOSED")
    return space


@pytest.mark.parametrize(
    "arguments",
    [
        {"operated": True},
        {"trial_calls": 2, "operated": True},
        {"trial_calls": 2, "trial_successes": 1, "operated": True},
        {"store_faults": EMPTIED, "operated": True},
        {"store_faults": ROLLED_BACK},
        {"store_faults": OUT_OF_REACH},
    ],
    ids=["one-trial", "two-trials", "one-of-two-trials", "emptied", "rolled-back", "out-of-reach"],
)
def test_no_interleaving_breaks_a_promise(arguments: dict[str, Any]) -> None:
    space = explore(**arguments)
    print(space)
    assert len(space) > 400


# --- broken rules -------------------------------------------------------------------------------------


class DenialsRenew(Decision):
    """Whoever is denied a permit lengthens those of the others."""

    def acquire(self, holder: str, lease: int) -> tuple[bool, bool]:
        admitted, trial = super().acquire(holder, lease)
        if not admitted:
            self.record.trials = dict.fromkeys(self.record.trials, self.now + lease)
        return admitted, trial


class LeasesLastForEver(Decision):
    def _expire(self) -> None:
        pass


class OnePermitTooMany(Decision):
    def _grant(self, holder: str, lease: int) -> bool:
        if not super()._grant(holder, lease):
            self.record.trials[holder] = self.now + lease
        return True


class StragglersForgotten(Decision):
    """Trials that outlive their HALF_OPEN are not counted in the next."""

    def _enter(self, state: State, reason: str, actor: str = "") -> None:
        super()._enter(state, reason, actor)
        self.record.stragglers = {}


class AnyEpoch(Decision):
    """Reports count whatever epoch they belong to."""

    def _is_current(self, epoch: int) -> bool:
        return epoch >= 0


class AnyTrial(Decision):
    """Trials of former epochs count."""

    def settle(self, holder: str, epoch: int, outcome: Outcome, *told: Any) -> None:
        if epoch >= 0:
            self.record.trials.setdefault(holder, self.now + SECOND)
        super().settle(holder, self.record.epoch, outcome, *told)


class CountedEpochs(Decision):
    """The next epoch is the next number, which a store that has gone back in time gives a second time."""

    def _enter(self, state: State, reason: str, actor: str = "") -> None:
        following = self.record.epoch + 1
        super()._enter(state, reason, actor)
        self.record.epoch = following


class SilentHealing(Decision):
    """Nobody is told that the breaker has closed."""

    def _judge(self, cause: str, retry_after: int | None = None) -> None:
        super()._judge(cause, retry_after)
        if self.record.state is State.CLOSED:
            self.transition = None


class OpenForEver(Decision):
    def advance(self) -> None:
        if self.record.state is State.HALF_OPEN:
            self._expire()


class EpochsFromOne(Permits):
    """A store that has lost everything begins to count epochs anew."""

    def _created(self) -> Record:
        record = super()._created()
        record.epoch = 1
        return record


@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        ({"decision": DenialsRenew}, "longer than its lease and two ticks"),
        ({"decision": LeasesLastForEver}, "longer than its lease and two ticks"),
        ({"decision": OnePermitTooMany}, "more permits than allowed"),
        ({"holders": ("task", "task")}, "more trials in flight than allowed"),
        ({"decision": StragglersForgotten, "operated": True}, "more trials in flight than allowed"),
        ({"decision": AnyEpoch}, "a report of another epoch has an effect"),
        ({"decision": AnyTrial}, "a report of another epoch has an effect"),
        ({"decision": CountedEpochs, "store_faults": ROLLED_BACK}, "two events for one epoch"),
        ({"decision": CountedEpochs, "store_faults": OUT_OF_REACH}, "two events for one epoch"),
        ({"decision": SilentHealing}, "an epoch and no event"),
        ({"decision": OpenForEver}, "CLOSED cannot be reached any more"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_broken_rule_is_found(arguments: dict[str, Any], broken: str) -> None:
    with pytest.raises(BrokenRule, match=broken):
        explore(**arguments)


def test_epochs_that_begin_anew_are_found() -> None:
    with pytest.raises(BrokenRule, match="a report of another epoch has an effect"):
        Space(EpochsFromOne(store_faults=EMPTIED))


def test_a_broken_rule_is_told_with_the_shortest_story_that_leads_to_it() -> None:
    with pytest.raises(BrokenRule) as found:
        explore(decision=LeasesLastForEver)
    story = str(found.value).splitlines()
    assert story[1] == "worker 0 begins"
    assert story.count("a second passes") == 5  # of open time, lease and two ticks; the next is one too many
    assert story[-1].startswith("in World(")
