from __future__ import annotations

import json
import logging
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from resilient_tasks.core.model import State, Transition
from resilient_tasks.monitor.events import Announcer, clean

OPENED = Transition(
    name="payments",
    previous=State.CLOSED,
    state=State.OPEN,
    epoch=17,
    at=1000.0,
    reason="failure rate 60 % of 5 calls: ConnectionError",
    actor="",
    calls=5,
    failures=3,
    slow=1,
)


class Sent(list[tuple[str, dict[str, Any]]]):
    """Stands in for Celery's event dispatcher."""

    def __call__(self, event: str, **fields: Any) -> None:
        self.append((event, fields))


def test_a_transition_is_one_celery_event_of_plain_values() -> None:
    sent = Sent()
    Announcer(sent)(OPENED)
    [(event, fields)] = sent
    assert event == "breaker-opened"
    assert json.loads(json.dumps(fields)) == {
        "breaker": "payments",
        "epoch": 17,
        "reason": "failure rate 60 % of 5 calls: ConnectionError",
        "actor": "",
        "previous": "CLOSED",
        "calls": 5,
        "failures": 3,
        "slow": 1,
        "failure_rate": 0.6,
    }


@pytest.mark.parametrize(
    ("state", "would_open", "event"),
    [
        (State.CLOSED, False, "breaker-closed"),
        (State.OPEN, False, "breaker-opened"),
        (State.HALF_OPEN, False, "breaker-half-opened"),
        (State.FORCED_OPEN, False, "breaker-forced-open"),
        (State.DISABLED, False, "breaker-disabled"),
        (State.SHADOW, False, "breaker-shadowed"),
        (State.SHADOW, True, "breaker-would-open"),
    ],
)
def test_each_state_has_its_event(state: State, would_open: bool, event: str) -> None:  # noqa: FBT001
    sent = Sent()
    Announcer(sent)(replace(OPENED, state=state, would_open=would_open))
    assert [name for name, _ in sent] == [event]


def test_without_calls_the_rate_is_zero() -> None:
    sent = Sent()
    Announcer(sent)(replace(OPENED, calls=0, failures=0))
    assert sent[0][1]["failure_rate"] == 0.0


@pytest.mark.parametrize("state", list(State))
def test_a_transition_is_one_warning_with_structured_fields(state: State, caplog: pytest.LogCaptureFixture) -> None:
    Announcer()(replace(OPENED, state=state, actor="ann"))
    [record] = caplog.records
    assert (record.name, record.levelno) == ("resilient_tasks", logging.WARNING)
    for word in "payments", "CLOSED", str(state), "ann", "60 %", "3 of 5":
        assert word in record.getMessage()
    assert record.__dict__["breaker"] == "payments"
    assert record.__dict__["state"] == str(state)
    assert record.__dict__["failure_rate"] == 0.6


def test_shadow_says_what_would_have_happened(caplog: pytest.LogCaptureFixture) -> None:
    Announcer()(replace(OPENED, previous=State.SHADOW, state=State.SHADOW, would_open=True))
    assert "SHADOW -> would be OPEN" in caplog.text


def test_reasons_are_data_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Transition] = []
    sent = Sent()
    announcer = Announcer(sent)
    announcer.add_listener(seen.append)
    announcer(replace(OPENED, reason="calm\n2030-01-01 ERROR forged %s %d\x1b[31m", actor="ann\r\n" + "x" * 1000))
    expected = "calm 2030-01-01 ERROR forged %s %d [31m"
    assert sent[0][1]["reason"] == seen[0].reason == expected
    assert expected in caplog.records[0].getMessage()
    assert "\n" not in caplog.records[0].getMessage()
    assert len(sent[0][1]["actor"]) == 500


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("Zahlung fällt aus, 支付", "Zahlung fällt aus, 支付"),
        ("a\tb\x00c\u202ed\ud800e", "a b c d e"),
        ("x" * 501, "x" * 500),
        ("\n" * 400 + "late", "late"),
    ],
)
def test_cleaning(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_listeners_get_the_frozen_transition_in_the_order_they_came() -> None:
    seen: list[tuple[str, Transition]] = []
    announcer = Announcer()

    @announcer.add_listener
    def first(transition: Transition) -> None:
        seen.append(("first", transition))

    announcer.add_listener(lambda transition: seen.append(("second", transition)))
    announcer(OPENED)
    assert seen == [("first", OPENED), ("second", OPENED)]
    with pytest.raises(FrozenInstanceError):
        seen[0][1].epoch = 3  # type: ignore[misc]
    assert callable(first)


def test_a_listener_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Transition] = []
    sent = Sent()
    announcer = Announcer(sent)
    announcer.add_listener(lambda transition: 1 / 0)
    announcer.add_listener(seen.append)
    announcer(OPENED)
    assert seen == [OPENED]
    assert len(sent) == 1
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "ZeroDivisionError" in caplog.text


def test_an_event_that_cannot_be_sent_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    def away(event: str, **fields: Any) -> None:
        raise OSError("broker away")

    seen: list[Transition] = []
    announcer = Announcer(away)
    announcer.add_listener(seen.append)
    announcer(OPENED)
    assert seen == [OPENED]
    _, failure = caplog.records
    assert "breaker-opened" in failure.getMessage()
    assert "broker away" in failure.getMessage()


def test_a_listener_may_add_a_listener() -> None:
    seen: list[Transition] = []
    announcer = Announcer()
    announcer.add_listener(lambda transition: announcer.add_listener(seen.append))
    announcer(OPENED)
    assert seen == []
    announcer(OPENED)
    assert seen == [OPENED]
