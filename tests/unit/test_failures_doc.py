"""The snippets of docs/failures.md run as printed, and do what the page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.testing import Clock, in_memory

PAGE = (Path(__file__).parents[2] / "docs" / "failures.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def namespace() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "failures"}
    for snippet in SNIPPETS:
        exec(snippet, namespace)
    return namespace


@pytest.fixture
def clock(namespace: dict[str, Any]) -> Iterator[Clock]:
    with in_memory(namespace["resilience"]) as clock:
        yield clock


def fail(breaker: Any, error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        breaker.call(call)


def test_it_takes_three_tasks(namespace: dict[str, Any], clock: Clock) -> None:
    payments = namespace["payments"]
    assert payments.policy.needed_tasks == 3
    for _ in range(7):
        payments.call(str)
    for state in ("CLOSED", "CLOSED", "OPEN"):
        fail(payments, ConnectionError())
        assert payments.snapshot().state == state


def test_what_hangs_and_quick_attempts_are_declared_as_printed(namespace: dict[str, Any]) -> None:
    search, find = namespace["search"], namespace["find"]
    assert (search.policy.slow_call_duration, search.policy.slow_call_rate_threshold) == (1, 0.8)
    assert find.options.breakers == ("search",)
    assert find.options.retrying.stop.max_attempt_number == 3
