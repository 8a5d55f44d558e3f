"""What a shared store remembers of its breakers: the log, what was counted, and the bounds of both."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from resilient_tasks import Resilience
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, State, Verb
from resilient_tasks.core.outage import (
    CAUSE,
    DEFERRED,
    DEFERRED_AGAIN,
    FALLBACK,
    LONGEST_WAIT,
    REFUSED,
    RESUMED,
    TRIALS,
    Counts,
    Deadlines,
    Outage,
    Tally,
)
from resilient_tasks.core.pace import Pace
from resilient_tasks.dependency import Fleet
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.ledger import Wait
from tests.contract.lab import ONE_SHARED, OUTCOMES, SHARED, Lab, Subject

SUCCESS, FAILURE, SLOW = Outcome.SUCCESS, Outcome.FAILURE, Outcome.SLOW
DAY = 24 * 3600.0
_PAST = {"log", "counts", "minute", "outage", "outages"}


def tally(lab: Lab, counts: dict[str, int], *, name: str = "payments") -> None:
    lab.history.tally({name: Tally(Counter(counts))}, lab.clock())


def fail(lab: Lab, breaker: Subject, **causes: int) -> None:
    """Report failures as processes do: they are counted first."""
    epoch = breaker.snapshot().epoch
    for cause in Counter(causes).elements():
        tally(lab, {FAILURE: 1, CAUSE + cause: 1}, name=breaker.name)
        breaker.calls("F", epoch=epoch)


@contextmanager
def reporting(lab: Lab, breaker: Subject) -> Iterator[Callable[..., None]]:
    """Report outcomes of calls by way of a process of the fleet; all are counted when the context ends."""
    fleet = Fleet(lab.store, lab.ledger, lab.history)
    cached = fleet.join(breaker.spec)

    def report(letters: str, *, cause: str = "", epoch: int | None = None, holder: str = "") -> None:
        for letter in letters:
            verdict = Verdict(OUTCOMES[letter], cause)
            admitted_in = cached.epoch if epoch is None else epoch
            if holder:
                fleet.reporter.settle(breaker.spec, holder, admitted_in, verdict)
            else:
                fleet.reporter.report(cached, admitted_in, verdict)

    try:
        yield report
    finally:
        assert fleet.reporter.close(60)
        fleet.view.stop(timeout=60)


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
    assert lab.history.transitions("unknown") == []


@ONE_SHARED
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
    with reporting(lab, breaker) as report:
        report("S" * 12 + "LIIIOO")
        report("FF", cause="ReadTimeout")
        report("F", cause="OSError")
    assert totals(lab, breaker) == Counts(calls={SUCCESS: 12, FAILURE: 3, SLOW: 1})
    [minute] = lab.history.minutes(breaker.name)
    assert minute.at == lab.clock() // 60 * 60
    assert minute.counts.causes == {"ReadTimeout": 2, "OSError": 1}


@SHARED
def test_calls_that_end_after_the_breaker_has_opened_are_counted_too(lab: Lab) -> None:
    breaker = lab.breaker()
    epoch = breaker.batch(("S", 1)).snapshot.epoch
    with reporting(lab, breaker) as report:
        report("SFFFFFFF", epoch=epoch)
    assert breaker.state is State.OPEN
    with reporting(lab, breaker) as report:
        report("FS", epoch=epoch)
    assert totals(lab, breaker).calls == {SUCCESS: 2, FAILURE: 8}


@SHARED
def test_nothing_is_counted_in_disabled(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=4)
    breaker.ask("A")
    breaker.command(Verb.DISABLE)
    with reporting(lab, breaker) as report:
        report("S" * 12)
        report("S", holder="A")
    assert totals(lab, breaker) == Counts(entered={State.DISABLED: 1})


@SHARED
def test_a_trial_is_counted_as_a_call_and_as_a_trial(lab: Lab) -> None:
    breaker = lab.breaker().half_open()
    fleet = Fleet(lab.store, lab.ledger, lab.history)
    assert fleet.acquire(fleet.join(breaker.spec).spec, "a").trial
    fleet.reporter.settle(breaker.spec, "a", breaker.snapshot().epoch, Verdict(FAILURE, "ReadTimeout"), wait=60)
    fleet.close()
    fleet.view.stop(timeout=60)  # its thread must not act on what the next test keeps under these names
    counts = totals(lab, breaker)
    assert (counts.trials, counts.calls) == (1, {FAILURE: 1})
    assert counts.entered == {State.OPEN: 2, State.HALF_OPEN: 1}


@SHARED
def test_a_call_with_a_slot_is_counted_once_and_is_no_trial(lab: Lab) -> None:
    breaker = lab.breaker(max_concurrency=4)
    with reporting(lab, breaker) as report:
        for letter in "SFLI":
            breaker.ask(letter)
            report(letter, holder=letter, cause="ReadTimeout")
    assert totals(lab, breaker) == Counts(calls={SUCCESS: 1, FAILURE: 1, SLOW: 1})
    assert lab.history.minutes(breaker.name)[-1].counts.causes == {"ReadTimeout": 1}


@ONE_SHARED
@pytest.mark.parametrize(("name", "kept"), [("payments", 120), ("payments:acme", 60)])
def test_minutes_are_kept_for_two_hours_of_a_child_for_one(lab: Lab, name: str, kept: int) -> None:
    for _ in range(150):
        tally(lab, {SUCCESS: 1}, name=name)
        lab.clock.advance(60)
    lab.clock.advance(-60)
    minutes = lab.history.minutes(name)
    assert len(minutes) == kept
    assert [minute.counts.calls for minute in minutes] == [{SUCCESS: 1}] * kept
    assert all(later.at - earlier.at == 60 for earlier, later in itertools.pairwise(minutes))
    assert len(lab.history.minutes(name, since=minutes[-3].at)) == 3
    lab.clock.advance((kept - 30) * 60)
    assert len(lab.history.minutes(name)) == 30
    assert lab.history.totals([name])[name].calls == {SUCCESS: 150}


@SHARED
def test_what_processes_have_counted_is_added(lab: Lab) -> None:
    breaker = lab.breaker()
    tally(lab, {REFUSED: 3, DEFERRED: 2, FALLBACK + "cached": 1})
    tally(lab, {REFUSED: 4, CAUSE + "ReadTimeout": 1, FAILURE: 1})
    counts = totals(lab, breaker)
    assert (counts.refused, counts.deferred, counts.fallbacks, counts.calls) == (7, 2, {"cached": 1}, {FAILURE: 1})
    [minute] = lab.history.minutes(breaker.name)
    assert minute.counts.refused == 7
    assert minute.counts.causes == {"ReadTimeout": 1}


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
        fail(lab, breaker, OSError=9)
        breaker.command(Verb.RESET)
        lab.clock.advance(60)
    ends = keys_of_the_past(lab, name)
    assert {key.split(":")[3] for key in ends} == _PAST
    assert all(0 < seconds <= kept for seconds in ends.values())


def keys_of_the_past(lab: Lab, name: str) -> dict[str, float]:
    """Seconds until each key ends that there is of a breaker's past; -1 if it does not."""
    store: Any = lab.store
    root, _, key = name.partition(":")
    pattern = store._keys.log(root).removesuffix("log") + "*"
    found = store._server.run(lambda client: [each.decode() for each in client.scan_iter(pattern, count=1000)])
    known = [each for each in found if each.endswith(f":{key}" if key else "") and each.split(":")[3] in _PAST]
    return {each: store._server.run(lambda client, each=each: client.ttl(each)) for each in known}


