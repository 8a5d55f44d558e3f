"""The example of docs/producers.md runs as printed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.testing import force, in_memory

PAGE = (Path(__file__).parents[2] / "docs" / "producers.md").read_text()


@pytest.fixture
def website(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "producers"}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(snippet, namespace)
    return namespace


def test_while_all_is_well_tasks_are_sent(website: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def send_task(name: str, *_: Any, **__: Any) -> Any:
        return website["app"].AsyncResult(f"id of {name}")

    monkeypatch.setattr(website["app"], "send_task", send_task)
    with in_memory(website["resilience"]):
        assert website["checkout_page"]() == "pay now"
        assert website["pay"](7) == f"id of {website['charge'].name}"


def test_while_payments_is_down_the_website_answers(website: dict[str, Any]) -> None:
    with in_memory(website["resilience"]):
        force(website["payments"], "OPEN")
        assert website["checkout_page"]() == "pay on delivery"
        assert re.fullmatch(r"try again in (9|10|11) s", website["pay"](7))
        assert website["account_page"](3) == {"account": 3, "balance": "unknown"}
