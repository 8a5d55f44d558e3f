"""What a shared store remembers of its breakers: the log, what was counted, and the bounds of both."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from resilient_tasks import Resilience
from resilient_tasks.core.counts import (
    CAUSE,
    DEFERRED,
    DEFERRED_AGAIN,
    FALLBACK,
    LONGEST_WAIT,
    REFUSED,
    RESUMED,
    TRIALS,
    Counts,
)
from resilient_tasks.core.model import Outcome, State, Verb
from resilient_tasks.core.outage import Deadlines, Outage
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.ledger import Wait
from resilient_tasks.store.tallies import Tally
from tests.contract.lab import SHARED, Lab, Subject

SUCCESS, FAILURE, SLOW = Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW
DAY = 24 * 3600.0
_MISSING = -2  # what Redis says of a key that there is not


def tally(lab: Lab, counts: dict[str, int], *, name: str = "payments", teller: str = "worker", number: int = 1) -> None:
    lab.history.tally(teller, number, {name: Tally(Counter(counts))})


def totals(lab: Lab, breaker: Subject) -> Counts:
    return lab.history.totals([breaker.name])[breaker.name]


@SHARED
def test_the_log_has_every_transition_the_newest_first(lab: Lab) -> None:
    breaker = lab.breaker().half_open()
    breaker.trials("SSS")
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    logged = lab.history.transitions(breaker.name)
    assert logged == breaker.transitions[::-1]
    assert [entry.state for entry in logged] == [State.FORCED_OPEN, State.CLOSED, State.HALF_OPEN, State.OPEN]
    assert (logged[0].reason, logged[0].actor) == ("maintenance", "ada")
    assert (logged[-1].calls, logged[-1].failures) == (5, 5)


@SHARED
def test_the_log_is_asked_for_a_part_of_it(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.TRIP)
    tripped_at = lab.clock()
    lab.clock.advance(1)
    breaker.command(Verb.RESET)
    assert [entry.state for entry in lab.history.transitions(breaker.name, limit=1)] == [State.CLOSED]
    assert [entry.state for entry in lab.history.transitions(breaker.name, since=tripped_at)] == [State.CLOSED]
    assert lab.history.transitions("stranger") == []


@SHARED
@pytest.mark.parametrize(("name", "logged", "kept"), [("payments", 200, 101), ("payments:acme", 50, 21)])
def test_log_and_outages_are_bounded(lab: Lab, name: str, logged: int, kept: int) -> None:
    breaker = lab.breaker(name)
    for _ in range(120):
        breaker.command(Verb.TRIP)
        breaker.command(Verb.RESET)
    assert len(lab.history.transitions(breaker.name, limit=1000)) == logged
    assert len(outages(lab, breaker.name)) == kept


@SHARED
def test_the_log_knows_what_was_done_by_hand(lab: Lab) -> None:
    breaker = lab.breaker().open()
    lab.history.note(breaker.name, "2 tasks dropped", "ada")
    lab.history.note("mail", "1 task resumed", "ada")
    noted, opened = lab.history.transitions(breaker.name)
    assert (noted.previous, noted.state, noted.epoch) == (State.OPEN, State.OPEN, opened.epoch)
    assert (noted.reason, noted.actor, noted.at) == ("2 tasks dropped", "ada", lab.clock())
    assert lab.history.transitions("mail")[0].state is State.CLOSED


@SHARED
def test_calls_are_counted_by_outcome_and_cause(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=100)
    breaker.batch(("S", 12), ("F", 3), ("L", 1), ("I", 5), causes=(("ReadTimeout", 2), ("OSError", 1)))
    assert totals(lab, breaker) == Counts(calls={SUCCESS: 12, FAILURE: 3, SLOW: 1})
    [minute] = lab.history.minutes(breaker.name)
    assert minute.at == lab.clock() // 60 * 60
    assert minute.counts.causes == {"ReadTimeout": 2, "OSError": 1}


@SHARED
def test_calls_that_end_after_the_breaker_has_opened_are_counted_too(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.batch(("S", 1)).snapshot.epoch
    breaker.batch(("F", 7))
    breaker.calls("FS", epoch=epoch)
    assert totals(lab, breaker).calls == {SUCCESS: 2, FAILURE: 8}


@SHARED
def test_nothing_is_counted_in_disabled(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.DISABLE)
    breaker.batch(("S", 12))
    assert totals(lab, breaker) == Counts(entered={State.DISABLED: 1})


@SHARED
def test_a_trial_is_counted_once_as_a_call_and_as_a_trial(lab: Lab) -> None:
    breaker = lab.breaker().half_open()
    epoch = breaker.snapshot().epoch
    for holder, letter in (("a", "F"), ("b", "I"), ("c", "S")):
        breaker.ask(holder)
        breaker.settle(holder, letter, epoch=epoch, cause="ReadTimeout")
        breaker.settle(holder, letter, epoch=epoch, cause="ReadTimeout")
    breaker.settle("stranger", "S", epoch=epoch)
    counts = totals(lab, breaker)
    assert counts.trials == 1  # after the failure the others have no permit any more
    assert counts.calls == {FAILURE: 6}
    assert counts.entered == {State.OPEN: 2, State.HALF_OPEN: 1}


@SHARED
def test_a_call_with_a_slot_is_counted_once_and_is_no_trial(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=4)
    for letter in "SFLI":
        breaker.ask(letter)
        breaker.settle(letter, letter, cause="ReadTimeout")
        breaker.settle(letter, letter, cause="ReadTimeout")
    assert totals(lab, breaker) == Counts(calls={SUCCESS: 1, FAILURE: 1, SLOW: 1})
    assert lab.history.minutes(breaker.name)[-1].counts.causes == {"ReadTimeout": 1}
    breaker.ask("A")
    breaker.command(Verb.DISABLE)
    breaker.settle("A", "S")
    assert totals(lab, breaker).calls == {SUCCESS: 1, FAILURE: 1, SLOW: 1}


@SHARED
def test_a_permit_that_expires_is_a_failed_trial(lab: Lab) -> None:
    breaker = lab.breaker().half_open()
    breaker.ask(lease=2)
    lab.clock.advance(2)
    breaker.advance()
    assert totals(lab, breaker).trials == 1
    assert lab.history.minutes(breaker.name)[-1].counts.causes == {"permit expired": 1}


@SHARED
def test_minutes_are_kept_for_two_hours(lab: Lab) -> None:
    breaker = lab.breaker(minimum_calls=1000)
    for _ in range(150):
        breaker.batch(("S", 1))
        lab.clock.advance(60)
    minutes = lab.history.minutes(breaker.name)
    assert len(minutes) == 120
    assert [minute.counts.calls for minute in minutes] == [{SUCCESS: 1}] * 120
    assert all(later.at - earlier.at == 60 for earlier, later in itertools.pairwise(minutes))
    assert len(lab.history.minutes(breaker.name, since=minutes[-3].at)) == 3
    lab.clock.advance(90 * 60)
    breaker.batch(("S", 1))
    assert len(lab.history.minutes(breaker.name)) == 30  # one of the minutes before was in the same place
    assert totals(lab, breaker).calls == {SUCCESS: 151}


@SHARED
def test_minutes_of_a_child_are_kept_for_an_hour(lab: Lab) -> None:
    acme = lab.breaker("payments:acme", minimum_calls=1000)
    for _ in range(70):
        acme.batch(("S", 1))
        lab.clock.advance(60)
    assert len(lab.history.minutes(acme.name)) == 60


@SHARED
def test_what_processes_have_counted_is_added(lab: Lab) -> None:
    breaker = lab.breaker()
    tally(lab, {REFUSED: 3, DEFERRED: 2, FALLBACK + "cached": 1}, teller="a")
    tally(lab, {REFUSED: 4, CAUSE + "ReadTimeout": 1, FAILURE: 1}, teller="b")
    counts = totals(lab, breaker)
    assert (counts.refused, counts.deferred, counts.fallbacks, counts.calls) == (7, 2, {"cached": 1}, {FAILURE: 1})
    [minute] = lab.history.minutes(breaker.name)
    assert minute.counts.refused == 7
    assert minute.counts.causes == {"ReadTimeout": 1}


@SHARED
def test_a_batch_that_is_told_twice_counts_once(lab: Lab) -> None:
    breaker = lab.breaker()
    for number in (1, 1, 2, 1, 2):
        tally(lab, {REFUSED: 1}, number=number)
    assert totals(lab, breaker).refused == 2


@SHARED
def test_names_in_minutes_are_bounded(lab: Lab) -> None:
    breaker = lab.breaker()
    for number in range(1, 101):
        tally(lab, {f"{CAUSE}Error{number}": 1, TRIALS: 1}, number=number)
    [minute] = lab.history.minutes(breaker.name)
    assert len(minute.counts.causes) <= 41
    assert minute.counts.causes["other"] == 100 - (len(minute.counts.causes) - 1)
    assert minute.counts.trials == 100


@SHARED
def test_many_breakers_are_read_at_once(lab: Lab) -> None:
    tally(lab, {REFUSED: 1}, name="mail")
    found = lab.history.totals(["payments", "mail"])
    assert found == {"payments": Counts(), "mail": Counts(refused=1)}
    assert lab.history.totals([]) == {}


@SHARED
@pytest.mark.parametrize(("name", "kept"), [("payments", 90 * DAY), ("payments:acme", DAY)])
def test_nothing_of_the_past_is_kept_for_ever(lab: Lab, name: str, kept: float) -> None:
    breaker = lab.breaker(name)
    for _ in range(2):
        breaker.open().command(Verb.RESET)
        lab.clock.advance(60)
    keys = keys_of_the_past(lab, breaker)
    assert set(keys) == {"log", "minutes", "totals", "outage", "outages"}
    assert all(0 < seconds <= kept for seconds in keys.values())


def keys_of_the_past(lab: Lab, breaker: Subject) -> dict[str, float]:
    """Seconds until each key ends that there is; -1 if it does not."""
    store: Any = lab.store
    keys = store._keys.breaker(breaker.name)._asdict()
    past = {part: keys[part] for part in ("log", "minutes", "totals", "outage", "outages")}
    ends = {part: store._server.run(lambda client, key=key: client.ttl(key)) for part, key in past.items()}
    return {part: seconds for part, seconds in ends.items() if seconds != _MISSING}


# --- outages ----------------------------------------------------------------------------------------


def outages(lab: Lab, *names: str, since: float = 0.0) -> list[Outage]:
    return lab.history.outages(names or ["payments"], since=since)


@SHARED
def test_an_outage_is_remembered_from_the_first_refusal_to_the_last_waiting_task(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1)
    breaker.batch(("S", 2), causes=())
    breaker.batch(("F", 3), causes=(("ReadTimeout", 3),))
    opened = lab.clock()
    lab.ledger.add_deferred(breaker.name, "a")
    tally(lab, {DEFERRED: 1, REFUSED: 4})
    lab.clock.advance(5)
    breaker.advance()
    breaker.ask("first")
    breaker.settle("first", "F", cause="OSError")
    lab.clock.advance(10)
    breaker.advance()
    breaker.trials("S")
    closed = lab.clock()
    [lasting] = outages(lab)
    assert lab.history.lasting(["payments", "stranger"]) == {"payments": lasting}
    assert (lasting.opened, lasting.closed, lasting.drained) == (opened, closed, None)

    lab.clock.advance(30)
    lab.history.tally("worker", 2, {breaker.name: Tally(Counter({RESUMED: 1}), {LONGEST_WAIT: 45_000})})
    lab.ledger.remove_deferred(breaker.name, ["a"])
    [outage] = outages(lab)
    assert outage.drained == closed + 30
    assert lab.history.lasting(["payments"]) == {}
    assert (outage.openings, outage.actor) == (2, "")
    assert "failure rate" in outage.reason
    assert outage.causes == [("ReadTimeout", 3), ("OSError", 1)]
    assert outage.failed_calls == 4
    assert (outage.counts.trials, outage.counts.refused, outage.counts.deferred, outage.counts.resumed) == (2, 4, 1, 1)
    assert outage.longest_wait == 45


@SHARED
@pytest.mark.parametrize("waiting", [False, True])
def test_the_outage_of_a_child_whose_state_has_ended_by_itself_ends_when_somebody_looks(
    lab: Lab, *, waiting: bool
) -> None:
    acme = lab.breaker("payments:acme").open()
    if waiting:
        lab.ledger.add_deferred(acme.name, "a")
    store: Any = lab.store
    store._server.run(lambda client: client.delete(store._keys.breaker(acme.name).state))
    assert outages(lab, acme.name)[0].closed is None
    if waiting:
        acme.advance()
        assert outages(lab, acme.name)[0].drained is None
        lab.ledger.remove_deferred(acme.name, ["a"])
    else:
        lab.store.cool(acme.spec)
    [outage] = outages(lab, acme.name)
    assert outage.closed == outage.drained == lab.clock()


@SHARED
def test_what_has_been_forgotten_of_an_outage_is_no_half_of_one(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.open()
    store: Any = lab.store
    store._server.run(lambda client: client.delete(store._keys.breaker(breaker.name).outage))
    lab.clock.advance(5)
    breaker.advance()
    breaker.trials("F")
    breaker.command(Verb.RESET)
    assert outages(lab) == []


@SHARED
def test_an_outage_that_nobody_waits_for_is_over_when_the_breaker_closes(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    lab.clock.advance(60)
    breaker.command(Verb.RESET)
    [outage] = outages(lab)
    assert outage.closed == outage.drained == lab.clock()
    assert (outage.reason, outage.actor, outage.failed_calls) == ("maintenance", "ada", 0)


@SHARED
def test_the_causes_of_an_outage_are_not_those_of_the_one_before(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1)
    breaker.batch(("F", 6), causes=(("ReadTimeout", 6),))
    lab.clock.advance(5)
    breaker.advance()
    breaker.trials("S")
    lab.clock.advance(1)
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    breaker.command(Verb.RESET)
    lab.clock.advance(1)
    breaker.batch(("F", 9), causes=(("OSError", 3), ("ReadTimeout", 6)))
    tripped, maintenance, first = outages(lab)
    assert (first.failed_calls, first.causes) == (6, [("ReadTimeout", 6)])
    assert (maintenance.failed_calls, maintenance.causes) == (0, [])
    assert tripped.failed_calls == sum(count for _, count in tripped.causes) == 9


@SHARED
def test_the_speed_of_resuming_is_that_of_the_last_seconds(lab: Lab) -> None:
    breaker = lab.breaker()
    batches = itertools.count(1)

    def resume(each_second: int, *, seconds: int) -> None:
        for _ in range(seconds):
            lab.clock.advance(1)
            tally(lab, {RESUMED: each_second + 2, DEFERRED_AGAIN: 2}, number=next(batches))

    def speed() -> float:
        found = lab.history.speeds([breaker.name])[breaker.name]
        assert found is not None
        return found.at_present(lab.clock())

    assert lab.history.speeds([breaker.name]) == {breaker.name: None}
    resume(10, seconds=3)
    assert speed() == pytest.approx(10, rel=0.1)
    resume(100, seconds=30)
    assert speed() == pytest.approx(100, rel=0.1)
    lab.clock.advance(10)
    assert speed() == pytest.approx(37, rel=0.1)
    breaker.command(Verb.TRIP)
    breaker.command(Verb.RESET)
    assert lab.history.speeds([breaker.name]) == {breaker.name: None}
    resume(10, seconds=3)
    assert speed() == pytest.approx(10, rel=0.1)


@SHARED
def test_what_is_told_a_little_late_belongs_to_the_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.TRIP)
    breaker.command(Verb.RESET)
    lab.clock.advance(4)
    tally(lab, {REFUSED: 2})
    lab.clock.advance(4)
    tally(lab, {REFUSED: 5}, number=2)
    assert outages(lab)[0].counts.refused == 2
    assert totals(lab, breaker).refused == 7


@SHARED
def test_a_breaker_that_opens_while_tasks_still_wait_goes_on_with_its_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.TRIP, reason="first")
    lab.ledger.add_deferred(breaker.name, "a")
    for _ in range(2):
        breaker.command(Verb.RESET)
        lab.clock.advance(60)
        breaker.command(Verb.TRIP, reason="again")
    [outage] = outages(lab)
    assert (outage.reason, outage.openings, outage.closed) == ("first", 3, None)
    lab.ledger.clear_deferred(breaker.name)
    assert outages(lab)[0].drained is None  # it still refuses
    breaker.command(Verb.RESET)
    assert outages(lab)[0].drained == lab.clock()


@SHARED
def test_calls_that_failed_with_the_one_that_trips_belong_to_the_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.batch(("F", 9), causes=(("ReadTimeout", 9),))
    [outage] = outages(lab)
    assert outage.failed_calls == 9
    assert outage.causes == [("ReadTimeout", 9)]


@SHARED
def test_former_outages_are_kept_up_to_a_bound(lab: Lab) -> None:
    breaker = lab.breaker()
    for number in range(110):
        breaker.command(Verb.TRIP, reason=f"outage {number}")
        breaker.command(Verb.RESET)
        lab.clock.advance(10)
    kept = outages(lab)
    assert all(outage.closed == outage.drained == outage.opened for outage in kept)
    assert [outage.reason for outage in kept] == [f"outage {number}" for number in range(109, 8, -1)]
    assert [outage.reason for outage in outages(lab, since=kept[2].opened)] == ["outage 109", "outage 108"]


@SHARED
def test_outages_of_several_breakers_are_one_list(lab: Lab) -> None:
    for name in ("payments", "mail"):
        lab.breaker(name).command(Verb.TRIP)
        lab.clock.advance(1)
    assert [outage.breaker for outage in outages(lab, "payments", "mail", "stranger")] == ["mail", "payments"]


@SHARED
def test_shadow_makes_no_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.SHADOW)
    breaker.batch(("F", 9))
    assert breaker.snapshot().would_open
    assert outages(lab) == []


@SHARED
def test_deadlines_are_sampled(lab: Lab) -> None:
    now = lab.clock()
    lab.ledger.add_all_deferred("payments", {f"task {number}": Wait(now + number) for number in range(1, 201)})
    lab.ledger.add_deferred("mail", "a")
    found = lab.history.deadlines(["payments", "mail"])
    assert found["mail"] == Deadlines()
    assert found["payments"].count == 200
    assert len(found["payments"].sample) == 64
    assert list(found["payments"].sample) == sorted(found["payments"].sample)
    assert found["payments"].sample[-1] == now + 200


@SHARED
def test_outages_of_children_come_with_their_parents(lab: Lab) -> None:
    resilience = Resilience()
    resilience.use_store(lab.store)
    payments = resilience.breaker("payments")
    payments.child("acme").trip(reason="by hand")
    for name in ("payments", None):
        assert [outage.breaker for outage in resilience.outages(name)] == ["payments:acme"]
    assert resilience.outages("payments:acme", since=60) == resilience.outages()
    assert resilience.estimate("payments:acme") is None
    with pytest.raises(ConfigurationError, match="'mail' is defined nowhere; defined: payments"):
        resilience.outages("mail")
