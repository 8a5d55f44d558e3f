"""The webhook, against a receiver that listens on a port of its own."""

from __future__ import annotations

import hashlib
import hmac
import json
from typing import Any

import pytest

from resilient_tasks import ConfigurationError
from resilient_tasks.core.model import State, Transition
from resilient_tasks.monitor import webhook
from resilient_tasks.monitor.webhook import SIGNATURE, TIMESTAMP, Webhook
from resilient_tasks.settings import Settings
from tests.support.doubles import wait_until
from tests.support.receiver import Receiver

URL_RULE = "a URL in ASCII that begins with http:// or https://, names a host and no user"
SECRET_RULE = "a text of 16 characters or more without white space around it"
SECRET = "a secret of 24 characters"
OPENED = Transition("payments", State.CLOSED, State.OPEN, 17, 1000.0, "5 of 5 calls failed", "", 5, 5, 0)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "LONGEST_PAUSE", 0)


@pytest.fixture
def receiver() -> Any:
    with Receiver() as receiver:
        yield receiver


def test_a_transition_is_one_signed_json_request(receiver: Receiver) -> None:
    Webhook(receiver.url, SECRET, "shop")(OPENED)
    wait_until(lambda: receiver.requests)
    [(headers, body)] = receiver.requests
    assert json.loads(body) == {
        "id": "shop:payments:17:breaker-opened",
        "event": "breaker-opened",
        "namespace": "shop",
        "breaker": "payments",
        "state": "OPEN",
        "previous": "CLOSED",
        "epoch": 17,
        "at": 1000.0,
        "reason": "5 of 5 calls failed",
        "actor": "",
        "calls": 5,
        "failures": 5,
        "slow": 0,
        "failure_rate": 1.0,
    }
    assert headers["Content-Type"] == "application/json"
    signed = headers[TIMESTAMP].encode() + b"." + body
    assert headers[SIGNATURE] == "sha256=" + hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest()


def test_without_a_secret_there_is_no_signature(receiver: Receiver) -> None:
    Webhook(receiver.url, None, "shop")(OPENED)
    wait_until(lambda: receiver.requests)
    assert SIGNATURE not in receiver.requests[0][0]


def test_it_tries_again_while_that_may_help(receiver: Receiver) -> None:
    receiver.answers = [503, 429, 200]
    Webhook(receiver.url, SECRET, "shop")(OPENED)
    wait_until(lambda: len(receiver.requests) == 3)
    assert len({body for _, body in receiver.requests}) == 1


@pytest.mark.parametrize("status", [400, 404, 307])
def test_a_receiver_that_says_no_is_not_asked_again(
    receiver: Receiver, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.answers = [status]
    Webhook(f"{receiver.url}/hush", SECRET, "shop")(OPENED)
    wait_until(lambda: "did not take" in caplog.text)
    assert len(receiver.requests) == 1
    assert f"HTTP status {status}" in caplog.text
    assert "hush" not in caplog.text
    assert SECRET not in caplog.text


def test_a_receiver_that_is_away_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    with Receiver() as receiver:
        url = receiver.url
    Webhook(url, SECRET, "shop")(OPENED)
    wait_until(lambda: "did not take breaker-opened of breaker payments: URLError" in caplog.text)


def test_each_attempt_has_an_end(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT", 0.05)
    receiver.answers = [None, 200]
    Webhook(receiver.url, SECRET, "shop")(OPENED)
    wait_until(lambda: len(receiver.requests) == 2)


# --- settings ---------------------------------------------------------------------------------------


def test_url_and_secret_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_WEBHOOK_URL", "https://hooks.example/hush")
    monkeypatch.setenv("RESILIENT_TASKS_WEBHOOK_SECRET", SECRET)
    settings = Settings.load()
    assert settings.webhook_secret is not None
    assert (settings.webhook_url, settings.webhook_secret.get_secret_value()) == ("https://hooks.example/hush", SECRET)
    assert "hush" not in repr(settings)
    assert SECRET not in repr(settings)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "webhook_url",
            "ftp://hooks.example/hush",
            f"webhook_url='ftp://hooks.example/***': allowed is {URL_RULE}",
        ),
        (
            "webhook_url",
            "https:///hush",
            f"webhook_url='https:///***': allowed is {URL_RULE}",
        ),
        ("webhook_url", "hooks.example/hush", f"webhook_url='***': allowed is {URL_RULE}"),
        ("webhook_url", "ftp://host?hush", f"webhook_url='ftp://host/***': allowed is {URL_RULE}"),
        ("webhook_url", "http://host:99999/hush", f"webhook_url='http://host:99999/***': allowed is {URL_RULE}"),
        ("webhook_url", "http://host:port/hush", f"webhook_url='http://host:port/***': allowed is {URL_RULE}"),
        ("webhook_url", "http://me:hush@host/", f"webhook_url='http://me:***@host/***': allowed is {URL_RULE}"),
        ("webhook_url", "http://höst/hush", f"webhook_url='http://höst/***': allowed is {URL_RULE}"),
        ("webhook_url", "http://host/hush hush", f"webhook_url='http://host/***': allowed is {URL_RULE}"),
        ("webhook_secret", "short", f"webhook_secret='***': allowed is {SECRET_RULE}"),
        ("webhook_secret", "a secret and a newline\n", f"webhook_secret='***': allowed is {SECRET_RULE}"),
    ],
)
def test_what_is_wrong_is_named_without_its_secrets(field: str, value: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as wrong:
        Settings.load(**{field: value})
    assert str(wrong.value) == message
