from __future__ import annotations

import json
import logging
from dataclasses import replace

import pytest

from resilient_tasks.core.model import State, Transition
from resilient_tasks.monitor.events import clean, event_fields, event_type, log

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


def test_a_transition_is_one_celery_event_of_plain_values() -> None:
    assert json.loads(json.dumps(event_fields(OPENED))) == {
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
    assert event_fields(replace(OPENED, calls=0, failures=0))["failure_rate"] == 0.0


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
    assert event_type(replace(OPENED, state=state, would_open=would_open)) == event


@pytest.mark.parametrize("state", list(State))
def test_a_transition_is_one_warning_with_structured_fields(state: State, caplog: pytest.LogCaptureFixture) -> None:
    log(replace(OPENED, state=state, actor="ann"))
    [record] = caplog.records
    assert (record.name, record.levelno) == ("resilient_tasks", logging.WARNING)
    for word in "payments", "CLOSED", str(state), "ann", "60 %", "3 of 5":
        assert word in record.getMessage()
    assert record.__dict__["breaker"] == "payments"
    assert record.__dict__["state"] == str(state)
    assert record.__dict__["failure_rate"] == 0.6


def test_shadow_says_what_would_have_happened(caplog: pytest.LogCaptureFixture) -> None:
    log(replace(OPENED, previous=State.SHADOW, state=State.SHADOW, would_open=True))
    assert "SHADOW -> would be OPEN" in caplog.text


def test_reasons_are_data_everywhere(caplog: pytest.LogCaptureFixture) -> None:
    event = log(replace(OPENED, reason="calm\n2030-01-01 ERROR forged %s %d\x1b[31m", actor="ann\r\n" + "x" * 1000))
    expected = "calm 2030-01-01 ERROR forged %s %d [31m"
    assert event_fields(event)["reason"] == expected
    assert expected in caplog.records[0].getMessage()
    assert "\n" not in caplog.records[0].getMessage()
    assert len(event.actor) == 500


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
