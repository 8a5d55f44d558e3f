"""What is around a guard: a call in progress, whose permits and slots guards inside it share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from resilient_tasks.core.classification import Verdict


class Pass(NamedTuple):
    """What one breaker has granted to one call."""

    breaker: str
    epoch: int = 0  # at that moment; the outcome is reported for this epoch
    trial: bool = False  # the call holds a permit, or is part of a call that does
    counts: bool = False  # a dependency failure of this run that is attributed to the breaker counts as an attempt
    leased: bool = False  # the call itself holds a permit, or one of a limited number of slots
    for_child: bool = False  # it is the pass of a parent, for a call that counts for a child: only a trial counts
    watched: bool = False  # the call is reported when it is overdue; guards of the same breaker inside it need not be


class Scope:
    """A call in progress, as guards inside it see it; ``task_id`` is that of the task whose run it is, or ""."""

    __slots__ = ("has_ended", "outer", "passes", "task_id")

    outer: Scope | None
    passes: Mapping[str, Pass]  # by breaker

    def __init__(self, passes: Iterable[Pass] = (), task_id: str = "") -> None:
        self.passes = {each.breaker: each for each in passes}
        self.task_id = task_id
        self.outer = None
        self.has_ended = False

    def found(self, breaker: str, verdict: Verdict) -> None:
        """Note the verdict of a guard inside the trial of ``breaker``."""

    def replaced(self, breaker: str) -> None:
        """Note that a guard inside has reported for ``breaker``: the call as a whole need not."""


current: ContextVar[Scope | None] = ContextVar("resilient_tasks_scope", default=None)
runs: list[Scope] = []  # of tasks, in this process


@contextmanager
def within(scope: Scope) -> Iterator[None]:
    """Make what the block calls part of ``scope``; if it is a task's run, threads without a context are, too."""
    token = current.set(scope)
    if scope.task_id:
        runs.append(scope)
    try:
        yield
    finally:
        scope.has_ended = True
        if scope.task_id:
            runs.remove(scope)
        current.reset(token)


def current_scope() -> Scope | None:
    """Return the innermost call in progress around this one."""
    return next(live(current.get()), None)


def live(scope: Scope | None) -> Iterator[Scope]:
    """Yield a scope and those around it that have not ended: a coroutine may outlive the call that has started it."""
    while scope is not None:
        if not scope.has_ended:
            yield scope
        scope = scope.outer


def shares(scope: Scope, breaker: str) -> bool:
    """Whether a call holds a permit or a slot, or is part of one that does."""
    held = scope.passes.get(breaker)
    return held is not None and (held.trial or held.leased)
