"""Stores whose clock was wrong, whose values were edited by hand, that another database or an older release shares."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import redis

from resilient_tasks.core.model import State, Verb
from resilient_tasks.core.rules import LONGEST_LEASE
from resilient_tasks.store.base import Spec
from resilient_tasks.store.redis import RedisStore
from tests.contract.lab import SHARED, Lab, Subject
from workers.processes import Server

HOUR = 3600.0
ON_SERVERS = pytest.mark.parametrize("lab", ["fakeredis", "server"], indirect=True)


def command(lab: Lab, *parts: Any) -> Any:
    store: Any = lab.store
    return store._server.run(lambda client: client.execute_command(*parts))


def keys_of(lab: Lab, breaker: Subject) -> Any:
    store: Any = lab.store
    return store._keys.breaker(breaker.name)


# --- a clock that was ahead ---------------------------------------------------------------------------


def test_an_open_time_that_began_on_a_clock_ahead_lasts_no_longer(lab: Lab) -> None:
    lab.clock.advance(HOUR)
    breaker = lab.breaker().open()
    assert not breaker.snapshot().is_due
    lab.clock.advance(-HOUR)
    assert breaker.snapshot().is_due, "every process that reads it repairs it"
    assert breaker.advance().snapshot.retry_after == pytest.approx(5.0)
    assert not breaker.snapshot().is_due
    lab.clock.advance(5)
    assert breaker.advance().snapshot.state is State.HALF_OPEN


def test_a_lease_from_a_clock_ahead_ends_after_the_longest_that_there_is(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1, max_concurrency=1).half_open()
    lab.clock.advance(HOUR)
    breaker.ask("dead", lease=5)
    lab.clock.advance(-HOUR)
    assert not breaker.ask("other").admitted
    lab.clock.advance(LONGEST_LEASE / 1000)
    assert breaker.advance().snapshot.reason.endswith("permit expired")


def test_evidence_and_sums_from_a_clock_ahead_are_forgotten(lab: Lab) -> None:
    lab.clock.advance(HOUR)
    breaker = lab.breaker()
    breaker.calls("FFFF")
    lab.clock.advance(-HOUR)
    assert (breaker.snapshot().evidence, breaker.snapshot().calls) == (0.0, 0)
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED


def test_a_health_check_of_a_clock_ahead_prevents_no_other(lab: Lab) -> None:
    breaker = lab.breaker()
    lab.clock.advance(HOUR)
    assert lab.store.begin_health_check(breaker.spec, since=lab.clock() - 5)
    lab.clock.advance(-HOUR)
    assert lab.store.begin_health_check(breaker.spec, since=lab.clock() - 5)
    assert not lab.store.begin_health_check(breaker.spec, since=lab.clock() - 5)


@SHARED
def test_ticks_of_a_clock_ahead_hold_up_no_other(lab: Lab) -> None:
    lab.clock.advance(HOUR)
    lab.ledger.tick_completed()
    with lab.ledger.tick_lease("dead", ttl=5) as held:
        assert held
        lab.clock.advance(-HOUR)
        assert lab.ledger.last_tick_age() is None
        with lab.ledger.tick_lease("other", ttl=5) as taken:
            assert taken


# --- values that cannot be read ---------------------------------------------------------------------------

FIELDS = ("state", "epoch", "version", "since", "rules", "failure", "slow", "bucket_0", "open_until", "row", "ok")


@ON_SERVERS
@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_cannot_be_read_stops_nothing(lab: Lab, caplog: pytest.LogCaptureFixture, field: str) -> None:
    breaker, mail = lab.breaker(), lab.breaker("mail")
    mail.command(Verb.ISOLATE)
    breaker.calls("SF")
    command(lab, "HSET", keys_of(lab, breaker).state, field, "BANANA")
    with caplog.at_level(logging.WARNING):
        assert [each.state for each in lab.store.read([breaker.spec, mail.spec])] == [State.CLOSED, State.FORCED_OPEN]
        assert breaker.calls("F").snapshot.state is State.CLOSED
        assert breaker.ask().admitted
        breaker.command(Verb.TRIP)
        assert breaker.command(Verb.RESET).snapshot.state is State.CLOSED
    assert len(caplog.records) <= 1


@ON_SERVERS
@pytest.mark.parametrize("part", ["state", "failures", "slow", "trials", "slots"])
def test_a_key_of_another_type_stops_nothing(lab: Lab, caplog: pytest.LogCaptureFixture, part: str) -> None:
    breaker = lab.breaker(max_concurrency=5, trial_calls=1, slow_call_duration=1.0)
    breaker.calls("F", voter="0a1b2c3d")
    key = getattr(keys_of(lab, breaker), part)
    command(lab, "DEL", key)
    command(lab, "SET", key, "BANANA")
    with caplog.at_level(logging.WARNING):
        breaker.calls("F", voter="3d2c1b0a")
        assert breaker.ask("a").admitted
        breaker.settle("a", "S")
        assert breaker.half_open().trials("S") is State.CLOSED
    assert f"{key} held a value that cannot be read" in caplog.text


# --- other databases, other releases ---------------------------------------------------------------------


def test_a_store_receives_nothing_of_another_database(server: Server) -> None:
    here, there = (RedisStore(server.url(database), namespace="test") for database in (0, 2))
    changes = here.changes(timeout=0.2)
    assert next(changes) is None
    there.command(Spec("payments"), Verb.ISOLATE)
    assert next(changes) is None
    here.command(Spec("mail"), Verb.ISOLATE)
    received = next(changes)
    assert received is not None
    assert received.name == "mail"
    for store in (here, there):
        store.close()


@SHARED
@pytest.mark.parametrize("state", ["OPEN", "FORCED_OPEN", "DISABLED", "SHADOW"])
def test_what_a_release_without_schema_numbers_has_left_goes_on(lab: Lab, state: str) -> None:
    breaker = lab.breaker()
    now = round(lab.clock() * 1000)
    kept = {"state": state, "since": now - 1000, "reason": "drill", "actor": "ada", "openings": 2, "epoch": 7}
    flat = [part for item in {**kept, "open_until": now + 4000, "version": 7}.items() for part in item]
    command(lab, "HSET", keys_of(lab, breaker).former, *flat)
    looked_at = breaker.snapshot()
    assert (looked_at.state, looked_at.reason, looked_at.actor) == (state, "drill", "ada")
    grant = breaker.ask()
    assert grant.admitted is (state in {"DISABLED", "SHADOW"})
    assert (grant.snapshot.state, grant.snapshot.since) == (state, lab.clock() - 1)
    lab.clock.advance(4)
    assert breaker.ask().trial is (state == "OPEN")
    assert breaker.command(Verb.RESET).snapshot.state is State.CLOSED
    assert breaker.calls("S").snapshot.state is State.CLOSED


@SHARED
def test_half_open_of_a_release_without_schema_numbers_is_open_until_now(lab: Lab) -> None:
    breaker = lab.breaker()
    command(lab, "HSET", keys_of(lab, breaker).former, "state", "HALF_OPEN", "openings", "2", "epoch", "7")
    looked_at = breaker.snapshot()
    assert (looked_at.state in {State.OPEN, State.HALF_OPEN}, looked_at.openings) == (True, 2)
    assert breaker.ask().trial


@SHARED
def test_other_states_of_a_release_without_schema_numbers_begin_anew(lab: Lab) -> None:
    breaker = lab.breaker()
    command(lab, "HSET", keys_of(lab, breaker).former, "state", "CLOSED", "epoch", "7")
    assert (breaker.snapshot().state, breaker.snapshot().epoch) == (State.CLOSED, 0)
    command(lab, "SET", keys_of(lab, lab.breaker("mail")).former, "BANANA")
    assert lab.breaker("mail").calls("S").snapshot.state is State.CLOSED


def test_without_rights_on_channels_states_move_all_the_same(server: Server) -> None:
    client = redis.Redis.from_url(server.url())
    client.execute_command("ACL", "SETUSER", "mute", "on", ">secret", "~*", "+@all", "resetchannels")
    try:
        store = RedisStore(server.url().replace("redis://", "redis://mute:secret@"), namespace="test")
        store.check()
        answer = store.command(Spec("payments"), Verb.ISOLATE)
        assert answer.transition is not None
        assert store.read([Spec("payments")])[0].state is State.FORCED_OPEN
        store.close()
    finally:
        client.execute_command("ACL", "DELUSER", "mute")
