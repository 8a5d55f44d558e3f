"""No interleaving of workers, ticks, faults and time breaks the protocol of permits and epochs.

And the search does find what it is there for: with one rule of the protocol broken, it finds a promise broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from resilient_tasks.core.model import Answer, Calls, Outcome, State
from resilient_tasks.core.rules import Change, Kept, Seen
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.local import LocalStore
from tests.model.explorer import BrokenRule, Space
from tests.model.fleet import NOW, SECOND, StoreFault, World
from tests.model.permits import NAME, Permits

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


class DenialsRenew(LocalStore):
    """A denial lengthens the permits of the others."""

    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        seen, granted = super()._lease(spec, holder, lease)
        if not granted:
            kept = self._breakers[NAME]
            kept.trials = dict.fromkeys(kept.trials, NOW + lease)
        return seen, granted


class LeasesLastForEver(LocalStore):
    def _seen(self, spec: Spec) -> Seen:
        seen = super()._seen(spec)
        seen.expired = 0
        return seen


class OnePermitTooMany(LocalStore):
    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        seen, granted = super()._lease(spec, holder, lease)
        if not granted and seen.state is State.HALF_OPEN:
            self._breakers[NAME].trials[f"{seen.epoch}:{holder}"] = NOW + lease
        return seen, True


class FormerForgotten(LocalStore):
    """Trials that outlive their HALF_OPEN are not counted in the next."""

    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        after = super()._change(spec, seen, change)
        self._breakers[NAME].trials = {}
        return after


class AnyEpoch(LocalStore):
    """Reports count whatever epoch they belong to."""

    def _count(self, spec: Spec, epoch: int, runs: Sequence[Calls], check: tuple[Outcome, int] | None = None) -> Seen:
        return super()._count(spec, self._breakers[NAME].fields["epoch"] if epoch >= 0 else epoch, runs, check)


class AnyTrial(LocalStore):
    """Trials of former epochs count."""

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        epoch = self._breakers[NAME].fields["epoch"]
        if evidence.epoch >= 0:
            self._breakers[NAME].trials.setdefault(f"{epoch}:{holder}", NOW + SECOND)
        return super().settle(spec, holder, outcome, replace(evidence, epoch=epoch), jitter=jitter)


class CountedEpochs(LocalStore):
    """The next epoch is the next number, which a store that has gone back in time gives a second time."""

    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        fields = {**change.fields, "epoch": seen.epoch + 1} if "epoch" in change.fields else change.fields
        return super()._change(spec, seen, change._replace(fields=fields))


class SilentHealing(LocalStore):
    """That the breaker has closed is not reported."""

    def _decide(self, spec: Spec, seen: Seen, evidence: Evidence | None = None, jitter: float = 0.0) -> Answer:
        answer = super()._decide(spec, seen, evidence, jitter)
        return replace(answer, transition=None) if answer.snapshot.state is State.CLOSED else answer


class OpenForEver(LocalStore):
    def _decide(self, spec: Spec, seen: Seen, evidence: Evidence | None = None, jitter: float = 0.0) -> Answer:
        return Answer(seen.snapshot()) if seen.state is State.OPEN else super()._decide(spec, seen, evidence, jitter)


class EpochsFromOne(Permits):
    """A store that has lost everything begins to count epochs anew."""

    def _created(self) -> Kept:
        kept = super()._created()
        kept.fields["epoch"] = 1
        return kept


@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        ({"store": DenialsRenew}, "longer than its lease and two ticks"),
        ({"store": LeasesLastForEver}, "longer than its lease and two ticks"),
        ({"store": OnePermitTooMany}, "more permits than allowed"),
        ({"holders": ("task", "task")}, "more trials in flight than allowed"),
        ({"store": FormerForgotten, "operated": True}, "more trials in flight than allowed"),
        ({"store": AnyEpoch}, "a report of another epoch has an effect"),
        ({"store": AnyTrial}, "a report of another epoch has an effect"),
        ({"store": CountedEpochs, "store_faults": ROLLED_BACK}, "two events for one epoch"),
        ({"store": CountedEpochs, "store_faults": OUT_OF_REACH}, "two events for one epoch"),
        ({"store": SilentHealing}, "an epoch and no event"),
        ({"store": OpenForEver}, "CLOSED cannot be reached any more"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_broken_rule_is_found(arguments: dict[str, Any], broken: str) -> None:
    with pytest.raises(BrokenRule, match=broken):
        explore(**arguments)


def test_epochs_that_begin_anew_are_found() -> None:
    with pytest.raises(BrokenRule, match="a report of another epoch has an effect"):
        Space(EpochsFromOne(store_faults=EMPTIED))


def test_a_broken_rule_is_found_with_the_fewest_steps_that_lead_to_it() -> None:
    with pytest.raises(BrokenRule) as found:
        explore(store=LeasesLastForEver)
    steps = str(found.value).splitlines()
    assert steps[1] == "worker 0 begins"
    assert steps.count("a second passes") == 5  # of open time, lease and two ticks; the next is one too many
    assert steps[-1].startswith("in World(")
