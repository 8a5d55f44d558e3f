"""``TaskOptions``, and what is wrong with the way in which tasks are defined and sent, or may be a mistake.

The options are read and checked when Celery binds a task to an app.

A task that names a breaker and is not guarded is an error, wherever it is used first. What only looks like a mistake,
a misspelt option for example, is a warning of workers at their start and of the doctor.
"""

from __future__ import annotations

import dis
import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from types import CodeType
from typing import Annotated, Any, Final, Literal, NamedTuple

import tenacity
from celery import Celery, Task
from pydantic import Field, InstanceOf

from resilient_tasks.breaker import Breaker
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.fallback import ALLOWED_KEYS, FallbackChain, TaskKey, as_chain, is_task_key
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.settings import PREFIX
from resilient_tasks.validation import Count, check_fields

logger = logging.getLogger("resilient_tasks")

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
    fallback: InstanceOf[FallbackChain] | None
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


#: What a task may be given beside Celery's own options.
OPTIONS = frozenset({"breaker", *TaskOptions.__dataclass_fields__} - {"breakers"})


def check_guarded(task: Any, app: Any) -> None:
    """Raise ConfigurationError if a task names a breaker and is not guarded; it says what to write."""
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
    """Return the option of ours that a name is, or is a misspelling of; None for any other name."""
    if name in OPTIONS:
        return name
    near = get_close_matches(name, OPTIONS, n=1, cutoff=0.8)
    return near[0] if near and not hasattr(Task, name) else None


def check_sent(task: Any, name: str, app: Any, options: Mapping[str, Any]) -> None:
    """Refuse options of ours with which a task is sent, for they would travel as properties without any effect."""
    check_guarded(task, app)
    for given in options:
        on_open = meant_option(given) == "on_open"
        if (on_open or given in OPTIONS) and given not in (options.get("stamped_headers") or ()):
            taken = "on_open='fail' or 'fallback' is for apply_async of a task with breaker="
            why = taken if on_open else "it belongs to the definition of the task"
            raise ConfigurationError(f"task {name!r} is sent with {given}={options[given]!r:.100}: {why}")


class Doubt(NamedTuple):
    """What may be a mistake, why it matters, and what to write instead."""

    what: str
    why: str
    advice: str


_RETRIES = Doubt(
    "breaker= beside autoretry_for or self.retry",
    "until the breaker opens, each failure uses up one of max_retries and is one more call of a service that is down;"
    " the task fails when none is left",
    "leave them out: what fails through its dependency is deferred, up to max_attempts times; for quick attempts within"
    " one run use retrying=; to leave failures to Celery all the same, say on_failure='raise'",
)


def doubts(app: Celery, unknown_overrides: Iterable[str] = ()) -> Iterator[Doubt]:
    """Yield what may be a mistake in the definitions of an app's tasks, or in settings of breakers."""
    tasks = [app.tasks[name] for name in sorted(app.tasks) if not name.startswith("celery.")]
    retrying = [task.name for task in tasks if retries_itself(task)]
    if retrying:
        yield _RETRIES._replace(what=f"{', '.join(retrying)}: {_RETRIES.what}")
    for task in tasks:
        given = _given(task, app)
        unused = sorted(OPTIONS.intersection(given)) if getattr(task, "breaker", None) is None else ()
        if unused:
            what = f"{task.name}: {', '.join(f'{name}=' for name in unused)} without breaker="
            yield Doubt(what, "it has no effect, the task is not guarded", "add breaker=")
        for name, meant in _misspelt(task, given):
            yield Doubt(f"{task.name}: {name}= is no option", "it has no effect", f"did you mean {meant}=?")
    for name in unknown_overrides:
        what = f"settings override breaker {name}, which is not defined"
        yield Doubt(what, "they have no effect", f"correct the name in {PREFIX}BREAKERS__, or define the breaker")


def _given(task: Any, app: Celery) -> dict[str, Any]:
    """Return the attributes that were given to one task, not to a base class or by annotations to all tasks."""
    annotations = app.conf.task_annotations or ()
    annotations = annotations if isinstance(annotations, (list, tuple)) else [annotations]
    of_all = {name for each in annotations if isinstance(each, dict) for name in each.get("*", ())}
    own = vars(type(task))
    given = {name: value for name, value in own.items() if value is not None and name not in of_all}
    handler = given.pop("on_failure", None)
    if "on_dependency_failure" in given or (handler is not None and not callable(handler)):
        given["on_failure"] = handler
    return given


def _misspelt(task: Any, given: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the attributes that look like options of ours: not inherited, not methods, and not used by the task."""
    cls = type(task)
    for name, value in given.items():
        meant = "breaker" if isinstance(value, Breaker) else meant_option(name)
        if meant in (None, name):
            continue
        is_method = getattr(value, "__qualname__", "").startswith(f"{cls.__qualname__}.")
        is_inherited = any(name in vars(base) for base in cls.__mro__[1:])
        if not is_method and not is_inherited and name not in _names_used(cls):
            yield name, str(meant)


def retries_itself(task: Any) -> bool:
    """Whether a guarded task, or its class, is retried by Celery as well, as far as its definition shows."""
    options = options_of(task)
    if options is None or options.on_failure != DEFER:
        return False
    if getattr(task, "autoretry_for", None):
        return True
    cls: Any = task if isinstance(task, type) else type(task)
    run = _function(cls.run)
    own = {"self", "current_task", run.__name__, *run.__code__.co_varnames[:1]} if run else set()
    return run is not None and any(_calls_retry(code, own) for code in _codes(run.__code__))


@lru_cache(maxsize=1024)
def warn_of_retry(cls: Any) -> None:
    """Warn once, at the first retry of a guarded task, if its definition has not shown that it retries itself."""
    if cls.options.on_failure == DEFER and not retries_itself(cls):
        logger.warning("%s: %s: %s; %s", cls.name, *_RETRIES)


def _calls_retry(code: CodeType, own: set[str]) -> bool:
    """Whether code takes ``retry`` of a name by which a task knows itself."""
    before: Any = None
    for step in dis.get_instructions(code):
        if step.argval == "retry" and step.opname in ("LOAD_ATTR", "LOAD_METHOD") and own.intersection(before):
            return True
        before = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return False


def _names_used(cls: type) -> set[str]:
    functions = filter(None, map(_function, vars(cls).values()))
    return {name for run in functions for code in _codes(run.__code__) for name in code.co_names}


def _codes(code: CodeType) -> Iterable[CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _codes(inner)


def _function(value: Any) -> Any:
    """Return the Python function behind an attribute of a class; None if there is none."""
    function = inspect.unwrap(getattr(value, "__func__", value)) if callable(value) else None
    return function if inspect.isfunction(function) else None