# --- outages ----------------------------------------------------------------------------------------


def outages(lab: Lab, *names: str, since: float = 0.0) -> list[Outage]:
    return lab.history.outages(names or ["payments"], since=since)


@SHARED
def test_an_outage_is_remembered_from_the_first_refusal_to_the_last_waiting_task(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1)
    breaker.batch(("S", 2))
    fail(lab, breaker, ReadTimeout=5)
    opened = lab.clock()
    lab.ledger.add_deferred(breaker.name, "a")
    tally(lab, {DEFERRED: 1, REFUSED: 4})
    lab.clock.advance(5)
    breaker.advance()
    breaker.ask("first")
    breaker.settle("first", "F", cause="OSError")
    tally(lab, {FAILURE: 1, CAUSE + "OSError": 1, TRIALS: 2})
    lab.clock.advance(10)
    breaker.advance()
    breaker.trials("S")
    closed = lab.clock()
    [lasting] = outages(lab)
    assert lab.history.lasting(["payments", "unknown"]) == {"payments": lasting}
    assert (lasting.opened, lasting.closed, lasting.drained) == (opened, closed, None)

    lab.clock.advance(30)
    for wait in (45_000, 30_000):
        lab.history.tally({breaker.name: Tally(Counter({RESUMED: 1}), {LONGEST_WAIT: wait})}, lab.clock())
    lab.ledger.remove_deferred(breaker.name, ["a"])
    [outage] = outages(lab)
    assert outage.drained == closed + 30
    assert lab.history.lasting(["payments"]) == {}
    assert (outage.openings, outage.actor) == (2, "")
    assert "evidence" in outage.reason
    assert outage.causes == [("ReadTimeout", 5), ("OSError", 1)]
    assert outage.failed_calls == 6
    assert (outage.counts.trials, outage.counts.refused, outage.counts.deferred, outage.counts.resumed) == (2, 4, 1, 2)
    assert outage.longest_wait == 45


@SHARED
@pytest.mark.parametrize("waiting", [False, True])
def test_the_outage_of_a_child_whose_state_has_ended_by_itself_ends_when_it_is_read(lab: Lab, *, waiting: bool) -> None:
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
    lab.store.mark_idle(acme.spec)
    [outage] = outages(lab, acme.name)
    assert outage.closed == outage.drained == lab.clock()


