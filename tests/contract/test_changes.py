"""How others receive a change."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from itertools import islice
from typing import Any, cast

import pytest

from resilient_tasks.core.model import Snapshot, State, Verb
from tests.contract.lab import SHARED, Lab, Subject


def listening(lab: Lab, timeout: float = 5.0) -> Any:
    changes = cast("Any", lab.store.changes(timeout=timeout))
    assert next(changes) is None, "it listens from here on"
    return closing(changes)


def test_every_transition_is_published_as_the_state_it_led_to(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1)
    with listening(lab) as changes:
        breaker.half_open()
        breaker.trials("S")
        answer = breaker.command(Verb.ISOLATE, reason="maintenance: größer", actor="ada")
        received = list(islice(changes, 4))
    assert [snapshot.state for snapshot in received] == [State.OPEN, State.HALF_OPEN, State.CLOSED, State.FORCED_OPEN]
    assert received[-1] == answer.snapshot
    assert [s.version for s in received] == sorted({s.version for s in received})


def test_a_permit_given_back_and_a_would_be_opening_are_published(lab: Lab) -> None:
    on_trial, shadow = lab.breaker("on trial", trial_calls=1).half_open(), lab.breaker("shadow")
    shadow.command(Verb.SHADOW)
    on_trial.ask("a")
    with listening(lab) as changes:
        on_trial.settle("a", "I")
        shadow.calls("FFFFF")
        received = {snapshot.name: snapshot for snapshot in _until_all_are_received(changes, on_trial, shadow)}
    assert received["on trial"].trials == 0
    assert received["shadow"].would_open


def _until_all_are_received(changes: Iterable[Snapshot], *breakers: Subject) -> Iterator[Snapshot]:
    """Nodes of a cluster publish in no order, and may publish late what was before."""
    awaited = {(breaker.name, breaker.snapshot().version) for breaker in breakers}
    for snapshot in changes:
        yield snapshot
        awaited.discard((snapshot.name, snapshot.version))
        if not awaited:
            return


def test_what_has_changed_lately_is_reported(lab: Lab) -> None:
    breaker, child, idle = lab.breaker(), lab.breaker("mail:acme"), lab.breaker("idle")
    breaker.open()
    lab.clock.advance(10)
    child.command(Verb.ISOLATE)
    idle.calls("SF")
    now = lab.clock()
    assert lab.store.changed(0.0) == {"payments": now - 10, "mail:acme": now}
    assert lab.store.changed(now - 5) == {"mail:acme": now}
    assert lab.store.changed(now + 1) == {}


@SHARED
def test_a_deferral_is_a_change(lab: Lab) -> None:
    lab.ledger.add_deferred("payments", "a")
    lab.ledger.add_deferred("mail:acme", "b", now=lab.clock() + 5)
    assert lab.store.changed(0.0) == pytest.approx({"payments": lab.clock(), "mail:acme": lab.clock() + 5}, abs=0.001)


@SHARED
def test_counting_publishes_nothing(lab: Lab) -> None:
    breaker = lab.breaker()
    with listening(lab, timeout=0.05) as changes:
        breaker.calls("SFSF")
        breaker.ask()
        lab.ledger.add_deferred(breaker.name, "a")
        assert next(changes) is None


def test_several_breakers_share_one_channel_and_namespaces_do_not(lab: Lab) -> None:
    other = lab.other_namespace()
    with listening(lab) as changes:
        other.command(lab.breaker("other").spec, Verb.ISOLATE)
        lab.breaker("mail").open()
        lab.breaker("payments").open()
        assert {snapshot.name for snapshot in islice(changes, 2)} == {"mail", "payments"}
