"""What is said of the end of an outage, and how it is put."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from resilient_tasks import ConfigurationError, Resilience
from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.core.outage import Counts, Deadlines, Estimate, Outage, estimate, learned_rate
from resilient_tasks.monitor.report import evidence_of, in_words, moment

NOW = 1_789_000_000.0
CLOSED = Snapshot("payments", State.CLOSED, 1, 1, now=NOW, since=NOW - 30, deferred=600, oldest_deferred_at=NOW - 120)
OPEN = replace(CLOSED, state=State.OPEN, open_until=NOW + 40)
FORMER = Outage.of(
    "payments",
    {
        "opened": "1000000", "closed": "2000000", "drained": "2100000", "reason": "", "actor": "", "openings": "1",
        "resumed": "2200", "deferred_again": "200",
    },
)  # fmt: skip


def test_a_former_outage_says_how_fast_it_drained() -> None:
    assert FORMER.drain_rate == 20.0
    assert replace(FORMER, drained=None).drain_rate is None
    assert replace(FORMER, counts=Counts(resumed=5)).drain_rate is None, "too few to learn from"


@pytest.mark.parametrize("snapshot", [OPEN, replace(OPEN, state=State.HALF_OPEN), CLOSED])
def test_before_anything_is_resumed_the_rate_is_that_of_the_former_outage(snapshot: Snapshot) -> None:
    lasting = replace(FORMER, closed=None, drained=None)
    assert learned_rate(snapshot, [lasting, FORMER], 0) == 20.0
    assert learned_rate(snapshot, [lasting], 0) is None


def test_while_it_drains_the_rate_is_that_of_the_last_minutes() -> None:
    assert learned_rate(CLOSED, [FORMER], 1500) == 50.0  # it has admitted calls for 30 s
    long_ago, of_the_minute = replace(CLOSED, since=NOW - 1000), NOW % 60
    assert learned_rate(long_ago, [FORMER], 1500) == 1500 / (60 + of_the_minute)
    assert learned_rate(OPEN, [FORMER], 1500) == 20.0


def test_what_has_just_begun_says_nothing_yet() -> None:
    just_closed = replace(CLOSED, since=NOW - 4)
    assert learned_rate(just_closed, [FORMER], 5) == 20.0
    assert learned_rate(just_closed, [], 5) is None


def test_the_end_is_the_next_trial_and_the_learned_rate() -> None:
    assert estimate(OPEN, 20.0, Deadlines()).done_in == 40 + 30
    assert estimate(CLOSED, 20.0, Deadlines()).done_in == 30
    assert estimate(CLOSED, 20.0, Deadlines()).oldest_wait == 120


def test_what_is_unknown_is_said_to_be() -> None:
    unknown = estimate(OPEN, None, Deadlines(10, [NOW]))
    assert (unknown.done_in, unknown.late) == (None, None)
    forced = estimate(replace(OPEN, state=State.FORCED_OPEN, open_until=None), 20.0, Deadlines(10, [NOW]))
    assert (forced.done_in, forced.late) == (None, None)


@pytest.mark.parametrize(
    ("first_end", "late"),
    [(1000.0, 0), (-1000.0, 600), (15.0, 300)],  # the last of 600 tasks goes after 30 s, half of them after 15 s
)
def test_tasks_whose_turn_comes_after_their_deadline_are_late(first_end: float, late: int) -> None:
    ends = [NOW + first_end] * 60
    assert estimate(CLOSED, 20.0, Deadlines(600, ends)).late == pytest.approx(late, abs=10)


@pytest.mark.parametrize(
    ("estimate", "sentence"),
    [
        (
            Estimate("payments", 41_200, 11_520.0, 18.0, 2280.0, 9),
            "41,200 waiting, oldest 3 h 12 min, done in about 38 min at the learned rate; 9 will miss their deadline.",
        ),
        (
            Estimate("payments", 2, 5.0, 18.0, 1.0, 1),
            "2 waiting, oldest 5 s, done in about 1 s at the learned rate; 1 will miss its deadline.",
        ),
        (
            Estimate("payments", 2, 5.0, None, None, None),
            "2 waiting, oldest 5 s, when they will be done is unknown.",
        ),
    ],
)
def test_an_estimate_is_a_sentence(estimate: Estimate, sentence: str) -> None:
    assert in_words(estimate) == sentence


@pytest.mark.parametrize("name", ["unknown", "unknown:acme", "payments:*", "payments:", "", 5])
def test_no_app_defines_such_a_breaker(name: Any) -> None:
    resilience = Resilience(store_url="redis://localhost")
    resilience.breaker("payments")
    for ask in (resilience.outages, resilience.estimate):
        with pytest.raises(
            ConfigurationError, match=re.escape(f"breaker {name!r} is defined nowhere; defined: payments")
        ):
            ask(name)


@pytest.mark.parametrize("since", ["24h", -1, float("nan"), True, timedelta(hours=1)])
def test_since_is_a_span_of_time(since: Any) -> None:
    resilience = Resilience(store_url="redis://localhost")
    with pytest.raises(ConfigurationError, match=re.escape(f"since={since!r}: allowed is a number of seconds")):
        resilience.outages(since=since)


@pytest.mark.parametrize(
    ("evidence", "slow_evidence", "text"),
    [(0.7, 0.2, "7 of 10"), (0.0, 0.2, "2 of 10"), (0.0333, 0.0, "0.3 of 10"), (0.0, 0.0, "")],
)
def test_evidence_is_that_of_failures_or_of_slow_calls(evidence: float, slow_evidence: float, text: str) -> None:
    assert evidence_of(replace(CLOSED, evidence=evidence, slow_evidence=slow_evidence, minimum_calls=10)) == text


def test_a_time_that_is_on_no_calendar_is_left_out() -> None:
    assert (moment(1e300), moment(-1.0), moment(float("nan"))) == ("", "", "")
