"""The index of deferred tasks, how fast they are resumed, and who was revoked meanwhile."""

from __future__ import annotations

from resilient_tasks.core.pace import Pace
from resilient_tasks.store.ledger import Wait
from tests.contract.lab import ONE_SHARED, SHARED, Lab


@SHARED
def test_deferred_tasks_are_counted_with_the_oldest_and_the_next_deadline(lab: Lab) -> None:
    breaker, first = lab.breaker(), lab.clock()
    assert (breaker.snapshot().deferred, breaker.snapshot().oldest_deferred_at) == (0, None)
    lab.ledger.add_deferred(breaker.name, "a", deadline=first + 60)
    lab.clock.advance(1)
    lab.ledger.add_deferred(breaker.name, "b", deadline=first + 30)
    lab.ledger.add_deferred(breaker.name, "c")
    snapshot = breaker.snapshot()
    assert (snapshot.deferred, snapshot.oldest_deferred_at, snapshot.next_deadline_at) == (3, first, first + 30)

    lab.ledger.remove_deferred(breaker.name, ["a", "b", "unknown"])
    snapshot = breaker.snapshot()
    assert (snapshot.deferred, snapshot.oldest_deferred_at, snapshot.next_deadline_at) == (1, first + 1, None)


@SHARED
def test_a_task_deferred_twice_is_counted_once_since_the_first_time(lab: Lab) -> None:
    breaker, first = lab.breaker(), lab.clock()
    lab.ledger.add_deferred(breaker.name, "a", deadline=first + 60)
    lab.clock.advance(1)
    lab.ledger.add_deferred(breaker.name, "a", deadline=first + 90)
    snapshot = breaker.snapshot()
    assert (snapshot.deferred, snapshot.oldest_deferred_at, snapshot.next_deadline_at) == (1, first, first + 90)
    lab.ledger.add_deferred(breaker.name, "a")
    assert breaker.snapshot().next_deadline_at is None


@SHARED
def test_a_task_resumed_and_deferred_again_has_waited_since_the_first_time(lab: Lab) -> None:
    breaker, first = lab.breaker(), lab.clock()
    lab.ledger.add_deferred(breaker.name, "a")
    lab.ledger.remove_deferred(breaker.name, ["a"])
    lab.clock.advance(5)
    lab.ledger.add_deferred(breaker.name, "b")
    lab.ledger.add_deferred(breaker.name, "a", since=first)
    assert breaker.snapshot().oldest_deferred_at == first


@SHARED
def test_a_task_that_is_hastened_is_due_now(lab: Lab) -> None:
    breaker, now = lab.breaker(), lab.clock()
    lab.ledger.add_deferred(breaker.name, "a", deadline=now + 60)
    lab.ledger.add_deferred(breaker.name, "b")
    lab.ledger.hasten([breaker.name, "mail"], ["unknown"])
    assert breaker.snapshot().next_deadline_at == now + 60
    lab.clock.advance(1)
    lab.ledger.hasten([breaker.name, "mail"], ["b", "unknown"])
    assert (breaker.snapshot().deferred, breaker.snapshot().next_deadline_at) == (2, now + 1)
    lab.clock.advance(1)
    lab.ledger.hasten([breaker.name, "mail"], ["b"])
    assert breaker.snapshot().next_deadline_at == now + 1
    lab.ledger.hasten([breaker.name, "mail"], [])


@SHARED
def test_the_index_can_be_cleared(lab: Lab) -> None:
    breaker, other = lab.breaker(), lab.breaker("mail")
    for name in (breaker.name, other.name):
        lab.ledger.add_deferred(name, "a", deadline=lab.clock() + 60)
    lab.ledger.clear_deferred(breaker.name)
    snapshot = breaker.snapshot()
    assert (snapshot.deferred, snapshot.oldest_deferred_at, snapshot.next_deadline_at) == (0, None, None)
    assert other.snapshot().deferred == 1


@ONE_SHARED
def test_thousands_of_deferred_tasks(lab: Lab) -> None:
    breaker, first = lab.breaker(), lab.clock()
    ids = [f"task {number}" for number in range(2500)]
    for number, task_id in enumerate(ids):
        lab.ledger.add_deferred(breaker.name, task_id, deadline=first + 100 - number % 100)
    assert (breaker.snapshot().deferred, breaker.snapshot().next_deadline_at) == (2500, first + 1)
    lab.ledger.remove_deferred(breaker.name, (task_id for task_id in ids if task_id != "task 7"))
    assert (breaker.snapshot().deferred, breaker.snapshot().next_deadline_at) == (1, first + 93)
    lab.ledger.remove_deferred(breaker.name, [])
    assert breaker.snapshot().deferred == 1


