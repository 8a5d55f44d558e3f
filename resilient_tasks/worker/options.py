"""``TaskOptions``: the resilience options of one task, read and checked when Celery binds it to an app."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

import tenacity
from celery import Task

from resilient_tasks.breaker import Breaker
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.fallback import FallbackChain, as_chain
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.worker.task_key import ALLOWED_KEYS, TaskKey, is_task_key

LATEST = "latest"
DEFER, FAIL, RAISE = "defer", "fail", "raise"
_LONGEST = 100 * 365 * 24 * 3600.0  # seconds; what is meant to be longer is None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= _LONGEST


#: What a task may be given beside Celery's own options.
OPTIONS = frozenset(
    {
        "breaker", "breaker_key", "fallback", "on_open", "on_failure", "max_attempts", "defer_for", "retrying",
        "coalesce", "coalesce_key",
    }
)  # fmt: skip


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


def check_guarded(task: Any, app: Any) -> None:
    """Find out whether a task that names a breaker is guarded.

    Raises:
        ConfigurationError: it is not; the message names task, breaker and base class, and says what to write.
    """
    breaker = getattr(task, "breaker", None)
    if breaker is None or options_of(task) is not None:
        return
    bases = [base for base in type(task).__mro__[1:] if base is not app.Task and base.__dict__.get("_app") is None]
    base, others = bases[0], [each.__name__ for each in bases[0].__bases__ if each.__name__ != "Task"]
    what = f"its base {base.__name__} is no ResilientTask"
    if any(hasattr(each, "own_call") for each in bases):
        type(task).bind(app)  # reads its options again: the class has been changed, or they were refused
        if options_of(task) is not None:
            return
        what, advice = "in an attribute of the instance", "give it in the decorator, the class or task_annotations"
    elif base.__module__.startswith("celery."):
        advice = "leave base= out, and call Resilience(app) before the app's tasks are used"
    else:
        written = f"class {base.__name__}({', '.join(['ResilientTask', *others])})"
        advice = f"derive it from resilient_tasks.ResilientTask: {written}"
    raise ConfigurationError(
        f"task {task.name!r} names breaker {getattr(breaker, 'name', breaker)!r} but {what}: {advice}"
    )


@lru_cache(maxsize=1024)
def meant_option(name: str) -> str | None:
    """Return the option of ours that a name is, or that somebody has misspelt; None for any other name."""
    if name in OPTIONS:
        return name
    near = get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
    return near[0] if near and not hasattr(Task, name) else None


def check_sent(task: Any, name: str, app: Any, options: Mapping[str, Any]) -> None:
    """Refuse options of ours with which a task is sent, for they would travel as properties without any effect.

    Raises:
        ConfigurationError: one is among them, ``on_open`` also misspelt; or the task is not guarded and should be.
    """
    check_guarded(task, app)
    for given in options:
        on_open = meant_option(given) == "on_open"
        if (on_open or given in OPTIONS) and given not in (options.get("stamped_headers") or ()):
            taken = "on_open='fail' or 'fallback' is for apply_async of a task with breaker="
            why = taken if on_open else "it belongs to the definition of the task"
            raise ConfigurationError(f"task {name!r} is sent with {given}={options[given]!r:.100}: {why}")


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
