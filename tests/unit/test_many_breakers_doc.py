"""The snippets of docs/many-breakers.md run as printed, and do what the text says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.testing import in_memory
from resilient_tasks.worker.context import runtime_of

PAGE = (Path(__file__).parents[2] / "docs" / "many-breakers.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    names: dict[str, Any] = {"__name__": "many_breakers"}
    for snippet in SNIPPETS:
        exec(snippet, names)
    with in_memory(names["resilience"]):
        yield names


def test_every_example_names_its_breakers(page: dict[str, Any]) -> None:
    def guards(task: str, *args: Any, **kwargs: Any) -> list[str]:
        return [guard.name for guard in runtime_of(page[task].app).guards_of(page[task], args, kwargs)]

    assert guards("charge_and_tell", 1) == ["payments", "mail"]
    assert guards("bill", 1) == ["tenants", "tenants:house"]
    assert guards("bill", 1, "acme") == ["tenants", "tenants:acme"]
    assert guards("fetch", 1, host="API.example:80") == ["tenants", "tenants:api.example%3A80", "mail"]


def test_a_guard_and_a_probe_know_the_child(page: dict[str, Any]) -> None:
    assert page["look_up"]("acme", 7) == 7
    page["resilience"].fleet.reporter.flush(60)
    acme = page["tenants"].child("acme")
    assert acme.snapshot().calls == 1
    assert acme._dependency.probe_to_run.function.func is page["ping"]
