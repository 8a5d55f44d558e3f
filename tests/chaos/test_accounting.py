"""The accounting itself: every way in which a task can end has its column."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.accounting import UNEXPLAINED, Account, Redelivery, balance, histories
from tests.chaos.faults import FAULTS, possible_faults
from tests.chaos.ledger import Entry, Event, Ledger
from tests.chaos.schedule import make_schedule

SENT, ACKNOWLEDGED, BEGUN, MOVED, DONE, FAILED = Event


def account(*events: Event, redeliveries: tuple[Redelivery, ...] = ()) -> Account:
    """Account for one task to which these events happened, one per second."""
    entries = [Entry(event, "task", float(at), "here") for at, event in enumerate(events)]
    return balance(histories(entries), redeliveries)


@pytest.mark.parametrize(
    ("events", "column"),
    [
        ((SENT, ACKNOWLEDGED, BEGUN, DONE), "ok"),
        ((SENT, BEGUN, DONE, ACKNOWLEDGED), "ok"),
        ((SENT, ACKNOWLEDGED, BEGUN, FAILED, BEGUN, DONE), "ok"),
        ((SENT, ACKNOWLEDGED), "lost"),
        ((SENT, ACKNOWLEDGED, BEGUN), "lost"),
        ((SENT, ACKNOWLEDGED, BEGUN, FAILED), "failed"),
        ((SENT, BEGUN, DONE), "recovered"),
        ((BEGUN, DONE), "unexpected"),
    ],
)
def test_every_task_has_one_column(events: tuple[Event, ...], column: str) -> None:
    found = account(*events)
    filled = [name for name in ("ok", "lost", "failed", "recovered", "unexpected") if getattr(found, name)]
    assert filled == [column]
    assert found.clean == (column in {"ok", "recovered"})


def test_what_was_not_acknowledged_and_did_not_run_is_nothing() -> None:
    assert account(SENT) == Account()


TWICE = (SENT, ACKNOWLEDGED, BEGUN, DONE, BEGUN, DONE)


def test_a_second_run_is_explained_by_a_fault_that_struck_the_first() -> None:
    struck = Redelivery("worker killed", began=2.5, ended=2.6)
    earlier = replace(struck, fault="broker killed", began=0.1, ended=0.2)
    found = account(*TWICE, redeliveries=(earlier, struck))
    assert found.duplicated == {"task": "worker killed"}
    assert found.clean


def test_a_second_run_is_explained_by_a_fault_that_struck_a_move() -> None:
    struck = Redelivery("connections cut", began=2.5, ended=2.6)
    events = (SENT, ACKNOWLEDGED, MOVED, *[BEGUN] * 10, DONE, DONE)
    assert account(*events, redeliveries=(struck,)).duplicated == {"task": "connections cut"}


def test_a_second_run_that_no_fault_explains_is_an_error() -> None:
    later = Redelivery("worker killed", began=10.0, ended=11.0)
    found = account(*TWICE, redeliveries=(later,))
    assert found.duplicated == {"task": UNEXPLAINED}
    assert not found.clean


def test_many_can_write_into_a_ledger(tmp_path: Path) -> None:
    ledgers = [Ledger(tmp_path / "ledger") for _ in range(3)]
    assert list(ledgers[0].entries()) == []
    for ledger in ledgers:
        ledger.note(SENT, "task")
    assert [entry.event for entry in ledgers[0].entries()] == [SENT] * 3


def test_a_seed_gives_the_same_schedule_again() -> None:
    targets = {name: fault.target for name, fault in FAULTS.items()}
    assert make_schedule(7, targets, 20.0) == make_schedule(7, targets, 20.0)
    assert make_schedule(7, targets, 20.0) != make_schedule(8, targets, 20.0)


@pytest.mark.parametrize("broker", ["valkey", "rabbitmq"])
def test_the_seeds_of_one_evening_cause_every_fault(broker: str) -> None:
    targets = {name: fault.target for name, fault in possible_faults(broker).items()}
    caused = {planned.fault for seed in range(1, 21) for planned in make_schedule(seed, targets, 20.0).faults}
    assert caused == set(targets)
