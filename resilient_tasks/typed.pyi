from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, overload

import tenacity
from celery.result import AsyncResult

from resilient_tasks.breaker import Breaker
from resilient_tasks.fallback import TaskKey
from resilient_tasks.worker.task import ResilientTask

__all__ = ["GuardedTask", "shared_task"]

_P = ParamSpec("_P")
_R = TypeVar("_R")

class GuardedTask(ResilientTask, Generic[_P, _R]):
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...
    def delay(self, *args: _P.args, **kwargs: _P.kwargs) -> AsyncResult[_R]: ...

@overload
def shared_task(fun: Callable[_P, _R], /) -> GuardedTask[_P, _R]: ...
@overload
def shared_task(
    *,
    bind: Literal[True],
    breaker: Breaker | str | Sequence[Breaker | str] | None = ...,
    breaker_key: TaskKey | None = ...,
    fallback: Any = ...,
    on_open: Literal["defer", "fail"] = ...,
    on_failure: Literal["defer", "raise"] | Callable[..., Any] | None = ...,
    max_attempts: int = ...,
    defer_for: float | None = ...,
    retrying: tenacity.Retrying | None = ...,
    coalesce: Literal["latest"] | None = ...,
    coalesce_key: TaskKey | None = ...,
    **options: Any,
) -> Callable[[Callable[Concatenate[Any, _P], _R]], GuardedTask[_P, _R]]: ...
@overload
def shared_task(
    *,
    bind: Literal[False] = ...,
    breaker: Breaker | str | Sequence[Breaker | str] | None = ...,
    breaker_key: TaskKey | None = ...,
    fallback: Any = ...,
    on_open: Literal["defer", "fail"] = ...,
    on_failure: Literal["defer", "raise"] | Callable[..., Any] | None = ...,
    max_attempts: int = ...,
    defer_for: float | None = ...,
    retrying: tenacity.Retrying | None = ...,
    coalesce: Literal["latest"] | None = ...,
    coalesce_key: TaskKey | None = ...,
    **options: Any,
) -> Callable[[Callable[_P, _R]], GuardedTask[_P, _R]]: ...
