"""The snippets of docs/isolation.md run as printed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.testing import in_memory

PAGE = (Path(__file__).parents[2] / "docs" / "isolation.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def namespace() -> Iterator[dict[str, Any]]:
    namespace: dict[str, Any] = {"__name__": "isolation", "ask": lambda address: f"coordinates of {address}"}
    for snippet in SNIPPETS:
        exec(snippet, namespace)
    with in_memory(namespace["resilience"]):
        yield namespace


def test_beyond_the_limit_a_call_is_refused(namespace: dict[str, Any]) -> None:
    assert namespace["coordinates"]("home") == "coordinates of home"
    spec = namespace["geocoder"]._dependency.spec
    for number in range(4):
        assert namespace["resilience"].fleet.acquire(spec, f"call {number}").admitted
    assert namespace["coordinates"]("home") == "AT_CAPACITY"
    assert namespace["locate_now"].apply(args=["home"]).state == "FAILURE"


def test_an_adaptive_limit_begins_at_its_lower_bound(namespace: dict[str, Any]) -> None:
    assert namespace["llm"].snapshot().concurrency_limit == 2
    assert namespace["converter"].policy.max_concurrency_per_worker == 2
