"""``TaskOptions``: the resilience options of one task, read and checked when Celery binds it to an app."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import tenacity

from resilient_tasks.breaker import Breaker
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.fallback import FallbackChain, as_chain
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.worker.task_key import ALLOWED_KEYS, TaskKey, is_task_key

LATEST = "latest"
DEFER: Final = "defer"
FAIL: Final = "fail"
RAISE: Final = "raise"
_LONGEST = 100 * 365 * 24 * 3600.0  # seconds; what is meant to be longer is None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _LONGEST


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """Options of a task that names a breaker; see the README's table.

    Args:
        breakers: names of the breakers; all must admit.
        fallback: what may answer instead.
        on_open: ``"defer"`` or ``"fail"``, when the breaker refuses and no fallback answers.
        on_failure: ``"defer"`` or ``"raise"``, when the task itself fails through the dependency.
        max_attempts: dependency failures of one task before it fails for good.
        defer_for: longest time in deferral, seconds; None: no bound.
        retrying: quick attempts inside one run; None: one attempt.
        coalesce: ``"latest"``: of its deferred calls with one key only the latest runs; None: all run.
        coalesce_key: what tells its calls apart; None: all arguments.
        breaker_key: which child of the first breaker answers for a call; None: that breaker itself.
    """

    breakers: tuple[str, ...]
    fallback: FallbackChain
    on_open: str = DEFER
    on_failure: str = DEFER
    max_attempts: int = 8
    defer_for: float | None = None
    retrying: tenacity.Retrying | None = None
    coalesce: str | None = None
    coalesce_key: TaskKey | None = None
    breaker_key: TaskKey | None = None

    @classmethod
    def of(cls, task: Any, name: str) -> TaskOptions:
        """Read the options of a task class.

        Args:
            task: the class.
            name: of the task, which a class may leave to Celery.

        Raises:
            ConfigurationError: an option is unknown or out of range; names task, option and what is allowed.
        """
        return cls(
            breakers=_breaker_names(task, name),
            breaker_key=_option(
                name, "breaker_key", task.breaker_key,
                lambda v: v is None or is_task_key(v, task.run), f"{ALLOWED_KEYS}, or None",
            ),
            fallback=as_chain(task.fallback, name, task.run),
            on_open=_option(name, "on_open", task.on_open, lambda v: v in (DEFER, FAIL), "'defer' or 'fail'"),
            on_failure=_option(
                name, "on_failure",
                _default_on_failure(task) if task.on_dependency_failure is None else task.on_dependency_failure,
                lambda v: v in (DEFER, RAISE), "'defer' or 'raise'",
            ),
            max_attempts=_option(name, "max_attempts", task.max_attempts, _is_count, "an integer of 1 or more"),
            defer_for=_option(
                name, "defer_for", task.defer_for,
                lambda v: v is None or _is_seconds(v), "a positive number of seconds or None",
            ),
            retrying=_option(
                name, "retrying", task.retrying,
                lambda v: v is None or isinstance(v, tenacity.Retrying), "a tenacity.Retrying or None",
            ),
            coalesce=_option(name, "coalesce", task.coalesce, lambda v: v in (None, LATEST), "'latest' or None"),
            coalesce_key=_coalesce_key(task, name),
        )  # fmt: skip

    def delay(self, policy: BreakerPolicy, attempts: int) -> float:
        """Seconds a task waits after its ``attempts``-th counted failure (the first, if none has counted)."""
        growth = min(float(attempts or 1) - 1, 64.0)
        return min(policy.open_duration * float(policy.open_multiplier**growth), policy.max_open_duration)


def options_of(task: Any) -> TaskOptions | None:
    """Return the options of a guarded task; None of any other, whatever attributes it has."""
    options = getattr(task, "options", None)
    return options if isinstance(options, TaskOptions) else None


def _option(task: str, name: str, value: Any, accepts: Callable[[Any], bool], allowed: str) -> Any:
    if not accepts(value):
        raise ConfigurationError(f"task {task!r}: {name}={value!r}: allowed is {allowed}")
    return value


def _coalesce_key(task: Any, name: str) -> TaskKey | None:
    key: TaskKey | None = task.coalesce_key
    if key is not None and task.coalesce is None:
        raise ConfigurationError(f"task {name!r}: coalesce_key={key!r}: allowed with coalesce='latest' only")
    _option(name, "coalesce_key", key, lambda v: v is None or is_task_key(v, task.run), f"{ALLOWED_KEYS}, or None")
    return key


def _default_on_failure(task: Any) -> str:
    return DEFER if task.on_open == DEFER else RAISE


def _breaker_names(task: Any, name: str) -> tuple[str, ...]:
    given = task.breaker if isinstance(task.breaker, (list, tuple)) else (task.breaker,)
    names = tuple(breaker.name if isinstance(breaker, Breaker) else breaker for breaker in given)
    valid = bool(names) and all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
    _option(
        name, "breaker", task.breaker, lambda _: valid, "a Breaker, the name of one, or a list of such, each different"
    )
    return names
