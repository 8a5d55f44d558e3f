"""``all_of`` and ``any_of``: several checks side by side, under one time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextvars import copy_context
from queue import Empty, SimpleQueue
from typing import Any

from resilient_tasks.checks.base import HealthCheckError, run_check, time_left
from resilient_tasks.errors import ConfigurationError

#: Runs of each member that may hang at a time; beyond that no more are started.
MOST_HANGING = 10


class Combined:
    """Several checks as one.

    Args:
        name: of the function that made it.
        functions: checks of this package or a user's own, coroutine functions too.

    Raises:
        ConfigurationError: there are no functions, or one cannot be called.
    """

    def __init__(self, name: str, functions: tuple[Callable[[], Any], ...]) -> None:
        for function in functions or (None,):
            if not callable(function):
                raise ConfigurationError(f"{name}({function!r}): allowed are one or more checks or functions")
        self._name = name
        self._functions = functions
        self._threads: list[threading.Thread] = []

    def __repr__(self) -> str:
        names = (getattr(function, "__qualname__", repr(function)) for function in self._functions)
        return f"{self._name}({', '.join(names)})"

    def __call__(self) -> None:
        """Return if the dependency is well.

        Raises:
            HealthCheckError: it is not.
        """
        raise NotImplementedError

    def _answers(self) -> Iterator[HealthCheckError | None]:
        """Run all side by side; yield what each has found, None for success, as they end."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if len(self._threads) >= MOST_HANGING * len(self._functions):
            raise HealthCheckError(f"{self}: {len(self._threads)} earlier checks hang")
        answers: SimpleQueue[HealthCheckError | None] = SimpleQueue()
        for function in self._functions:
            arguments = (_answer, function, answers)
            thread = threading.Thread(target=copy_context().run, args=arguments, name=f"{function}", daemon=True)
            self._threads.append(thread)
            thread.start()
        for _ in self._functions:
            yield self._next(answers)

    def _next(self, answers: SimpleQueue[HealthCheckError | None]) -> HealthCheckError | None:
        try:
            return answers.get(timeout=time_left())
        except Empty:
            return HealthCheckError(f"{self}: no answer in time")


class AllOf(Combined):
    """Succeeds if all do; the first failure decides."""

    def __call__(self) -> None:
        """Raise the first failure, if there is one."""
        for failure in self._answers():
            if failure is not None:
                raise failure


class AnyOf(Combined):
    """Succeeds if one does; the first success decides."""

    def __call__(self) -> None:
        """Raise all failures as one, unless there is a success."""
        failures = []
        for failure in self._answers():
            if failure is None:
                return
            failures.append(str(failure))
        raise HealthCheckError("; ".join(failures))


def all_of(*checks: Callable[[], Any]) -> AllOf:
    """Run several checks side by side; the dependency is well if all succeed. The first failure decides.

    Args:
        checks: checks of this package or functions of one's own, coroutine functions too.

    Raises:
        ConfigurationError: there are none, or one cannot be called.
    """
    return AllOf("all_of", checks)


def any_of(*checks: Callable[[], Any]) -> AnyOf:
    """Run several checks side by side; the dependency is well if one succeeds. The first success decides.

    Args:
        checks: checks of this package or functions of one's own, coroutine functions too.

    Raises:
        ConfigurationError: there are none, or one cannot be called.
    """
    return AnyOf("any_of", checks)


def _answer(function: Callable[[], Any], answers: SimpleQueue[HealthCheckError | None]) -> None:
    try:
        run_check(function)
    except HealthCheckError as error:
        answers.put(error)
    except BaseException as error:  # noqa: BLE001 - a check that raises anything has failed
        answers.put(HealthCheckError(f"{getattr(function, '__qualname__', function)}: {type(error).__name__}"))
    else:
        answers.put(None)
