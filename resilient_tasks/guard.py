"""Guarding calls: as a ``with`` block, as a function that is called, as a decorator, and for several breakers at once.

No lock is held while the user's code runs, and the exception that it raises always reaches the caller.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterable, Sequence
from time import perf_counter
from types import CoroutineType, TracebackType
from typing import Any, TypeVar, cast

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.guarded import NO_VALUE, Guarded, Pass

# ruff: noqa: SLF001  these are the ways to use Guarded, which keeps them from its users

_F = TypeVar("_F", bound=Callable[..., Any])


class Guard:
    """One guarded call as a context manager; ``Breaker.guard()`` makes it. Not to be nested in itself."""

    __slots__ = ("_admitted", "_breaker", "_epoch", "_is_plain", "_started", "_value")

    def __init__(self, breaker: Guarded) -> None:
        self._breaker = breaker
        self._value: object = NO_VALUE

    def __enter__(self) -> None:
        if not self._enters_freely():
            self._begin(self._breaker._admit())

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_plain and exc is None:
            self._breaker._count_success(self._epoch)
        else:
            self._breaker._wait(self._finish(exc))

    async def __aenter__(self) -> None:
        if not self._enters_freely():
            breaker = self._breaker
            admitted = breaker._admit_by_view() if breaker._is_current() else None
            self._begin(admitted or await self._admit_in_thread())

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._is_plain and exc is None:
            self._breaker._count_success(self._epoch)
        else:
            await self._breaker._wait_async(self._finish(exc))

    async def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Await the guarded call itself, so that its value can be judged."""
        async with self:
            self._value = await coroutine
        return self._value

    async def _admit_in_thread(self) -> Pass:
        """Ask the store without blocking the event loop."""
        handing_over = _HandingOver(self._breaker)
        asking = asyncio.ensure_future(asyncio.to_thread(handing_over.admit))
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            handing_over.give_up()
            asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # nobody else looks at it
            raise

    def _enters_freely(self) -> bool:
        """Admit a call that needs neither I/O nor a permit nor a clock; False: that is not enough."""
        breaker = self._breaker
        standing = breaker._standing
        self._epoch = standing.epoch
        self._is_plain = standing.admits_plainly and not breaker._examines and not breaker._view.is_behind
        return self._is_plain

    def _begin(self, admitted: Pass) -> None:
        self._admitted = admitted
        self._started = perf_counter()

    def _finish(self, exc: BaseException | None) -> int:
        breaker, admitted = self._breaker, Pass(self._epoch) if self._is_plain else self._admitted
        if exc is not None:
            return breaker._failed(admitted, exc)
        return breaker._succeeded(admitted, perf_counter() - self._started, self._value)


class _HandingOver:
    """An admission on its way from a thread to a coroutine, which may be cancelled, or its loop closed, meanwhile."""

    def __init__(self, breaker: Guarded) -> None:
        self._breaker = breaker
        self._lock = threading.Lock()
        self._admitted: Pass | None = None
        self._is_unwanted = False

    def admit(self) -> Pass:
        """Ask for admission, in the thread."""
        admitted = self._breaker._admit()
        with self._lock:
            self._admitted = admitted
        if self._is_unwanted:
            self._give_back()
        return admitted

    def give_up(self) -> None:
        """Have a permit or a slot freed, whether it has come already or not."""
        self._is_unwanted = True
        self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            admitted, self._admitted = self._admitted, None
        if admitted is not None:
            self._breaker._finished(admitted, Verdict(Outcome.IGNORED))


class Guarding(Guarded):
    """The part of a ``Breaker`` by which users guard their calls."""

    def guard(self) -> Guard:
        """Return a context manager for one guarded call, for ``with`` and ``async with``.

        Entering it raises :class:`BreakerOpenError` when the breaker refuses; the body does not run then.
        """
        return Guard(self)

    def call(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call ``fn`` under guard and return what it returns; for a coroutine function something to await.

        Raises:
            BreakerOpenError: the breaker refuses; ``fn`` does not run.
        """
        standing = self._standing
        if not standing.admits_plainly or self._examines or self._view.is_behind:
            return self._call_with_care(fn, args, kwargs)
        epoch = standing.epoch
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            self._wait(self._failed(Pass(epoch), exc))
            raise
        if type(result) is CoroutineType:
            return self._await(result)
        self._count_success(epoch)
        return result

    def _call_with_care(self, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if inspect.iscoroutinefunction(fn):
            return self._await(fn(*args, **kwargs))
        admitted = self._admit()
        started = perf_counter()
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            self._wait(self._failed(admitted, exc))
            raise
        if type(result) is CoroutineType:  # nothing has happened yet: it is admitted when it is awaited
            self._wait(self._finished(admitted, Verdict(Outcome.IGNORED)))
            return self._await(result)
        self._wait(self._succeeded(admitted, perf_counter() - started, result))
        return result

    async def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return await self.guard().wait_for(coroutine)
        finally:
            coroutine.close()  # it has not even begun if the breaker refused

    def __call__(self, fn: _F) -> _F:
        """Decorate a function or a coroutine function: each call of it is a guarded call.

        Raises:
            ConfigurationError: ``fn`` is a generator function; its body would run outside the guard.
        """
        if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
            raise ConfigurationError(f"breaker {self.name!r} cannot guard the generator {fn!r}: use guard() inside it")
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await self._await(fn(*args, **kwargs))

            return cast("_F", guarded_coroutine)

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self.call(fn, *args, **kwargs)

        return cast("_F", guarded)


def call_guarded(breakers: Sequence[Guarded], fn: Callable[[], Any]) -> Any:
    """Call ``fn`` under guard of several breakers and return what it returns; its outcome counts for each of them.

    Raises:
        BreakerOpenError: one of them refuses; ``fn`` does not run, and permits of the others are given back.
    """
    passes: list[Pass] = []
    try:
        for breaker in breakers:
            passes.append(breaker._admit())  # noqa: PERF401 - what was admitted before a refusal must be known
        started = perf_counter()
        value = fn()
    except BaseException as exc:
        _finish_all(zip(breakers, passes, strict=False), [breaker.judge(exc) for breaker in breakers])
        raise
    seconds = perf_counter() - started
    _finish_all(zip(breakers, passes, strict=True), [breaker.judge_success(seconds, value) for breaker in breakers])
    return value


def _finish_all(admitted: Iterable[tuple[Guarded, Pass]], verdicts: Sequence[Verdict]) -> None:
    tickets = [(breaker, breaker._finished(own, verdict)) for (breaker, own), verdict in zip(admitted, verdicts)]  # noqa: B905 - those that refused have no pass
    for breaker, ticket in tickets:
        breaker._wait(ticket)
