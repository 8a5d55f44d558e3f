"""``TaskOptions``: the resilience options of one task, read and checked when Celery binds it to an app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import tenacity
from pydantic import Field, InstanceOf

from resilient_tasks.breaker import Breaker
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.fallback import ALLOWED_KEYS, FallbackChain, TaskKey, as_chain, is_task_key
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.validation import Count, check_fields

DEFER: Final = "defer"
FAIL: Final = "fail"
RAISE: Final = "raise"
_AS_GIVEN = ("on_open", "max_attempts", "defer_for", "retrying", "coalesce", "coalesce_key", "breaker_key")
_LONGEST = 100 * 365 * 24 * 3600.0  # seconds; what is meant to be longer is None


_DeferFor = Annotated[float, Field(gt=0, le=_LONGEST, description="a positive number of seconds")]
_Retrying = Annotated[InstanceOf[tenacity.Retrying], Field(description="a tenacity.Retrying")]


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of a task that names a breaker; the README's table explains them."""

    breakers: tuple[str, ...]
    fallback: InstanceOf[FallbackChain]
    on_open: Literal["defer", "fail"] = DEFER
    on_failure: Literal["defer", "raise"] = DEFER
    max_attempts: Count = 8
    defer_for: _DeferFor | None = None
    retrying: _Retrying | None = None
    coalesce: Literal["latest"] | None = None
    coalesce_key: TaskKey | None = None
    breaker_key: TaskKey | None = None

    @classmethod
    def of(cls, task: Any, name: str) -> TaskOptions:
        """Read the options of a task class; raise ConfigurationError if one is not allowed."""
        for option in ("breaker_key", "coalesce_key"):
            key = getattr(task, option)
            if key is not None and not is_task_key(key, task.run):
                raise ConfigurationError(f"task {name!r}: {option}={key!r}: allowed is {ALLOWED_KEYS}, or None")
        if task.coalesce_key is not None and task.coalesce is None:
            key = f"coalesce_key={task.coalesce_key!r}"
            raise ConfigurationError(f"task {name!r}: {key}: allowed with coalesce='latest' only")
        by_default: Literal["defer", "raise"] = DEFER if task.on_open == DEFER else RAISE
        options = cls(
            breakers=_breaker_names(task, name),
            fallback=as_chain(task.fallback, name, task.run),
            on_failure=by_default if task.on_dependency_failure is None else task.on_dependency_failure,
            **{option: getattr(task, option) for option in _AS_GIVEN},
        )
        check_fields(options, f"task {name!r}: ")
        return options

    def delay(self, policy: BreakerPolicy, attempts: int) -> float:
        """Seconds a task waits after its ``attempts``-th counted failure (the first, if none has counted)."""
        growth = min(float(attempts or 1) - 1, 64.0)
        return min(policy.open_duration * float(policy.open_multiplier**growth), policy.max_open_duration)


def options_of(task: Any) -> TaskOptions | None:
    """Return the options of a guarded task; None of any other, whatever attributes it has."""
    options = getattr(task, "options", None)
    return options if isinstance(options, TaskOptions) else None


def _breaker_names(task: Any, name: str) -> tuple[str, ...]:
    given = task.breaker if isinstance(task.breaker, (list, tuple)) else (task.breaker,)
    names = tuple(breaker.name if isinstance(breaker, Breaker) else breaker for breaker in given)
    if not names or not all(isinstance(each, str) for each in names) or len(set(names)) < len(names):
        allowed = "a Breaker, the name of one, or a list of such, each different"
        raise ConfigurationError(f"task {name!r}: breaker={task.breaker!r}: allowed is {allowed}")
    return names
