"""The layer rule as data: dependencies point one way, and few modules know Celery."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "resilient_tasks"
ROOT = Path(__file__).parents[2]

# bottom to top; a module imports from its own layer and from lower ones
LAYERS = [
    {"errors", "validation", "policy", "core"},
    {"store", "fallback", "monitor", "settings", "checks", "signals"},
    {"dependency", "guard", "breaker"},
    {"worker"},
    {"operations"},
    {"app", "prometheus", "typed"},
    {"__init__"},
    {"flower", "testing"},
    {"cli"},
]
# who may import what of Celery and its transport
CELERY = {
    "celery": {"worker", "operations", "app", "prometheus", "cli", "typed"},
    "celery.utils.dispatch": {"signals"},
    "billiard": {"worker"},
    "kombu": {"worker"},
    "kombu.exceptions": {"worker", "fallback"},
    "kombu.serialization": {"worker", "fallback"},
    "kombu.utils.json": {"worker", "fallback"},
    "tests": set(),
    "workers": set(),
}
RANK = {unit: rank for rank, units in enumerate(LAYERS) for unit in units}


def modules() -> list[Path]:
    return sorted((ROOT / PACKAGE).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Yield every dotted name that ``source`` imports; ``from a import b`` is ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_forbidden(unit: str, name: str) -> bool:
    head, *rest = name.split(".")
    if head == PACKAGE:
        target = rest[0] if rest and rest[0] in RANK else "__init__"
        return RANK[target] > RANK[unit]
    if unit == "core" and head not in sys.stdlib_module_names and head != "__future__":
        return True
    rules = [rule for rule in CELERY if name == rule or name.startswith(f"{rule}.")]
    return bool(rules) and unit not in CELERY[max(rules, key=len)]


def unit_of(module: Path) -> str:
    return module.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("module", modules(), ids=lambda module: str(module.relative_to(ROOT)))
def test_a_module_imports_only_what_its_layer_may(module: Path) -> None:
    unit = unit_of(module)
    assert unit in RANK, f"{unit} has no place in LAYERS"
    assert [name for name in imports(module.read_text()) if is_forbidden(unit, name)] == []


@pytest.mark.parametrize(
    ("unit", "statement", "forbidden"),
    [
        ("core", "import redis", True),
        ("core", "from resilient_tasks.store.base import Store", True),
        ("core", "from resilient_tasks import store", True),
        ("store", "from resilient_tasks import Resilience", True),
        ("store", "import kombu", True),
        ("breaker", "from celery import Celery", True),
        ("breaker", "def late():\n    import celery.app.task", True),
        ("fallback", "from kombu import Queue", True),
        ("fallback", "from kombu.utils import uuid", True),
        ("worker", "from resilient_tasks.app import Resilience", True),
        ("cli", "from tests.unit import helpers", True),
        ("core", "from __future__ import annotations\nimport math", False),
        ("core", "from resilient_tasks.errors import StoreError", False),
        ("store", "from resilient_tasks.core import model\nimport redis", False),
        ("fallback", "from kombu import serialization\nfrom kombu.utils import json\nimport kombu.utils.json", False),
        ("worker", "from celery.worker.request import Request\nfrom kombu import Queue", False),
        ("testing", "from resilient_tasks import Resilience", False),
    ],
)
def test_the_rule_finds_what_it_forbids_and_nothing_else(unit: str, statement: str, *, forbidden: bool) -> None:
    assert any(is_forbidden(unit, name) for name in imports(statement)) is forbidden


def imported_files() -> dict[str, set[str]]:
    """Return by each file of the package the others that it imports, for types only or not."""
    names = {".".join(path.relative_to(ROOT / PACKAGE).with_suffix("").parts): path for path in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        dotted = [each.removeprefix(f"{PACKAGE}.") for each in imports(path.read_text()) if each.startswith(PACKAGE)]
        candidates = {file for each in dotted for file in (each, each.rpartition(".")[0], f"{each}.__init__")}
        graph[name] = (candidates & names.keys()) - {name}
    return graph


def circles_in(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the sets of files of which each imports all others, by some way."""
    reached = {name: set(others) for name, others in graph.items()}
    for via in graph:
        for name in graph:
            if via in reached[name]:
                reached[name] |= reached[via]
    found = [{name, *(other for other in reached[name] if name in reached[other])} for name in graph]
    return [circle for index, circle in enumerate(found) if len(circle) > 1 and circle not in found[:index]]


def test_files_import_each_other_in_no_circle() -> None:
    assert circles_in(imported_files()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert circles_in(graph) == [{"b", "c"}]
    assert {"worker.request", "core.model"} <= imported_files()["worker.pipeline"]


def test_what_pool_processes_use_has_no_lock_that_a_fork_may_find_held() -> None:
    """Until Python 3.12 a ``cached_property`` has one lock for all objects of its class.

    A process that was forked while another thread computed one waits for ever for the next. A worker's requests live in
    its main thread, which is the one that forks.
    """
    users = [path.relative_to(ROOT / PACKAGE) for path in modules() if "@cached_property" in path.read_text()]
    assert [path for path in users if path.parts[0] != "worker"] == []


def test_the_public_surface_is_small() -> None:
    public = getattr(importlib.import_module(PACKAGE), "__all__", [])
    assert len(public) <= 20
    assert len(set(public)) == len(public)
    for name in public:
        assert hasattr(importlib.import_module(PACKAGE), name)
