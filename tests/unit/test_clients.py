"""What exceptions of some seventy client libraries say about the dependency, none of which need be installed.

``client_exceptions.jsonl`` holds, one a line, what the libraries' real exceptions are made of (the classes they derive
from, arguments, attributes, text, and what they wrap) and how they are to be judged. They are rebuilt here.
"""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from resilient_tasks.core.classification import dependency_errors

_LINES = (Path(__file__).parent / "client_exceptions.jsonl").read_text().splitlines()
EXCEPTIONS = [json.loads(line) for line in _LINES]


def class_of(names: list[str], text: str | None) -> Any:
    """Return a class whose bases have these names, the first being its own; ``module:name`` unless built in."""
    built_in = [getattr(builtins, name) for name in names if ":" not in name]
    bases = tuple(cls for cls in built_in if not any(cls in other.__mro__[1:] for other in built_in))
    for name in reversed([name for name in names if ":" in name]):
        module, _, qualname = name.partition(":")
        bases = (type(qualname.rpartition(".")[2], bases, {"__module__": module}),)
    (kind,) = bases
    return (
        kind if text is None else type(kind.__name__, bases, {"__module__": kind.__module__, "__str__": lambda _: text})
    )


def rebuilt(parts: dict[str, Any]) -> BaseException:
    kind = class_of(parts["classes"], parts.get("text"))
    args = tuple(value_of(value) for value in parts.get("args", ()))
    exc: BaseException = kind.__new__(kind, *args)
    exc.args = args
    for name, value in parts.get("attributes", {}).items():
        setattr(exc, name, value_of(value))
    if "cause" in parts:
        exc.__cause__ = rebuilt(parts["cause"])
    if "context" in parts:
        exc.__context__ = rebuilt(parts["context"])
    return exc


def value_of(value: Any) -> Any:
    if isinstance(value, list):
        return [value_of(one) for one in value]
    if not isinstance(value, dict):
        return value
    ((shape, content),) = list(value.items())[:1]
    return SHAPES[shape](content)


SHAPES: dict[str, Any] = {
    "$bytes": lambda text: text.encode("latin-1"),
    "$dict": lambda pairs: {key: value_of(one) for key, one in pairs},
    "$enum": lambda name: SimpleNamespace(name=name),
    "$exception": rebuilt,
    "$method": lambda value: lambda: value_of(value),
    "$object": lambda attributes: SimpleNamespace(**{name: value_of(one) for name, one in attributes.items()}),
    "$tuple": lambda values: tuple(value_of(one) for one in values),
}


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make packages that are not installed look as if they were."""
    tops = {name.partition(".")[0] for parts in EXCEPTIONS for name in parts["classes"] if ":" in name}
    for top in tops - sys.stdlib_module_names:
        if top not in sys.modules:
            module = ModuleType(top)
            module.__file__ = f"/usr/lib/python3/site-packages/{top}/__init__.py"
            monkeypatch.setitem(sys.modules, top, module)


def name_of(parts: dict[str, Any]) -> str:
    return f"{parts['classes'][0]}-{parts.get('args', '')!s:.60}"


@pytest.mark.parametrize("parts", EXCEPTIONS, ids=name_of)
def test_a_clients_exception(parts: dict[str, Any]) -> None:
    assert dependency_errors(rebuilt(parts)).value == parts["outcome"]
