"""The README is short, and its Python snippets and those of some pages run as printed, one after the other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from resilient_tasks import BreakerOpenError
from resilient_tasks.testing import force, in_memory

ROOT = Path(__file__).parents[2]


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


[DEFINITIONS] = snippets("README.md")
WEB, GUARDS, TIMEOUTS, SENDERS = snippets("docs/guards.md")
[TESTING] = snippets("docs/testing.md")
[OPERATIONS] = snippets("docs/operations.md")
[TUNING] = snippets("docs/tuning.md")


class Pay:
    """Replaces httpx: notes each request and answers it."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def get(self, url: str, timeout: float) -> Any:
        self.asked.append((url, timeout))
        response = SimpleNamespace(json=lambda: {"balance": 7})
        response.raise_for_status = lambda: response
        return response

    post = get


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the README's snippet defines, with the breakers in memory."""
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(DEFINITIONS, namespace)
    namespace["httpx"] = Pay()
    with in_memory(namespace["resilience"]):
        yield namespace


def test_its_tasks_are_guarded(namespace: dict[str, Any]) -> None:
    assert {namespace["charge"].options.breakers, namespace["balance"].options.breakers} == {("payments",)}
    assert namespace["charge"].apply(args=[1]).get() is None
    assert namespace["httpx"].asked == [("https://pay.example/charges/1", 5)]


def test_its_policy_is_the_default_one_but_for_slow_calls(namespace: dict[str, Any]) -> None:
    default = namespace["resilience"].breaker("another").policy
    assert [name for name, *_ in namespace["payments"].policy.differences(default)] == ["slow_call_duration"]


def test_an_api_without_celery(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://localhost:1/0")
    names: dict[str, Any] = {"__name__": "web"}
    exec(WEB, names)
    with in_memory(names["resilience"]):
        force(names["llm"], "OPEN")
        answer = TestClient(names["api"]).post("/summaries?text=story")
    assert answer.status_code == 503
    assert 10 < int(answer.headers["Retry-After"]) <= 12


def test_guards(namespace: dict[str, Any]) -> None:
    asked = namespace["httpx"].asked
    namespace["call"] = lambda: asked.append("call")
    namespace["fn"] = lambda *args, **kwargs: asked.append((args, kwargs))
    exec(GUARDS, namespace)
    namespace["payments"]._dependency.probe.function()
    assert asked == ["call", ((1,), {"key": "value"}), ("https://pay.example/health", 2)]


def test_time_outs_inside_a_guard(namespace: dict[str, Any]) -> None:
    async def ask() -> None:
        raise TimeoutError

    namespace.update(ask=ask, asyncio=asyncio)
    exec(TIMEOUTS, namespace)
    with pytest.raises(TimeoutError):
        asyncio.run(namespace["ask_payments"]())
    namespace["resilience"].fleet.reporter.flush(60)
    assert namespace["payments"].snapshot().failures == 1


def test_senders(namespace: dict[str, Any]) -> None:
    assert namespace["balance"].apply(args=[3]).get() == {"balance": 7}
    force(namespace["payments"], "OPEN")
    with pytest.raises(BreakerOpenError):
        exec(SENDERS, namespace)
    assert eval(SENDERS.splitlines()[-1], namespace) == {"balance": 7}, "the last good value"


def test_tests_of_ones_own(namespace: dict[str, Any]) -> None:
    exec(TESTING, namespace)
    namespace["test_payments_heals"]()


def test_verbs(namespace: dict[str, Any]) -> None:
    exec(OPERATIONS, namespace)
    assert namespace["payments"].state == "CLOSED"


def test_tuning() -> None:
    namespace: dict[str, Any] = {"__name__": "tuning"}
    exec(TUNING, namespace)
    assert namespace["payments"].policy.slow_call_duration == 1


def test_the_readme_is_short_and_its_first_code_near_the_top() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 900
    assert text[: text.index("```python")].count("\n") < 25
