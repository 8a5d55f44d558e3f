"""Whatever somebody writes by hand into what the store keeps of a breaker, it stops nobody, and is named in the log."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest

from resilient_tasks.core.counts import LONGEST_WAIT, REFUSED, TRIALS
from resilient_tasks.core.model import State, Verb
from resilient_tasks.store import mending
from resilient_tasks.store.tallies import Tally
from tests.contract.lab import Lab, Subject

STATE = ["state", "epoch", "version", "since", "shadow", "policy", "total_failures"]
HASHES = {"window": "7", "minutes": "7", "totals": REFUSED, "outage": "openings", "pace": "batch"}
NONSENSE = ["", "BANANA", "{}", "[1]", b"\xff\x00"]
ON_SERVERS = pytest.mark.parametrize("lab", ["fakeredis", "server"], indirect=True)
_batches = itertools.count(1)


@pytest.fixture(autouse=True)
def _without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mending, "_PAUSE", -1.0)


def breaker_with_a_past(lab: Lab) -> Subject:
    """Return a breaker that has been open, and for which a task waits."""
    breaker = lab.breaker()
    breaker.open().command(Verb.RESET)
    lab.ledger.add_deferred(breaker.name, "a", deadline=lab.clock() + 60)
    lab.ledger.resumed(breaker.name, 1)
    tell(lab, breaker)
    return breaker


def tell(lab: Lab, breaker: Subject) -> None:
    tally = Tally(Counter({REFUSED: 1}), {LONGEST_WAIT: 1000})
    lab.history.tally("worker", next(_batches), {breaker.name: tally})


def use(lab: Lab, breaker: Subject) -> None:
    """Do what processes and people do with a breaker all day."""
    breaker.calls("F")
    tell(lab, breaker)
    lab.ledger.pace(breaker.name)
    lab.history.transitions(breaker.name)
    lab.history.minutes(breaker.name)
    lab.history.totals([breaker.name])
    lab.history.outages([breaker.name])
    lab.history.estimates([breaker.snapshot()])
    breaker.command(Verb.TRIP)
    breaker.command(Verb.RESET)
    assert breaker.state is State.CLOSED


def edit(lab: Lab, breaker: Subject, command: str, part: str, *args: Any) -> str:
    """Edit a key of a breaker behind the store's back; return the key."""
    store: Any = lab.store
    key: str = store._keys.pace(breaker.name) if part == "pace" else getattr(store._keys.breaker(breaker.name), part)
    store._server.run(lambda client: client.execute_command(command, key, *args))
    return key


@ON_SERVERS
@pytest.mark.parametrize("field", STATE)
def test_a_field_of_the_state_that_makes_no_sense(lab: Lab, caplog: pytest.LogCaptureFixture, field: str) -> None:
    breaker = breaker_with_a_past(lab)
    breaker.command(Verb.TRIP)
    key = edit(lab, breaker, "HSET", "state", field, "BANANA")
    use(lab, breaker)
    assert f"breaker payments: what {key} keeps makes no sense and is gone: {field}=BANANA" in caplog.text


@ON_SERVERS
@pytest.mark.parametrize(("part", "field"), HASHES.items())
def test_a_field_of_a_hash_that_makes_no_sense(
    lab: Lab, caplog: pytest.LogCaptureFixture, part: str, field: str
) -> None:
    for value in NONSENSE:
        caplog.clear()
        breaker = breaker_with_a_past(lab)
        key = edit(lab, breaker, "HSET", part, field, value)
        use(lab, breaker)
        assert key in caplog.text, value


@ON_SERVERS
@pytest.mark.parametrize("part", ["log", "outages"])
def test_an_entry_of_a_list_that_makes_no_sense(lab: Lab, caplog: pytest.LogCaptureFixture, part: str) -> None:
    breaker = breaker_with_a_past(lab)
    kept = len(lab.history.transitions(breaker.name))
    for value in NONSENSE:
        key = edit(lab, breaker, "LPUSH", part, value)
    use(lab, breaker)
    assert caplog.text.count(f"{key} keeps makes no sense") == len(NONSENSE)
    assert len(lab.history.transitions(breaker.name)) == kept + 2


@pytest.mark.parametrize("lab", ["server", "cluster"], indirect=True)  # fakeredis writes JSON of its own
@pytest.mark.parametrize("part", ["deferred", "deadlines"])
def test_a_score_that_makes_no_sense(lab: Lab, caplog: pytest.LogCaptureFixture, part: str) -> None:
    breaker = breaker_with_a_past(lab)
    key = edit(lab, breaker, "ZADD", part, "-inf", "b")
    use(lab, breaker)
    assert f"{key} keeps makes no sense and is gone: a score of -inf" in caplog.text
    assert breaker.snapshot().deferred == 1


@ON_SERVERS
@pytest.mark.parametrize("part", ["state", "window", "deferred", "log", "minutes", "outage", "pace"])
def test_a_key_of_another_kind(lab: Lab, caplog: pytest.LogCaptureFixture, part: str) -> None:
    breaker = breaker_with_a_past(lab)
    key = edit(lab, breaker, "SET", part, "BANANA")
    use(lab, breaker)
    assert f"{key} keeps makes no sense and is gone: a string instead of" in caplog.text


@ON_SERVERS
def test_the_rest_of_a_state_is_kept(lab: Lab) -> None:
    breaker = breaker_with_a_past(lab)
    breaker.command(Verb.ISOLATE, reason="maintenance", actor="ada")
    edit(lab, breaker, "HSET", "state", "total_failures", "BANANA")
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.reason, snapshot.actor) == (State.FORCED_OPEN, "maintenance", "ada")
    assert snapshot.total_failures == 0


@ON_SERVERS
def test_one_breaker_that_makes_no_sense_keeps_nobody_from_reading_the_others(lab: Lab) -> None:
    breaker, mail = breaker_with_a_past(lab), lab.breaker("mail")
    mail.command(Verb.TRIP)
    edit(lab, breaker, "HSET", "state", "epoch", "BANANA")
    edit(lab, breaker, "HSET", "totals", TRIALS, "BANANA")
    assert [snapshot.state for snapshot in lab.store.read([breaker.spec, mail.spec])] == [State.CLOSED, State.OPEN]
    assert lab.history.totals(["payments", "mail"])["mail"].entered == {State.OPEN: 1}
