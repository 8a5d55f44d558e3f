"""Every Python snippet of the README runs as printed, one after the other in one module."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import _state

from resilient_tasks import BreakerOpenError
from resilient_tasks.testing import force, in_memory

README = Path(__file__).parents[2] / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
DEFINITIONS, GUARDS, SENDERS, TESTING, OPERATIONS = SNIPPETS


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the first snippet defines, with the breakers in memory."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set())  # or every later app would have the README's tasks
    namespace: dict[str, Any] = {"__name__": "readme"}
    exec(DEFINITIONS, namespace)
    with in_memory(namespace["resilience"]):
        yield namespace


def test_its_tasks_are_guarded(namespace: dict[str, Any]) -> None:
    assert {namespace["charge"].options.breakers, namespace["balance"].options.breakers} == {("payments",)}
    assert namespace["charge"].apply(args=[1]).get() is None


def test_its_guards(namespace: dict[str, Any]) -> None:
    asked: list[Any] = []

    def get(url: str, timeout: float) -> Any:
        asked.append((url, timeout))
        return SimpleNamespace(raise_for_status=lambda: None)

    namespace["httpx"] = SimpleNamespace(get=get)
    namespace["call"] = lambda: asked.append("call")
    namespace["fn"] = lambda *args, **kwargs: asked.append((args, kwargs))
    exec(GUARDS, namespace)
    namespace["payments"].registered_probe.function()
    assert asked == ["call", ((1,), {"key": "value"}), ("https://pay.example/health", 2)]


def test_its_senders(namespace: dict[str, Any]) -> None:
    assert namespace["balance"].apply(args=[3]).get() is None
    force(namespace["payments"], "OPEN")
    with pytest.raises(BreakerOpenError):
        exec(SENDERS, namespace)
    assert eval(SENDERS.splitlines()[-1], namespace) is None, "the last good value"


def test_its_test(namespace: dict[str, Any]) -> None:
    exec(TESTING, namespace)
    namespace["test_payments_heals"]()


def test_its_verbs(namespace: dict[str, Any]) -> None:
    exec(OPERATIONS, namespace)
    assert namespace["payments"].state == "CLOSED"
