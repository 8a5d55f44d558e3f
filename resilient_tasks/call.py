"""``Call``: one call of a task, its parameters and its key.

The options ``breaker_key`` and ``coalesce_key`` are the name of one of the task's parameters, however it is passed, or
a callable ``(args, kwargs) -> str``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from resilient_tasks.monitor.log import about

TaskKey = str | Callable[[tuple[Any, ...], dict[str, Any]], str]

ALLOWED_KEYS = "the name of a parameter, or a callable (args, kwargs) -> str"


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a task: what a fallback answers for, or what succeeded and is worth remembering.

    Args:
        task_name: name of the task.
        body: the task's function, ``task.run``; its signature makes ``f(1)`` and ``f(a=1)`` one call.
        args: positional arguments, as the body gets them.
        kwargs: keyword arguments.
        task_id: id of the task, for the log; "" if it is called by hand.
    """

    task_name: str
    body: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    task_id: str = ""

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log line about it says for machines."""
        return about(self.task_id, self.task_name)

    def arguments(self) -> dict[str, Any]:
        """Return all arguments by parameter name, defaults included.

        Raises:
            TypeError: they do not fit the body's signature.
        """
        bound = _signature(self.body).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)


@lru_cache(maxsize=1024)
def _signature(body: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(body)


def parameter_names(body: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters by which a function can be told apart its calls."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in _signature(body).parameters.values() if parameter.kind not in variadic]


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
