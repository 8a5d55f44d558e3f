"""The snippets of docs/health-checks.md run as printed, and its tables forget nothing."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from resilient_tasks import checks
from resilient_tasks.breaker import ProbeOptions
from resilient_tasks.checks import run_check
from resilient_tasks.testing import in_memory

PAGE = (Path(__file__).parents[2] / "docs" / "health-checks.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
FIRST_CELLS = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", PAGE, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "health_checks"}
    for snippet in SNIPPETS:
        exec(snippet, namespace)
    return namespace


@pytest.mark.parametrize(
    ("breaker", "check", "when"),
    [
        ("payments", "http_check('https://pay.example/health')", "always"),
        ("database", "all_of(tcp_check('db.example', 5432), command_check(['pg_isready', ...]))", "while open"),
        ("ledger", "grpc_check('ledger.example:50051', 'shop.Ledger')", "while open"),
        ("search", "any_of(consul_check('search'), http_check('https://search.example/ping'))", "while open"),
        ("importer", "heartbeat(ttl=30)", "always"),
        ("rates", "http_check('https://rates.example/health')", "always"),
    ],
)
def test_every_example_registers_its_probe(namespace: dict[str, Any], breaker: str, check: str, when: str) -> None:
    probe = namespace[breaker]._dependency.probe
    assert (repr(probe.function), probe.active) == (check, when == "always")


def test_a_function_of_ones_own(namespace: dict[str, Any]) -> None:
    probe = namespace["mail"]._dependency.probe
    assert (probe.function, probe.timeout, probe.interval) == (namespace["greeting"], 3, 15)
    run_check(probe.function)


def test_a_heartbeat_is_heard(namespace: dict[str, Any]) -> None:
    with in_memory(namespace["resilience"]) as clock:
        namespace["after_each_batch"]()
        clock.advance(7)
        assert namespace["resilience"].fleet.store.get("heartbeat", "importer") == (b"", 7)


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    shown = ", ".join(str(one.replace(annotation=one.empty)) for one in parameters)
    return f"{function.__name__}({shown})".replace("'", '"')


def test_the_catalogue_is_complete() -> None:
    functions = [getattr(checks, name) for name in checks.__all__]
    written = {cell.strip("`") for cells in FIRST_CELLS for cell in cells.split("`, `")}
    assert {signature(one) for one in functions if inspect.isfunction(one)} <= written


def test_the_arguments_of_a_probe_are_complete() -> None:
    arguments = set(ProbeOptions.__annotations__)
    assert {f"`{argument}`" for argument in arguments} <= set(FIRST_CELLS)
