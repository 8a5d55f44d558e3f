"""Slots: of a breaker with a limit no more calls are in flight than that."""

from __future__ import annotations

import pytest

from resilient_tasks.core.model import State, Verb
from tests.contract.lab import ONE_OF_EACH, Lab, Subject


def take(breaker: Subject, holders: str) -> list[bool]:
    return [breaker.ask(holder).admitted for holder in holders]


def test_no_more_calls_are_in_flight_than_max_concurrency(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=3)
    assert take(breaker, "abcd") == [True, True, True, False]
    snapshot = breaker.snapshot()
    assert (snapshot.in_flight, snapshot.concurrency_limit, snapshot.has_room) == (3, 3, False)

    breaker.settle("b", "S")
    assert take(breaker, "de") == [True, False]


def test_without_a_limit_nothing_is_counted(lab: Lab) -> None:
    breaker = lab.breaker()
    grant = breaker.ask("a")
    assert (grant.admitted, grant.leased) == (True, False)
    assert (grant.snapshot.in_flight, grant.snapshot.concurrency_limit, grant.snapshot.has_room) == (0, None, True)


def test_the_end_of_a_call_counts_once(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=3)
    take(breaker, "abc")
    for holder, letter in ("aF", "aF", "bS", "cI", "xF"):
        breaker.settle(holder, letter)
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures, snapshot.in_flight) == (2, 1, 0)


def test_ends_of_calls_open_the_breaker(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=5)
    take(breaker, "abcde")
    for holder in "abcd":
        assert breaker.settle(holder, "F").snapshot.state is State.CLOSED
    epoch = breaker.snapshot().epoch
    assert breaker.settle("e", "F", cause="ReadTimeout").snapshot.state is State.OPEN
    assert breaker.transitions[0].reason == "evidence 5 of 5: of the last 5 calls 5 failed, last: ReadTimeout"
    assert breaker.snapshot().epoch > epoch


def test_a_slot_of_the_dead_is_free_after_its_lease(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=2)
    take(breaker, "ab")
    lab.clock.advance(6)
    assert breaker.store.renew(breaker.name, ["a"], lease=10.0) == [True]
    lab.clock.advance(5)
    assert take(breaker, "cd") == [True, False]
    assert breaker.store.renew(breaker.name, ["b"], lease=10.0) == [False]
    breaker.settle("b", "F")
    assert (breaker.snapshot().in_flight, breaker.snapshot().calls) == (2, 0)


def test_asking_again_renews_and_takes_no_second_slot(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=2)
    assert take(breaker, "aab") == [True, True, True]
    assert breaker.snapshot().in_flight == 2


# --- other states ------------------------------------------------------------------------------------------


def test_trials_need_a_slot_too(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=2, trial_calls=3)
    breaker.ask("old", lease=100.0)
    breaker.half_open()
    grants = [breaker.ask(holder) for holder in "abc"]
    assert [(grant.admitted, grant.trial) for grant in grants] == [(True, True), (False, False), (False, False)]
    breaker.settle("old", "S")
    assert breaker.ask("b").trial
    breaker.settle("a", "S")
    assert (breaker.snapshot().in_flight, breaker.snapshot().trials) == (1, 1)


@pytest.mark.parametrize("verb", [Verb.DISABLE, Verb.SHADOW])
def test_an_operator_lifts_the_limit(lab: Lab, verb: Verb) -> None:
    breaker = lab.breaker(max_concurrency=1)
    breaker.command(verb)
    assert take(breaker, "abc") == [True, True, True]
    assert breaker.snapshot().concurrency_limit is None


def test_after_a_recovery_the_limit_grows_with_the_ramp(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=20, trial_calls=1, ramp=10.0)
    assert breaker.half_open().trials("S") is State.CLOSED
    limits = []
    for _ in range(6):
        limits.append(breaker.snapshot().concurrency_limit)
        lab.clock.advance(2.5)
    assert limits == [2, 6, 11, 15, 20, 20]


# --- the adaptive limit -----------------------------------------------------------------------------------------


def rounds(breaker: Subject, count: int, *, capacity: int) -> list[int]:
    """Use all slots again and again; of the calls in flight only ``capacity`` succeed."""
    limits = []
    for number in range(count):
        limit = breaker.snapshot().concurrency_limit or 0
        holders = [f"call {number}.{i}" for i in range(limit)]
        assert all(breaker.ask(holder).admitted for holder in holders)
        for i, holder in enumerate(holders):
            breaker.settle(holder, "S" if i < capacity else "F")
        limits.append(limit)
    return limits


@ONE_OF_EACH
def test_the_limit_grows_while_it_is_used_and_all_goes_well(lab: Lab) -> None:
    breaker = lab.breaker(concurrency="adaptive", min_concurrency=2, max_concurrency=20)
    assert rounds(breaker, 8, capacity=100) == [2, 3, 5, 7, 10, 14, 19, 20]


def test_a_limit_that_is_hardly_used_stays(lab: Lab) -> None:
    breaker = lab.breaker(concurrency="adaptive", min_concurrency=4)
    for _ in range(10):
        breaker.ask("alone")
        assert breaker.settle("alone", "S").snapshot.concurrency_limit == 4


@ONE_OF_EACH
@pytest.mark.parametrize("letter", ["F", "L"])
def test_a_failure_or_an_overrun_takes_a_tenth(lab: Lab, letter: str) -> None:
    breaker = lab.breaker(concurrency="adaptive", min_concurrency=2, max_concurrency=21, minimum_calls=1000)
    rounds(breaker, 9, capacity=100)
    limits = []
    for _ in range(30):
        breaker.ask("call")
        limits.append(breaker.settle("call", letter).snapshot.concurrency_limit)
    assert limits[:4] == [18, 16, 14, 12], "from 21"
    assert limits[-1] == 2
    breaker.ask("call")
    assert breaker.settle("call", "I").snapshot.concurrency_limit == 2


@ONE_OF_EACH
def test_it_converges_to_what_the_dependency_can_bear(lab: Lab) -> None:
    breaker = lab.breaker(concurrency="adaptive", minimum_calls=1000)
    limits = rounds(breaker, 60, capacity=10)
    assert set(limits[20:]) <= {8, 9, 10, 11}
