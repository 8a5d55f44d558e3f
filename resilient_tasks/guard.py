"""Guarded calls: how one is admitted, what becomes of its outcome, and the ways to make one.

In CLOSED a guarded call costs no I/O: admission reads this process's cached state, the outcome goes to the reporter.
Only when the breaker is not CLOSED, or limits the calls in flight, does a call ask the store, for a permit or a slot.

A call is *plain* if it needs neither I/O nor a permit nor a clock and nothing is around it; of such a call nothing is
kept but its epoch. Any other is a ``_Call``. Guards inside a guarded call, a task's run or a probe know it as their
``Scope``: they share its permits and slots, and what they report replaces what it would have reported for the same
breaker. No lock is held while the user's code runs, and the exception that it raises always reaches the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import threading
import uuid
from asyncio import _get_running_loop  # the loop or None; get_running_loop() raises
from collections.abc import Callable, Coroutine, Generator, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, copy_context
from functools import partial
from time import perf_counter
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, TypeVar, cast

from resilient_tasks.core.classification import Verdict, attribute_to, attributed_to
from resilient_tasks.core.model import Outcome, parent_of, voter_of
from resilient_tasks.dependency import NO_VALUE, Admitted, Dependency, needs_no_report
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.background import Watch, overdue

REPORT_TIMEOUT = 0.25  # seconds a failed call may wait until its failure is counted, so that the next call sees it
TRIAL_TIMEOUT = 1.0  # seconds a trial may wait until it is settled, for the same reason
_POLL_INTERVAL = 0.001  # seconds between two looks of a coroutine at its report
_IGNORED, _OVERDUE = Verdict(Outcome.IGNORED), Verdict(Outcome.OVERDUE)
_FINISHED = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})  # types with nothing to await
_UNSTARTED = (
    GeneratorType, AsyncGeneratorType, contextlib._GeneratorContextManager, contextlib._AsyncGeneratorContextManager  # noqa: SLF001 - they have no public names
)  # fmt: skip

_F = TypeVar("_F", bound=Callable[..., Any])


# --- what is around a guard -----------------------------------------------------------------------------


class Scope:
    """A call in progress, as guards inside it see it; ``task_id`` is that of the task whose run it is, or "".

    What a ``with`` block calls is part of it; if it is a task's run, so is what threads without a context call.
    """

    __slots__ = ("_token", "admitted_by", "has_ended", "outer", "reported", "task_id", "trial_verdicts")

    def __init__(self, admitted_by: Iterable[Admitted] = (), task_id: str = "") -> None:
        self.admitted_by: Mapping[str, Admitted] = {each.breaker: each for each in admitted_by}
        self.task_id = task_id
        self.outer: Scope | None = None
        self.has_ended = False
        self.reported: tuple[str, ...] = ()  # breakers for which guards inside have reported
        self.trial_verdicts: dict[str, Verdict] = {}  # of guards inside trials, by breaker

    def __enter__(self) -> None:
        self._token = current.set(self)
        if self.task_id:
            runs.append(self)

    def __exit__(self, *_: object) -> None:
        self.has_ended = True
        if self.task_id:
            runs.remove(self)
        current.reset(self._token)

    def note_report(self, breaker: str) -> None:
        """Note that a guard inside has reported; what counts for a child need not count for its parent."""
        self.reported = (*self.reported, breaker, parent_of(breaker) or breaker)

    def note_trial(self, breaker: str, verdict: Verdict) -> None:
        """Note the verdict of a guard inside the trial; a failure decides."""
        known = self.trial_verdicts.get(breaker)
        if known is None or known.outcome is not Outcome.FAILURE:
            self.trial_verdicts[breaker] = verdict


current: ContextVar[Scope | None] = ContextVar("resilient_tasks_scope", default=None)
runs: list[Scope] = []  # of tasks, in this process


def current_scope() -> Scope | None:
    scope = current.get()
    while scope is not None and scope.has_ended:
        scope = scope.outer
    return scope


def _live(scope: Scope | None) -> Iterator[Scope]:
    """Yield a scope and those around it that have not ended: a coroutine may outlive the call that has started it."""
    while scope is not None:
        if not scope.has_ended:
            yield scope
        scope = scope.outer


def _shares(scope: Scope, breaker: str) -> bool:
    """Whether a call holds a permit or a slot, or is part of one that does."""
    held = scope.admitted_by.get(breaker)
    return held is not None and (held.trial or held.leased)


# --- plain calls ----------------------------------------------------------------------------------------


class _Thread(threading.local):
    """The plain call that a thread makes: ``inside[0]`` is its breaker, or ``_REPLACED`` once a guard inside reported.

    A context variable costs as much as all the rest of such a call, and between its beginning and its end no coroutine
    can come.
    """

    def __init__(self) -> None:
        self.inside: list[object] = [None]


_thread = _Thread()
_REPLACED = object()
_NOT_ADMITTED: Mapping[str, Admitted] = {}


class _PlainCall(Scope):
    """A plain call with coroutines around, which may run in between, so that it is kept in its context."""

    __slots__ = ("_dependency", "_epoch", "value")
    value: object
    admitted_by = _NOT_ADMITTED
    outer = None
    task_id = ""

    def __init__(self, dependency: Dependency, epoch: int) -> None:
        self._dependency, self._epoch = dependency, epoch
        self.reported = ()
        self.has_ended = False

    def report(self, exc: BaseException | None) -> int:
        self.has_ended = True  # it stays in its context: taking it out costs as much as putting it in
        dependency, is_replaced = self._dependency, self._dependency.name in self.reported
        if exc is not None:
            return dependency.report_failure(self._epoch, exc, is_replaced=is_replaced)
        if not is_replaced:
            cached = dependency.plain
            cached.pending.append(self._epoch)
            if not cached.scheduled:
                dependency.reporter.schedule(cached)
        return 0


def _begin_plain(dependency: Dependency) -> _PlainCall | None:
    cached, scope = dependency.plain, current.get()
    if (
        not cached.admits_freely
        or runs
        or _thread.inside[0] is not None
        or (scope is not None and not (scope.has_ended and scope.outer is None))
        or (cached.counts is not None and cached.is_behind)
    ):
        return None
    plain = _PlainCall(dependency, cached.epoch)
    current.set(plain)
    return plain


def call(dependency: Dependency, fn: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Make one guarded call; see :meth:`Breaker.call`."""
    inside, cached = _thread.inside, dependency.plain
    if (
        inside[0] is not None
        or not cached.admits_freely
        or runs
        or current.get() is not None
        or (cached.counts is not None and cached.is_behind)
    ):
        if inspect.iscoroutinefunction(fn):
            return _await(dependency, fn(*args, **kwargs))
        return call_guarded((dependency,), fn, args, kwargs)
    epoch = cached.epoch
    inside[0] = dependency
    try:
        result = fn(*args, **kwargs) if kwargs else fn(*args)
    except BaseException as exc:
        around, inside[0] = inside[0], None
        _wait(dependency, dependency.report_failure(epoch, exc, is_replaced=around is not dependency))
        raise
    around, inside[0] = inside[0], None
    if type(result) not in _FINISHED and (hasattr(type(result), "__await__") or isinstance(result, _UNSTARTED)):
        plain = _Call((dependency,))
        plain.begin({dependency.name: Admitted(dependency.name, epoch)})
        return plain.finish(fn, result)
    if around is dependency:
        cached.pending.append(epoch)
        if not cached.scheduled:
            dependency.reporter.schedule(cached)
    return result


