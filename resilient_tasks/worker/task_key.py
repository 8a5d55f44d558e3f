"""What tells the calls of one task apart: the options ``breaker_key`` and ``coalesce_key``.

A key is the name of one of the task's parameters, however that is passed, or a callable ``(args, kwargs) -> str``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilient_tasks.call import Call, parameter_names

TaskKey = str | Callable[[tuple[Any, ...], dict[str, Any]], str]

ALLOWED_KEYS = "the name of a parameter, or a callable (args, kwargs) -> str"


def is_task_key(key: Any, body: Callable[..., Any]) -> bool:
    """Whether ``key`` may be a key of the task with this body."""
    return callable(key) or (isinstance(key, str) and key in parameter_names(body))


def key_of(call: Call, key: TaskKey) -> str:
    """Return the key of one call.

    Raises:
        TypeError: the arguments do not fit the task, or the callable returned no text.
        Exception: whatever the user's callable raises.
    """
    found = found_by(key, call)
    if callable(key) and not isinstance(found, str):
        raise TypeError(f"the key of task {call.task_name!r} is {found!r}: allowed is a str")
    return str(found)


def found_by(key: TaskKey, call: Call) -> object:
    """Return what the callable returns, or the value of the parameter; raises likewise."""
    return key(tuple(call.args), dict(call.kwargs)) if callable(key) else call.arguments()[key]
