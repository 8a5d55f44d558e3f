"""Small values, and the lease of the tick."""

from __future__ import annotations

import pytest

from tests.contract.lab import SHARED, Lab


@pytest.mark.parametrize("value", [b"", b"text", bytes(range(256)), b"x" * 1_000_000])
def test_a_value_comes_back_with_its_age(lab: Lab, value: bytes) -> None:
    lab.store.put("fallback", "rates", value, ttl=60)
    lab.clock.advance(12.5)
    assert lab.store.get("fallback", "rates") == (value, 12.5)


def test_a_value_ends_after_its_time(lab: Lab) -> None:
    lab.store.put("fallback", "rates", b"1", ttl=60)
    lab.clock.advance(59.999)
    assert lab.store.get("fallback", "rates") is not None
    lab.clock.advance(0.001)
    assert lab.store.get("fallback", "rates") is None


def test_writing_again_makes_it_young_again(lab: Lab) -> None:
    lab.store.put("fallback", "rates", b"1", ttl=60)
    lab.clock.advance(50)
    lab.store.put("fallback", "rates", b"2", ttl=60)
    lab.clock.advance(50)
    assert lab.store.get("fallback", "rates") == (b"2", 50.0)


KEYS = ["k", "K", "k" * 500, "k" * 501, "a b", "a\nb", "ü", "\udcff", "", "sha256-0", "{k}"]


def test_kinds_and_keys_are_separate(lab: Lab) -> None:
    assert lab.store.get("fallback", "k") is None
    for number, key in enumerate(KEYS):
        lab.store.put("fallback", key, b"%d" % number, ttl=60)
        lab.store.put("another kind", key, b"other", ttl=60)
    assert [lab.store.get("fallback", key) for key in KEYS] == [(b"%d" % number, 0.0) for number in range(len(KEYS))]


@SHARED
def test_one_holds_the_tick_at_a_time(lab: Lab) -> None:
    with lab.ledger.tick_lease("a", ttl=10) as first, lab.ledger.tick_lease("b", ttl=10) as second:
        assert (first, second) == (True, False)
        with lab.ledger.tick_lease("a", ttl=10) as same_holder_again:
            assert not same_holder_again
    with lab.ledger.tick_lease("b", ttl=10) as after:
        assert after


@SHARED
def test_a_tick_that_died_holds_its_lease_no_longer_than_agreed(lab: Lab) -> None:
    with lab.ledger.tick_lease("dead", ttl=10):
        lab.clock.advance(9.999)
        with lab.ledger.tick_lease("b", ttl=10) as early:
            assert not early
        lab.clock.advance(0.001)
        with lab.ledger.tick_lease("b", ttl=10) as in_time:
            assert in_time


@SHARED
def test_who_overran_its_lease_does_not_release_the_next_one(lab: Lab) -> None:
    slow = lab.ledger.tick_lease("slow", ttl=10)
    assert slow.__enter__()
    lab.clock.advance(10)
    with lab.ledger.tick_lease("next", ttl=10) as following:
        assert following
        slow.__exit__(None, None, None)
        with lab.ledger.tick_lease("third", ttl=10) as third:
            assert not third


@SHARED
def test_an_error_in_the_tick_gives_the_lease_back(lab: Lab) -> None:
    with pytest.raises(RuntimeError, match="in the tick"), lab.ledger.tick_lease("a", ttl=10):
        raise RuntimeError("in the tick")
    with lab.ledger.tick_lease("b", ttl=10) as held:
        assert held


@SHARED
def test_the_age_of_the_last_completed_tick(lab: Lab) -> None:
    assert lab.ledger.last_tick_age() is None
    lab.ledger.tick_completed()
    lab.clock.advance(2.75)
    assert lab.ledger.last_tick_age() == 2.75
    with lab.ledger.tick_lease("a", ttl=10):
        lab.clock.advance(1)
    assert lab.ledger.last_tick_age() == 3.75
    lab.ledger.tick_completed()
    assert lab.ledger.last_tick_age() == 0.0


@SHARED
def test_beat_is_seen_alive_whether_ticks_complete_or_not(lab: Lab) -> None:
    assert lab.ledger.tick_sender_age() is None
    lab.ledger.tick_sender_seen()
    lab.clock.advance(2)
    lab.ledger.tick_completed("one")
    assert (lab.ledger.tick_sender_age(), lab.ledger.tick_sender_age("one")) == (2.0, None)
    assert lab.ledger.last_tick_age() is None


@SHARED
def test_each_scope_has_a_tick_of_its_own(lab: Lab) -> None:
    with lab.ledger.tick_lease("a", ttl=10, scope="one") as one, lab.ledger.tick_lease("b", ttl=10, scope="two") as two:
        assert (one, two) == (True, True)
    lab.ledger.tick_completed("one")
    assert (lab.ledger.last_tick_age("one"), lab.ledger.last_tick_age("two")) == (0.0, None)


@SHARED
def test_a_breaker_that_no_app_declares_any_more_is_abandoned(lab: Lab) -> None:
    lab.ledger.declare(["kept", "renamed"])
    lab.clock.advance(30)
    lab.ledger.declare(["kept"])
    lab.clock.advance(30)
    assert lab.ledger.abandoned(unseen_for=60) == ["renamed"]
    assert lab.ledger.abandoned(unseen_for=60.001) == []
    lab.ledger.retire(["renamed", "unheard of"])
    lab.clock.advance(1000)
    assert lab.ledger.abandoned(unseen_for=60) == ["kept"]


@pytest.mark.parametrize("lab", ["server", "cluster"], indirect=True)
def test_a_server_reports_how_much_memory_it_uses(lab: Lab) -> None:
    memory = lab.ledger.memory()
    assert memory is not None
    assert memory.used > 100_000
    assert memory.maximum == 0