def call_guarded(dependencies: Sequence[Dependency], fn: Callable[..., Any], args: Any = (), kwargs: Any = None) -> Any:
    """Call ``fn`` under guard of several breakers; its outcome counts for each. If one refuses, ``fn`` does not run."""
    careful = _Call(dependencies)
    careful.begin(careful.admit())
    try:
        result = fn(*args, **(kwargs or {}))
    except BaseException as exc:
        _wait(dependencies[0], careful.report(exc))
        raise
    return careful.finish(fn, result)


async def _await(dependency: Dependency, coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await _guarded_coroutine_function(dependency, lambda: coroutine)()
    finally:
        coroutine.close()  # if it was refused it has not even begun


def _guarded_coroutine_function(dependency: Dependency, fn: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(*args: Any, **kwargs: Any) -> Any:
        around = _begin_plain(dependency) or await _begin_async(dependency)
        try:
            around.value = result = await fn(*args, **kwargs)
        except BaseException as exc:
            await _wait_async(dependency, around.report(exc))
            raise
        receipt = around.report(None)
        if receipt:
            await _wait_async(dependency, receipt)
        return result

    return guarded


async def _begin_async(dependency: Dependency) -> _Call:
    careful = _Call((dependency,))
    careful.begin(await careful.admit_async())
    return careful


class Guard:
    """One guarded call as a context manager, for ``with`` and ``async with``. Not to be nested in itself."""

    __slots__ = ("_call", "_dependency", "_epoch", "_inside")

    def __init__(self, dependency: Dependency) -> None:
        self._dependency = dependency

    def __enter__(self) -> None:
        dependency = self._dependency
        cached, inside = dependency.plain, _thread.inside
        if (
            cached.admits_freely
            and inside[0] is None
            and not runs
            and current.get() is None
            and cached.counts is None
            and _get_running_loop() is None
        ):
            self._epoch = cached.epoch
            self._inside: list[object] | None = inside
            inside[0] = dependency
            return
        self._inside = None
        self._call: _PlainCall | _Call | None = _begin_plain(dependency)
        if self._call is None:
            self._call = careful = _Call((dependency,))
            careful.begin(careful.admit())

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        dependency, inside = self._dependency, self._inside
        if inside is None:
            _wait(dependency, self._call.report(exc))  # type: ignore[union-attr]  # it was entered
            return
        around, inside[0] = inside[0], None
        if exc is not None:
            _wait(dependency, dependency.report_failure(self._epoch, exc, is_replaced=around is not dependency))
        elif around is dependency:
            cached = dependency.plain
            cached.pending.append(self._epoch)
            if not cached.scheduled:
                dependency.reporter.schedule(cached)

    async def __aenter__(self) -> None:
        self._call = _begin_plain(self._dependency) or await _begin_async(self._dependency)

    async def __aexit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        receipt = self._call.report(exc)  # type: ignore[union-attr]  # it was entered
        if receipt:
            await _wait_async(self._dependency, receipt)


# --- any other call -------------------------------------------------------------------------------------


class _Call(Scope):
    """A call that needs care: a permit, a slot or a clock, or it is inside another. All its breakers must admit it."""

    __slots__ = ("_dependencies", "_guards", "_holder", "_started", "_watches", "value")

    def __init__(self, dependencies: Sequence[Dependency]) -> None:
        super().__init__()
        self._dependencies = dependencies
        self._guards = _guards(dependencies)
        self._holder = ""
        self._watches: dict[str, Watch | None] = {}
        self.value: object = NO_VALUE

    # --- admission ----------------------------------------------------------------------------------

    def _admit_by_cache(self) -> dict[str, Admitted | None]:
        """Return what is granted by what this process knows, None where the store must be asked; raise a refusal."""
        self.outer = outer = _scope_around(self._dependencies[0])
        if outer is not None:
            self._dependencies = [_in_place_of(dependency, outer) for dependency in self._dependencies]
            self._guards = _guards(self._dependencies)
        return {guard.name: self._admitted_by_cache(guard, for_child=guard is not of) for guard, of in self._guards}

    def _admitted_by_cache(self, guard: Dependency, *, for_child: bool) -> Admitted | None:
        cached, name = guard.cached_state, guard.name
        held = [scope.admitted_by[name] for scope in _live(self.outer) if _shares(scope, name)]
        if cached.admits_freely or (cached.admits and (for_child or held)):  # slots are the child's own
            return Admitted(name, cached.epoch, for_child=for_child)
        if any(each.trial and each.epoch >= cached.epoch for each in held):  # it has not opened again since
            return Admitted(name, cached.epoch, trial=True, for_child=for_child)
        if cached.refuses:
            raise guard.refuse()
        return None

    def admit(self) -> dict[str, Admitted]:
        """Admit it by the cached states, and where those do not decide by the store; raise a refusal."""
        known = self._admit_by_cache()
        if None in known.values():
            self._holder = uuid.uuid4().hex
        admitted_by: dict[str, Admitted] = {}
        try:
            for guard, of in self._guards:
                granted = known[guard.name] or guard.lease(self._holder, for_child=guard is not of)
                if granted is None:
                    raise guard.refuse()  # noqa: TRY301 - what was granted before is given back
                admitted_by[guard.name] = granted
        except BaseException:
            self._give_back(admitted_by)
            raise
        return admitted_by

    def _give_back(self, admitted_by: Mapping[str, Admitted]) -> None:
        for guard, _ in self._guards:
            held = admitted_by.get(guard.name)
            if held is not None and held.leased:
                guard.conclude(held, _IGNORED, holder=self._holder)

    async def admit_async(self) -> dict[str, Admitted]:
        """Admit it without blocking the event loop; under trio the loop waits for the store."""
        loop = _get_running_loop()
        if loop is None:
            return self.admit()
        if all(guard.is_current for guard, _ in self._guards):
            known = self._admit_by_cache()
            if None not in known.values():
                return {name: each for name, each in known.items() if each is not None}
        asking = loop.run_in_executor(None, copy_context().run, self.admit)
        try:
            return await asyncio.shield(asking)
        except asyncio.CancelledError:
            asking.add_done_callback(self._give_back_granted)
            raise

    def _give_back_granted(self, asked: asyncio.Future[dict[str, Admitted]]) -> None:
        if asked.exception() is None:
            self._give_back(asked.result())

    def begin(self, admitted_by: dict[str, Admitted]) -> None:
        self.admitted_by = admitted_by
        for dependency in self._dependencies:
            if dependency.policy.slow_call_duration is not None:
                self._watches[dependency.name] = self._watch(dependency)
        self._started = perf_counter()
        current.set(self)

    def _watch(self, dependency: Dependency) -> Watch | None:
        """Have the call reported when it is overdue; None: a call around it is, or it is part of a trial."""
        name = dependency.name
        held = self.admitted_by[name]
        around = (scope.admitted_by.get(name) for scope in _live(self.outer))
        if any(each is not None and each.watched for each in around) or (held.trial and not held.leased):
            return None
        voter = dependency.fleet.voter()  # here: the watching thread is no task's
        self.admitted_by = {**self.admitted_by, name: held._replace(watched=True)}
        report = partial(dependency.conclude, held, _OVERDUE, holder=self._holder, voter=voter, each=True)
        return overdue.begin(dependency.slow_after, report, once=held.trial)  # a trial has one outcome

    # --- outcome ------------------------------------------------------------------------------------

    def report(self, exc: BaseException | None) -> int:
        """End the call and report it; return a receipt to wait for, 0 if there is no hurry."""
        counted_for = None if exc is None else attributed_to(exc)
        seconds = perf_counter() - self._started
        if exc is None:
            verdicts = {each.name: each.judge_success(seconds, self.value) for each in self._dependencies}
        else:
            verdicts = {each.name: each.judge(exc, seconds) for each in self._dependencies}
            if [each.outcome for each in verdicts.values()] == [Outcome.FAILURE]:
                attribute_to(exc, self._dependencies[0].name)
        return self._close(verdicts, counted_for)

    async def end(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        await _wait_async(self._dependencies[0], self.report(exc))

    def give_up(self) -> None:
        _wait(self._dependencies[0], self._close({each.name: _IGNORED for each in self._dependencies}))

    def _close(self, verdicts: Mapping[str, Verdict], counted_for: str | None = None) -> int:
        self.has_ended = True
        self.leave()
        late = {each.name for each in self._dependencies if self._was_overdue(each)}
        return max(
            self._report_to(guard, verdicts[of.name], counted_for, was_overdue=of.name in late)
            for guard, of in self._guards
        )

    def _was_overdue(self, dependency: Dependency) -> bool:
        """Watch the call no longer; return whether it has been reported as overdue, by itself or by what is around."""
        watch = self._watches.get(dependency.name)
        return perf_counter() - self._started > dependency.slow_after if watch is None else overdue.end(watch)

    def leave(self) -> None:
        """Let what follows be no part of the call."""
        if current.get() is self:  # a generator may leave a block in another context than it has entered it in
            current.set(self.outer)

    def _report_to(self, guard: Dependency, verdict: Verdict, counted_for: str | None, *, was_overdue: bool) -> int:
        """Report to one breaker; ``counted_for`` is the one for which a guard inside has counted the same exception."""
        name, held = guard.name, self.admitted_by[guard.name]
        if held.trial:
            verdict = verdict if verdict.outcome is Outcome.FAILURE else self.trial_verdicts.get(name, verdict)
            if not held.leased:
                trial = next((scope for scope in _live(self.outer) if _shares(scope, name)), None)
                if trial is not None:
                    trial.note_trial(name, verdict)
                return 0
        elif held.for_child and not held.leased:
            return 0
        elif name in self.reported and needs_no_report(name, verdict, counted_for):
            verdict = _IGNORED
        for scope in _live(self.outer):
            scope.note_report(name)
        plain = _thread.inside[0]
        if isinstance(plain, Dependency) and plain.name in (name, parent_of(name)):
            _thread.inside[0] = _REPLACED
        voter = guard.voter_of(verdict)
        return guard.conclude(held, verdict, holder=self._holder, voter=voter, each=True, was_overdue=was_overdue)

    # --- what a function returns --------------------------------------------------------------------

    def finish(self, fn: Callable[..., Any], result: Any) -> Any:
        """Return what ``fn`` has returned; if that is to be awaited or entered, the call goes on until then."""
        if type(result) is CoroutineType:  # nothing has happened yet: it is admitted when it is awaited
            self.give_up()
            return _await(self._dependencies[0], result)
        if hasattr(type(result), "__await__"):
            self.leave()
            return _Awaitable(self, result)
        if isinstance(result, _UNSTARTED) and _is_generator_function(inspect.unwrap(fn)):
            self.give_up()
            raise ConfigurationError(
                f"breaker {self._dependencies[0].name!r} cannot guard {fn!r}, whose body runs after the call: use"
                " guard() around the loop or block that runs it"
            )
        self.value = result
        _wait(self._dependencies[0], self.report(None))
        return result


class _Awaitable:
    """What a guarded function has returned to be awaited, or entered by ``async with``: that is part of the call."""

    def __init__(self, call: _Call, inner: Any) -> None:
        self._call: _Call | None = call
        self._inner = inner

    def __await__(self) -> Generator[Any, None, Any]:
        return self._finish().__await__()

    async def _finish(self) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            call = self._resume(stack)
            value = await self._inner
            if call is not None:
                call.value = value
            return value

    async def __aenter__(self) -> Any:
        async with contextlib.AsyncExitStack() as stack:
            self._resume(stack)
            value = await stack.enter_async_context(self._inner)
            self._entered = stack.pop_all()
            return value

    async def __aexit__(self, *raised: object) -> bool | None:
        return await self._entered.__aexit__(*raised)  # type: ignore[arg-type]  # what Python passes

    def _resume(self, stack: contextlib.AsyncExitStack) -> _Call | None:
        """Go on with the call until the end of ``stack``; None if it has ended already."""
        call, self._call = self._call, None
        if call is not None:
            current.set(call)
            stack.push_async_exit(call.end)
        return call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __del__(self) -> None:
        if self._call is not None:
            self._call.give_up()


def _guards(dependencies: Iterable[Dependency]) -> list[tuple[Dependency, Dependency]]:
    """Return all breakers that must admit a call: each with itself, or with the child that it is the parent of."""
    guards: dict[str, tuple[Dependency, Dependency]] = {}
    for dependency in dependencies:
        for guard in dependency.guards:
            guards.setdefault(guard.name, (guard, dependency))
    return list(guards.values())


def _scope_around(dependency: Dependency) -> Scope | None:
    """Return the innermost call in progress around a guard; in a thread without a context, the run that started it.

    Of several runs in a process it is one that holds a permit or slot of the breaker. A thread of another task is part
    of none.
    """
    scope, running = current_scope(), list(runs)
    if scope is not None or not running:
        return scope
    voter = dependency.fleet.voter()
    if voter:
        return next((run for run in running if voter_of(run.task_id) == voter), None)
    return running[0] if len(running) == 1 else next((run for run in running if _shares(run, dependency.name)), None)


def _in_place_of(dependency: Dependency, scope: Scope) -> Dependency:
    """Return the breaker that a guard inside ``scope`` reports for: in a child's call, that child for its parent."""
    names = (name for around in _live(scope) for name in around.admitted_by if parent_of(name) == dependency.name)
    child = next(names, None)
    return dependency if child is None else dependency.child_named(child)


def _timeout(dependency: Dependency) -> float:
    return REPORT_TIMEOUT if dependency.cached.admits else TRIAL_TIMEOUT


def _wait(dependency: Dependency, receipt: int) -> None:
    if receipt:
        dependency.reporter.wait(receipt, _timeout(dependency))


async def _wait_async(dependency: Dependency, receipt: int) -> None:
    if not receipt or _get_running_loop() is None:  # under trio the next call need not see the effect of this one
        return
    give_up_at = perf_counter() + _timeout(dependency)
    # An event would have to cross over from the reporter's thread into each loop; failures are rare enough to poll.
    while not dependency.reporter.is_served(receipt) and perf_counter() < give_up_at:  # noqa: ASYNC110
        await asyncio.sleep(_POLL_INTERVAL)


def decorated(dependency: Dependency, fn: _F) -> _F:
    """Return a function or a coroutine function of which each call is a guarded call; see :meth:`Breaker.__call__`."""
    instead = _instead_of_decorating(dependency.name, fn)
    if instead:
        raise ConfigurationError(f"breaker {dependency.name!r} cannot decorate {fn!r}, {instead}")
    if inspect.iscoroutinefunction(fn):
        return cast("_F", functools.wraps(fn)(_guarded_coroutine_function(dependency, fn)))

    @functools.wraps(fn)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return call(dependency, fn, args, kwargs)

    return cast("_F", guarded)


def _instead_of_decorating(name: str, fn: Any) -> str:
    if _is_generator_function(fn):
        return "a generator function: use guard() inside it"
    if isinstance(fn, (staticmethod, classmethod)):
        kind = type(fn).__name__
        return f"a {kind}: write @{kind} above the breaker, not below it"
    if isinstance(fn, type):
        return f"a class: decorate its methods, or make one by call({fn.__name__})"
    if hasattr(fn.__class__, "apply_async"):  # a lazy proxy of a task has it, too
        return f"a Celery task: write @app.task(breaker={name!r})"
    return "" if callable(fn) else "not callable: allowed is a function or a coroutine function"


def _is_generator_function(fn: Any) -> bool:
    return inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)
