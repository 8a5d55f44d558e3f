"""The example of docs/coalescing.md defines tasks that are coalesced as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks.fallback import Call, key_of

PAGE = (Path(__file__).parents[2] / "docs" / "coalescing.md").read_text()


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "key"),
    [("sync", (), {"account": "acme", "version": 3}, "acme"), ("rename", ("ACME", "Acme"), {}, "acme")],
)
def test_its_tasks_have_the_keys_that_it_names(
    monkeypatch: pytest.MonkeyPatch, name: str, args: Any, kwargs: Any, key: str
) -> None:
    namespace: dict[str, Any] = {"__name__": "coalescing"}
    for snippet in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(snippet, namespace)
    task = namespace[name]
    assert task.options.coalesce == namespace["refresh"].options.coalesce == "latest"
    assert key_of(Call(task.name, task.run, args, kwargs), task.options.coalesce_key) == key
    assert namespace["refresh"].options.coalesce_key is None
