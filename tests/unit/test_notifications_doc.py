"""The snippets of docs/notifications.md, as printed, against what the library really sends."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import signals
from resilient_tasks.core.model import State, Transition
from tests.support.doubles import wait_until
from tests.support.receiver import Receiver

DOC = (Path(__file__).parents[2] / "docs" / "notifications.md").read_text()
RECEIVERS, CHAT = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
OPENED = Transition(
    "payments", State.CLOSED, State.OPEN, 1789000000123, 1789000000.123,
    "3 consecutive failures, last: ReadTimeout", "", 17, 5, 0,
)  # fmt: skip


@pytest.fixture
def told() -> Iterator[list[Any]]:
    told: list[Any] = []
    namespace: dict[str, Any] = {
        "pager": SimpleNamespace(send=told.append),
        "orders": SimpleNamespace(mark_as_delayed=told.append),
    }
    exec(RECEIVERS, namespace)
    yield told
    signals.breaker_opened.disconnect(namespace["page_on_call"])
    signals.task_deferred.disconnect(namespace["notify_the_customer"])


def test_its_receivers_are_called(told: list[Any]) -> None:
    app = Celery("shop", set_as_current=False)
    signals.notify_of_transition(app, OPENED)
    fields = {"task_id": "17", "task": "charge", "breaker": "payments", "since": 1.0, "reason": "it is OPEN"}
    signals.notify(signals.task_deferred, app, **fields)
    wait_until(lambda: len(told) == 2)
    assert told == ["shop: payments is OPEN: 3 consecutive failures, last: ReadTimeout", "17"]


def test_its_recipe_posts_to_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    exec(CHAT, namespace)
    try:
        with Receiver() as receiver:
            monkeypatch.setenv("CHAT_URL", receiver.url)
            signals.notify_of_transition(Celery("shop", set_as_current=False), OPENED)
            wait_until(lambda: bool(receiver.requests))
        [(_, body)] = receiver.requests
        assert json.loads(body) == {"text": "payments is OPEN: 3 consecutive failures, last: ReadTimeout"}
    finally:
        for signal in (signals.breaker_opened, signals.breaker_closed):
            signal.disconnect(namespace["post_to_chat"])
