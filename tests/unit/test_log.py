"""Log lines by the thousand: some pass, the others are counted."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import resilient_tasks
from resilient_tasks.monitor.events import Throttle, about
from tests.support.doubles import ManualClock


def test_so_many_lines_of_a_kind_pass_in_an_interval_and_the_others_are_counted() -> None:
    clock = ManualClock()
    throttle = Throttle(2, 10.0, clock)
    assert [throttle.admits("a") for _ in range(5)] == [True, True, False, False, False]
    assert throttle.admits("b")
    assert throttle.take_suppressed() == {}
    clock.advance(10.0)
    assert throttle.take_suppressed() == {"a": 3}
    assert throttle.admits("a")


def test_what_is_counted_can_be_asked_for_before_the_interval_is_over() -> None:
    throttle = Throttle(1, 10.0, ManualClock())
    assert [throttle.admits("a"), throttle.admits("a")] == [True, False]
    assert throttle.take_suppressed(early=True) == {"a": 1}
    assert throttle.take_suppressed(early=True) == {}


def test_a_line_about_a_task_says_which() -> None:
    assert about("17", "shop.charge", "payments") == {"task_id": "17", "task": "shop.charge", "breaker": "payments"}
    assert about("17", "shop.charge") == {"task_id": "17", "task": "shop.charge"}


def functions() -> Iterator[ast.FunctionDef]:
    """Yield all functions of the package."""
    for path in Path(resilient_tasks.__file__).parent.rglob("*.py"):
        yield from (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def test_every_function_that_logs_about_a_task_gives_machines_its_fields() -> None:
    found = 0
    for function in functions():
        inside = list(ast.walk(function))
        if any(isinstance(node, ast.Constant) and "ask %s" in str(node.value) for node in inside):
            found += 1
            logs = [
                node for node in inside if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("logger.")
            ]
            assert logs
            assert all("extra" in {keyword.arg for keyword in log.keywords} for log in logs), function.name
    assert found > 10
