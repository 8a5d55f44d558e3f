"""Children: their own states under their parent's policy, how many there may be, and what they mean for the parent."""

from __future__ import annotations

from typing import Any

import pytest

from resilient_tasks.core.model import State, Verb
from resilient_tasks.store.base import IDLE_AFTER
from tests.contract.lab import SHARED, Lab, Subject


def parent_with_children(lab: Lab, count: int, **policy: Any) -> tuple[Subject, list[Subject]]:
    """Return a breaker and children of it, each of which has been used once."""
    parent = lab.breaker(consecutive_failures=2, **policy)
    children = [lab.breaker(f"payments:{key}", consecutive_failures=2, **policy) for key in range(count)]
    for child in children:
        assert lab.store.register(child.spec)
        child.calls("S")
    return parent, children


def active(parent: Subject) -> list[str]:
    names = parent.store.active_children(parent.name)
    assert len(names) == parent.snapshot().active_children
    return [name.partition(":")[2] for name in sorted(names)]


def test_a_child_opens_alone(lab: Lab) -> None:
    parent, (acme, other) = parent_with_children(lab, 2)
    acme.calls("FF")
    assert (acme.state, other.state, parent.state) == (State.OPEN, State.CLOSED, State.CLOSED)
    assert parent.snapshot().calls == 0
    assert active(parent) == ["0"]
    assert sorted(lab.store.children("payments")) == ["payments:0", "payments:1"]
    assert lab.store.children("payments", start=1, count=1) == ["payments:0"]  # in use while it is open


def test_a_child_that_has_healed_is_left_alone(lab: Lab) -> None:
    parent, (acme,) = parent_with_children(lab, 1, trial_calls=1, ramp=3.0)
    acme.calls("FF")
    assert not lab.store.mark_idle(acme.spec)
    lab.clock.advance(5)
    acme.trials("S")
    assert acme.state is State.CLOSED
    assert not lab.store.mark_idle(acme.spec)
    lab.clock.advance(3)
    assert lab.store.mark_idle(acme.spec)
    assert active(parent) == []


@SHARED
def test_a_child_that_tasks_wait_for_is_not_left_alone(lab: Lab) -> None:
    parent, (acme,) = parent_with_children(lab, 1)
    lab.ledger.add_deferred(acme.name, "a task")
    assert active(parent) == ["0"]
    assert not lab.store.mark_idle(acme.spec)
    lab.ledger.remove_deferred(acme.name, ["a task"])
    assert lab.store.mark_idle(acme.spec)


def test_there_are_only_so_many_children_and_idle_ones_make_room(lab: Lab) -> None:
    _, (acme, other) = parent_with_children(lab, 2, max_keys=2)
    late = lab.breaker("payments:late", max_keys=2)
    assert not lab.store.register(late.spec)
    assert lab.store.register(other.spec)
    acme.command(Verb.TRIP)
    lab.clock.advance(IDLE_AFTER / 1000 + 1)
    assert lab.store.register(late.spec)
    assert sorted(lab.store.children("payments")) == ["payments:0", "payments:late"]


def test_no_more_than_a_share_of_the_children_is_held_open(lab: Lab) -> None:
    parent, children = parent_with_children(lab, 4, max_open_ratio=0.5)
    for child in children:
        child.calls("FFF")
    assert [child.state for child in children] == [State.OPEN, State.OPEN, State.CLOSED, State.CLOSED]
    assert children[2].snapshot().failures == 3
    children[0].command(Verb.RESET)
    children[2].calls("F")
    assert children[2].state is State.OPEN
    children[3].command(Verb.TRIP)  # an operator knows better
    assert children[3].state is State.OPEN
    assert parent.state is State.CLOSED


def test_in_shadow_a_child_opens_whatever_the_others_do(lab: Lab) -> None:
    _, children = parent_with_children(lab, 2, max_open_ratio=0.5)
    children[0].calls("FF")
    children[1].command(Verb.SHADOW)
    children[1].calls("FF")
    assert children[1].snapshot().would_open


@SHARED
@pytest.mark.parametrize("state", [State.CLOSED, State.OPEN, State.FORCED_OPEN])
def test_a_state_that_says_nothing_any_more_ends(lab: Lab, state: State) -> None:
    _, (acme,) = parent_with_children(lab, 1)
    if state is not State.CLOSED:
        acme.command(Verb.TRIP if state is State.OPEN else Verb.ISOLATE)
    ttl = ttl_of(lab, acme)
    if state is State.FORCED_OPEN:
        assert ttl == -1
    else:
        assert 0 < ttl <= (120 if state is State.CLOSED else IDLE_AFTER / 1000 + 5)


def ttl_of(lab: Lab, child: Subject) -> float:
    """Seconds until a child's state ends; -1 if it does not."""
    store: Any = lab.store
    return float(store._server.run(lambda client: client.ttl(store._keys.breaker(child.name).state)))