@SHARED
def test_deferring_touches_neither_state_nor_version(lab: Lab) -> None:
    breaker = lab.breaker().open()
    before = breaker.snapshot()
    lab.ledger.add_deferred(breaker.name, "a")
    after = breaker.snapshot()
    assert (after.epoch, after.version, after.open_until) == (before.epoch, before.version, before.open_until)


@SHARED
def test_the_latest_claim_counts_until_its_task_withdraws_it(lab: Lab) -> None:
    ledger = lab.ledger
    assert ledger.claims([]) == ledger.claims(["same"]) == {}
    for task_id in ("first", "second"):
        ledger.claim("same", task_id)
    ledger.claim("other", "third")
    assert ledger.claims(["same", "other", "none"]) == {"same": "second", "other": "third"}
    ledger.withdraw("same", "first")
    ledger.withdraw("other", "third", keep_for=60.0)
    assert ledger.claims(["same", "other"]) == {"same": "second", "other": "third"}
    ledger.withdraw("same", "second")
    assert ledger.claims(["same"]) == {}


@SHARED
def test_the_pace_is_kept_and_outstanding_is_moved_on_its_own(lab: Lab) -> None:
    breaker = lab.breaker()
    assert lab.ledger.pace(breaker.name) == Pace()
    lab.ledger.resumed(breaker.name, 5)
    lab.ledger.save_pace(breaker.name, Pace(6, 7, outstanding=99, decided_at=1234.567, too_large=8, released_at=1234.6))
    lab.ledger.taken_up(breaker.name, 2)
    assert lab.ledger.pace(breaker.name) == Pace(
        6, 7, outstanding=3, decided_at=1234.567, too_large=8, released_at=1234.6
    )


@SHARED
def test_outstanding_never_falls_below_nothing(lab: Lab) -> None:
    breaker = lab.breaker()
    lab.ledger.resumed(breaker.name, 2)
    lab.ledger.taken_up(breaker.name, 5)
    lab.ledger.resumed(breaker.name, 1)
    assert lab.ledger.pace(breaker.name).outstanding == 1


@SHARED
def test_revoked_ids_are_remembered(lab: Lab) -> None:
    assert lab.ledger.revoked(["a"]) == {}
    assert lab.ledger.revoked([]) == {}
    lab.ledger.revoke(["a", "b"])
    lab.ledger.revoke([])
    assert lab.ledger.revoked(["c", "b", "a"]) == {"a": lab.clock(), "b": lab.clock()}


@SHARED
def test_what_is_revoked_again_was_revoked_then(lab: Lab) -> None:
    lab.ledger.revoke(["a"])
    lab.clock.advance(5)
    lab.ledger.revoke(["a"])
    assert lab.ledger.revoked(["a"]) == {"a": lab.clock()}


@SHARED
def test_revoked_ids_are_forgotten_after_a_week(lab: Lab) -> None:
    lab.ledger.revoke(["old"])
    lab.clock.advance(6 * 24 * 3600)
    lab.ledger.revoke(["new"])
    assert set(lab.ledger.revoked(["old", "new"])) == {"old", "new"}
    lab.clock.advance(24 * 3600)
    lab.ledger.revoke(["newest"])
    assert set(lab.ledger.revoked(["old", "new", "newest"])) == {"new", "newest"}


@ONE_SHARED
def test_only_so_many_revoked_ids_are_remembered(lab: Lab) -> None:
    lab.ledger.revoke(["first"])
    lab.clock.advance(1)
    lab.ledger.revoke(f"task {number}" for number in range(50_000))
    assert set(lab.ledger.revoked(["first", "task 0", "task 49999"])) == {"task 0", "task 49999"}


@SHARED
def test_many_are_indexed_at_once(lab: Lab) -> None:
    breaker, now = lab.breaker(), lab.clock()
    lab.ledger.add_all_deferred(breaker.name, {"a": Wait(), "b": Wait(now + 60, now - 5), "c": Wait(now + 30)})
    snapshot = breaker.snapshot()
    assert (snapshot.deferred, snapshot.oldest_deferred_at, snapshot.next_deadline_at) == (3, now - 5, now + 30)
