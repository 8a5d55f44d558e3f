from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, Literal, ParamSpec, overload

import tenacity
from celery.result import AsyncResult
from typing_extensions import TypeVar

from resilient_tasks.breaker import Breaker
from resilient_tasks.fallback import TaskKey
from resilient_tasks.worker.task import ResilientTask

__all__ = ["GuardedTask", "shared_task"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_Bind = TypeVar("_Bind", Literal[True], Literal[False], default=Literal[False])

class GuardedTask(ResilientTask, Generic[_P, _R]):
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...
    def delay(self, *args: _P.args, **kwargs: _P.kwargs) -> AsyncResult[_R]: ...

class _Decorator(Generic[_Bind]):
    @overload
    def __call__(self: _Decorator[Literal[True]], fn: Callable[Concatenate[Any, _P], _R], /) -> GuardedTask[_P, _R]: ...
    @overload
    def __call__(self: _Decorator[Literal[False]], fn: Callable[_P, _R], /) -> GuardedTask[_P, _R]: ...

@overload
def shared_task(fun: Callable[_P, _R], /) -> GuardedTask[_P, _R]: ...
@overload
def shared_task(
    *,
    bind: _Bind = ...,
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
) -> _Decorator[_Bind]: ...