@SHARED
def test_what_has_been_forgotten_of_an_outage_is_no_half_of_one(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.open()
    store: Any = lab.store
    epoch = str(breaker.snapshot().epoch)
    store._server.run(lambda client: client.delete(store._keys.outage(breaker.name, epoch)))
    lab.clock.advance(5)
    breaker.advance()
    breaker.trials("F")
    breaker.command(Verb.RESET)
    assert outages(lab) == []


@SHARED
def test_an_outage_that_no_task_waits_for_is_over_when_the_breaker_closes(lab: Lab) -> None:
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
    fail(lab, breaker, ReadTimeout=6)
    lab.clock.advance(5)
    breaker.advance()
    breaker.trials("S")
    lab.clock.advance(6)
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    breaker.command(Verb.RESET)
    lab.clock.advance(6)
    fail(lab, breaker, OSError=3, ReadTimeout=6)
    tripped, maintenance, first = outages(lab)
    assert (first.failed_calls, first.causes) == (6, [("ReadTimeout", 6)])
    assert (maintenance.failed_calls, maintenance.causes) == (0, [])
    assert tripped.failed_calls == sum(count for _, count in tripped.causes) == 9


@ONE_SHARED
def test_the_learned_rate_is_that_of_the_last_minutes_and_before_that_of_the_outage_before(lab: Lab) -> None:
    breaker = lab.breaker()
    lab.ledger.add_deferred(breaker.name, "a")

    def rate() -> float | None:
        return lab.history.estimates([breaker.snapshot()])[breaker.name].rate

    breaker.command(Verb.TRIP)
    breaker.command(Verb.RESET)
    for _ in range(5):
        lab.clock.advance(1)
        tally(lab, {RESUMED: 12, DEFERRED_AGAIN: 2})
    assert rate() is None
    for _ in range(15):
        lab.clock.advance(1)
        tally(lab, {RESUMED: 12, DEFERRED_AGAIN: 2})
    assert rate() == pytest.approx(10, rel=0.1)
    lab.ledger.remove_deferred(breaker.name, ["a"])
    breaker.command(Verb.TRIP)
    lab.ledger.add_deferred(breaker.name, "b")
    assert rate() == pytest.approx(10, rel=0.1)
    lab.clock.advance(300)
    breaker.command(Verb.RESET)
    for _ in range(120):
        lab.clock.advance(1)
        tally(lab, {RESUMED: 100})
    assert rate() == pytest.approx(100, rel=0.1)


@SHARED
def test_tasks_that_waited_already_when_it_opened_belong_to_the_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    for _ in range(2):
        lab.ledger.add_all_deferred(breaker.name, {f"task {number}": Wait() for number in range(3)})
        tally(lab, {DEFERRED: 3, REFUSED: 3})
        fail(lab, breaker, ReadTimeout=5)
        lab.ledger.add_all_deferred(breaker.name, {f"task {number}": Wait() for number in range(3, 5)})
        tally(lab, {DEFERRED: 2})
        breaker.command(Verb.RESET)
        tally(lab, {RESUMED: 5})
        lab.ledger.remove_deferred(breaker.name, [f"task {number}" for number in range(5)])
        lab.clock.advance(60)
    assert [(outage.counts.deferred, outage.counts.resumed) for outage in outages(lab)] == [(5, 5), (5, 5)]


@SHARED
def test_what_cannot_be_read_is_deleted_and_named_in_the_log(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    breaker = lab.breaker().open()
    lab.ledger.save_pace(breaker.name, Pace(6, 7))
    assert len(outages(lab)) == 1
    store: Any = lab.store
    keys = store._keys
    edits = [
        ("HSET", keys.counts(breaker.name), REFUSED, "BANANA"),
        ("LPUSH", keys.log(breaker.name), "BANANA"),
        ("HSET", keys.outage(breaker.name, str(breaker.snapshot().epoch)), "openings", "BANANA"),
        ("HSET", keys.pace(breaker.name), "batch", "BANANA"),
    ]
    store._server.commands(edits)
    assert (lab.history.totals([breaker.name])[breaker.name], outages(lab)) == (Counts(), [])
    assert (lab.history.transitions(breaker.name), lab.ledger.pace(breaker.name)) == ([], Pace())
    for _, key, *_ in edits:
        assert caplog.text.count(f"{key} held a value that cannot be read, and is deleted: ") == 1
    store._server.commands([("SET", keys.counts(breaker.name), "BANANA")])
    for _ in range(2):
        tally(lab, {REFUSED: 1})
    assert totals(lab, breaker).refused == 1


@SHARED
def test_what_is_reported_a_little_late_belongs_to_the_outage(lab: Lab) -> None:
    breaker = lab.breaker()
    breaker.command(Verb.TRIP)
    breaker.command(Verb.RESET)
    lab.clock.advance(4)
    tally(lab, {REFUSED: 2})
    lab.clock.advance(4)
    tally(lab, {REFUSED: 5})
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
    fail(lab, breaker, ReadTimeout=9)
    [outage] = outages(lab)
    assert outage.failed_calls == 9
    assert outage.causes == [("ReadTimeout", 9)]


@ONE_SHARED
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
    assert [outage.breaker for outage in outages(lab, "payments", "mail", "unknown")] == ["mail", "payments"]


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
    resilience.fleet.close()
    resilience.fleet.view.stop(timeout=60)  # its thread must not act on what the next test keeps under these names
