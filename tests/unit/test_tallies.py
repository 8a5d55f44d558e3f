"""What a process counts for the history: added up, and sent about once a second."""

from __future__ import annotations

import contextvars
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest

from resilient_tasks.breaker import Breaker
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, Verb
from resilient_tasks.core.outage import CAUSE, REFUSED, RESUMED, Tally
from resilient_tasks.dependency import Fleet
from resilient_tasks.errors import BreakerOpenError, StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec
from resilient_tasks.store.history import History
from resilient_tasks.store.local import LocalStore
from resilient_tasks.store.reporter import TALLY_INTERVAL, Tallies


@dataclass
class Book:
    """A history that receives everything, also what it then seems not to have received."""

    received: list[Mapping[str, Tally]] = field(default_factory=list)
    away: bool = False
    was_called: threading.Event = field(default_factory=threading.Event)

    def tally(self, tallies: Mapping[str, Tally], _: float) -> None:
        self.received.append(tallies)
        self.was_called.set()
        if self.away:
            raise StoreError("away")


def tallies_for(book: Book) -> Tallies:
    return Tallies(cast("History", book), clock=lambda: 100.0)


def test_counts_and_peaks_are_added_up() -> None:
    book = Book()
    tallies = tallies_for(book)
    assert tallies.add("payments", REFUSED)
    assert tallies.due_at == 100.0 + TALLY_INTERVAL
    assert not tallies.add("payments", RESUMED, 5, peak=("longest_wait", 2.5))
    assert not tallies.add("payments", RESUMED, 1, peak=("longest_wait", 1.5))
    assert not tallies.add("mail", REFUSED)
    tallies.send(100.0)
    [sent] = book.received
    assert sent == {
        "payments": Tally(Counter({REFUSED: 1, RESUMED: 6}), {"longest_wait": 2500}),
        "mail": Tally(Counter({REFUSED: 1})),
    }
    assert tallies.due_at is None
    tallies.send(100.0)
    assert len(book.received) == 1


def test_what_is_not_confirmed_is_sent_again_with_what_was_counted_since() -> None:
    book = Book(away=True)
    tallies = tallies_for(book)
    tallies.add("payments", REFUSED, peak=("longest_wait", 2.5))
    with pytest.raises(StoreError):
        tallies.send(100.0)
    assert tallies.due_at == 100.0 + TALLY_INTERVAL
    tallies.add("payments", REFUSED, 2, peak=("longest_wait", 1.5))
    tallies.add("mail", REFUSED)
    book.away = False
    tallies.send(100.0)
    assert book.received[-1] == {
        "payments": Tally(Counter({REFUSED: 3}), {"longest_wait": 2500}),
        "mail": Tally(Counter({REFUSED: 1})),
    }


def test_names_are_bounded() -> None:
    book = Book()
    tallies = tallies_for(book)
    for number in range(100):
        tallies.add("payments", f"{CAUSE}Error{number}")
        tallies.add("payments", f"{CAUSE}Error0")
        tallies.add("payments", REFUSED)
    tallies.send(100.0)
    counts = book.received[0]["payments"].counts
    assert (counts[f"{CAUSE}Error0"], counts[f"{CAUSE}other"], counts[REFUSED]) == (101, 60, 100)
    assert len(counts) == 42


def test_without_a_history_nothing_is_counted() -> None:
    tallies = Tallies(None)
    assert not tallies.add("payments", REFUSED)
    assert tallies.due_at is None


def test_a_child_is_counted_like_any_breaker() -> None:
    book = Book()
    tallies = tallies_for(book)
    tallies.add("payments:acme%2Feu", REFUSED)
    tallies.send(100.0)
    assert list(book.received[0]) == ["payments:acme%2Feu"]


def test_what_no_breaker_can_be_called_is_not_counted() -> None:
    tallies = tallies_for(Book())
    assert not tallies.add("a{b}", REFUSED)
    assert tallies.due_at is None


def test_a_process_reports_by_itself_and_when_it_ends() -> None:
    book = Book()
    fleet = Fleet(LocalStore(), history=cast("History", book))
    fleet.reporter.tally("payments", REFUSED)
    assert book.was_called.wait(60)
    fleet.reporter.tally("payments", RESUMED)
    fleet.close()
    assert [tallies["payments"].counts for tallies in book.received] == [Counter({REFUSED: 1}), Counter({RESUMED: 1})]


def test_calls_that_end_too_late_for_a_decision_are_tallied() -> None:
    book = Book()
    fleet = Fleet(LocalStore(), history=cast("History", book))
    spec = Spec("payments")
    cached = fleet.join(spec)
    fleet.reporter.report(cached, cached.epoch, Verdict(Outcome.SUCCESS))
    assert fleet.reporter.flush(60)
    former = cached.epoch
    fleet.command(spec, Verb.TRIP, "", "")
    for _ in range(2):
        fleet.reporter.report(cached, former, Verdict(Outcome.FAILURE, "ReadTimeout"))
    fleet.close()
    counted: Counter[str] = sum((tallies["payments"].counts for tallies in book.received), Counter())
    assert counted == {"SUCCESS": 1, "FAILURE": 2, "cause:ReadTimeout": 2}


def test_a_refusal_is_counted_but_not_for_want_of_capacity() -> None:
    book = Book()
    fleet = Fleet(LocalStore(), history=cast("History", book))
    narrow = Breaker("narrow", BreakerPolicy(max_concurrency=1), fleet=lambda: fleet)
    with narrow.guard(), pytest.raises(BreakerOpenError, match="at capacity"):
        contextvars.Context().run(narrow.call, print)  # another call, not part of the first
    narrow.trip()
    for _ in range(2):
        with pytest.raises(BreakerOpenError, match="OPEN"):
            narrow.call(print)
    fleet.close()
    assert [tallies["narrow"].counts for tallies in book.received] == [Counter({REFUSED: 2, Outcome.SUCCESS.value: 1})]
