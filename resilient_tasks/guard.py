"""Guarded calls: how one is admitted, what becomes of its outcome, and the ways to make one.

In CLOSED a guarded call costs no I/O: admission reads this process's cached state, the outcome goes to the reporter.
Only when the breaker is not CLOSED, or limits the calls in flight, does a call ask the store, for a permit or a slot.

Guards inside a guarded call, a task's run or a probe know it as their ``Scope``: they share its permits and slots, and
what they report replaces what it would have reported for the same breaker. No lock is held while the user's code runs,
and the exception that it raises always reaches the caller.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import math
import threading
import uuid
from asyncio import _get_running_loop  # the loop or None; get_running_loop() raises
from collections.abc import Callable, Collection, Coroutine, Generator, Mapping, Sequence
from functools import partial
from time import perf_counter
from types import AsyncGeneratorType, CoroutineType, GeneratorType, TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from resilient_tasks.core.classification import (
    Verdict,
    attribute_to,
    attributed_to,
    dependency_errors,
    judge,
    judge_result,
    log_undecided,
    refusal_in,
)
from resilient_tasks.core.counts import REFUSED, UNDECIDED
from resilient_tasks.core.model import Grant, Outcome, State, voter_of
from resilient_tasks.core.names import parent_of
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError, ConfigurationError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.scope import Pass, Scope, current, current_scope, is_watched, live, runs, shares
from resilient_tasks.store.base import Spec
from resilient_tasks.store.overdue import Watch, overdue
from resilient_tasks.store.reports import Reporter
from resilient_tasks.store.standing import Standing
from resilient_tasks.store.view import View

if TYPE_CHECKING:
    from resilient_tasks.fleet import Fleet

# ruff: noqa: SLF001  a guard and its breaker are one thing, which shows its users the public verbs

REPORT_TIMEOUT = 0.25  # seconds a failed call may wait until its failure is counted, so that the next call sees it
TRIAL_TIMEOUT = 1.0  # seconds a trial may wait until it is settled, for the same reason
_POLL_INTERVAL = 0.001  # seconds between two looks of a coroutine at its report
_NO_VALUE = object()
_SUCCESS, _SLOW, _IGNORED = Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW), Verdict(Outcome.IGNORED)
_OVERDUE = Verdict(Outcome.OVERDUE)
_FINISHED = frozenset({type(None), bool, int, float, str, bytes, list, tuple, dict, set})  # types with nothing to await
_UNSTARTED = (
    GeneratorType, AsyncGeneratorType, contextlib._GeneratorContextManager, contextlib._AsyncGeneratorContextManager
)  # fmt: skip

_P = ParamSpec("_P")
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


# --- what is around a guard ---------------------------------------------------------------------------


class _Thread(threading.local):
    """What a thread knows of the outermost of its calls, if it is a plain one.

    A context variable costs as much as all the rest of such a call, and between its beginning and its end no coroutine
    can come. ``plain`` holds its breaker, or :data:`_REPLACED` when a guard inside has reported in its stead.
    """

    def __init__(self) -> None:
        self.plain: list[object] = [None]


_thread = _Thread()
_REPLACED = object()


def _scope_around(breaker: Guarded) -> Scope | None:
    """Return the innermost call in progress around a guard; in a thread without a context, the run that started it.

    Where several runs share a process, it is one that holds a permit or slot of the breaker, if any does: a trial is
    decided by what the dependency answers, to whichever of the trials. A thread of another task is part of none.
    """
    scope, running = current_scope(), list(runs)
    if scope is not None or not running:
        return scope
    voter = breaker.fleet.voter()
    if voter:
        return next((run for run in running if voter_of(run.task_id) == voter), None)
    return running[0] if len(running) == 1 else next((run for run in running if shares(run, breaker.name)), None)


def _in_place_of(breaker: Guarded, scope: Scope) -> Guarded:
    """Return the breaker that a guard inside ``scope`` reports for: in a child's call, that child for its parent."""
    names = (name for around in live(scope) for name in around.passes if parent_of(name) == breaker.name)
    child = next(names, None)
    return breaker if child is None else breaker.child_named(child)


# --- one guarded call ---------------------------------------------------------------------------------

_NO_PASSES: Mapping[str, Pass] = {}


class Guard(Scope):
    """One guarded call as a context manager, for ``with`` and ``async with``. Not to be nested in itself.

    A call is *plain* if it needs neither I/O nor a permit nor a clock and nothing is around it: all that it keeps is
    the epoch.

    Args:
        breakers: all must admit it, and its outcome counts for each of them.
    """

    __slots__ = ("_breakers", "_epoch", "_found", "_holder", "_plain", "_replaced", "_started", "_watches", "value")

    _found: Mapping[str, Verdict]
    _plain: list[object] | None  # what its thread knows of it, if it is plain and no part of a coroutine
    _replaced: Collection[str]
    _watches: Mapping[str, Watch | None]
    value: object

    def __init__(self, breakers: tuple[Guarded, ...]) -> None:
        self._breakers = breakers

    def __enter__(self) -> None:
        breaker, plain = self._breakers[0], _thread.plain
        if plain[0] is not None or not breaker._is_plain():
            self._begin(self._admit())
        elif _get_running_loop() is None:
            self._epoch = breaker._standing.epoch
            self.passes = _NO_PASSES
            self._plain = plain
            plain[0] = breaker
        else:
            self.be_plain(breaker._standing.epoch)
            current.set(self)

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        breaker = self._breakers[0]
        if self.passes is not _NO_PASSES or (plain := self._plain) is None:
            if exc is not None or not self._ends_plainly():
                breaker._wait(self.end(exc))
            return
        around = plain[0]
        plain[0] = None
        if exc is not None:
            breaker._wait(breaker._count_failure(self._epoch, exc, is_replaced=around is not breaker))
        elif around is breaker:
            standing = breaker._standing
            standing.pending.append(self._epoch)
            if not standing.scheduled:
                breaker._reporter.schedule(standing)

    async def __aenter__(self) -> None:
        breaker = self._breakers[0]
        if breaker._is_plain() and _thread.plain[0] is None:
            self._epoch = breaker._standing.epoch
            self._plain = self.outer = None
            self.passes = _NO_PASSES
            self.has_ended = False
            self._replaced = ()
            current.set(self)
        elif _get_running_loop() is None:  # trio: its loop waits for the store
            self._begin(self._admit())
        else:
            is_current = all(guard._is_current() for guard, _ in self._guards())
            self._begin((self._admit_by_cache() if is_current else None) or await self._admit_in_thread())

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        breaker = self._breakers[0]
        if exc is not None or not self._ends_plainly():
            await breaker._wait_async(self.end(exc))

    def _ends_plainly(self) -> bool:
        """End a plain call that has succeeded."""
        if self.passes is not _NO_PASSES or self._replaced:
            return False
        self.has_ended = True  # it stays in its context: taking it out costs as much as putting it in
        breaker = self._breakers[0]
        standing = breaker._standing
        standing.pending.append(self._epoch)
        if not standing.scheduled:
            breaker._reporter.schedule(standing)
        return True

    def be_plain(self, epoch: int) -> None:
        """Stand for a call that was admitted plainly in ``epoch``."""
        self._epoch = epoch
        self._plain = self.outer = None
        self.passes = _NO_PASSES
        self.has_ended = False
        self._replaced = ()

    # --- admission --------------------------------------------------------------------------------

    def _begin(self, passes: Mapping[str, Pass]) -> None:
        self.passes, self.has_ended, self._replaced, self._found = passes, False, (), {}
        self._plain, self.value = None, _NO_VALUE
        self._watches = {
            each.name: self._watch(each) for each in self._breakers if each.policy.slow_call_duration is not None
        }
        self._started = perf_counter()
        current.set(self)

    def _watch(self, breaker: Guarded) -> Watch | None:
        """Have the call reported when it is overdue; None: a call around it is, or it is part of a trial."""
        held = self.passes[breaker.name]
        if is_watched(self.outer, breaker.name) or (held.trial and not held.leased):
            return None
        voter = breaker.fleet.voter()  # here: the watching thread is no task's
        self.passes = {**self.passes, breaker.name: held._replace(watched=True)}
        report = partial(self._send, breaker, held, _OVERDUE, voter)
        return overdue.begin(breaker._slow_after, report, once=held.trial)  # a trial has one outcome

    def _guards(self) -> list[tuple[Guarded, Guarded]]:
        """Return all breakers that must admit it: each with itself, or with the child that it is the parent of."""
        guards: dict[str, tuple[Guarded, Guarded]] = {}
        for breaker in self._breakers:
            for guard in breaker.guards:
                guards.setdefault(guard.name, (guard, breaker))
        return list(guards.values())

    def _admit_by_cache(self) -> dict[str, Pass] | None:
        """Admit or refuse it by what this process knows; None: the store must be asked."""
        self.outer = outer = _scope_around(self._breakers[0])
        if outer is not None:
            self._breakers = tuple(_in_place_of(breaker, outer) for breaker in self._breakers)
        known = [guard._admit_by_cache(outer, for_child=guard is not breaker) for guard, breaker in self._guards()]
        return None if None in known else {each.breaker: each for each in known if each is not None}

    def _admit(self) -> Mapping[str, Pass]:
        known = self._admit_by_cache()
        if known is not None:
            return known
        self._holder = uuid.uuid4().hex
        passes: dict[str, Pass] = {}
        try:
            for guard, breaker in self._guards():
                for_child = guard is not breaker
                known_here = guard._admit_by_cache(self.outer, for_child=for_child)
                passes[guard.name] = known_here or guard._ask_for_admission(self._holder, for_child=for_child)
        except BaseException:
            self._give_back(passes)
            raise
        return passes

    def _give_back(self, passes: Mapping[str, Pass]) -> None:
        for guard, _ in self._guards():
            held = passes.get(guard.name)
            if held is not None and held.leased:
                guard._reporter.settle(guard.spec, self._holder, held.epoch, _IGNORED)

    async def _admit_in_thread(self) -> Mapping[str, Pass]:
        """Ask the store without blocking the event loop; what it grants after a cancellation is given back."""
        granted: list[Mapping[str, Pass]] = []
        is_wanted = [True]

        def give_back() -> None:
            with contextlib.suppress(IndexError):  # one of two threads gives it back: pop() is atomic
                self._give_back(granted.pop())

        def ask() -> None:
            granted.append(self._admit())
            if not is_wanted:
                give_back()

        asking = asyncio.ensure_future(asyncio.to_thread(ask))
        try:
            await asyncio.shield(asking)
        except asyncio.CancelledError:
            is_wanted.clear()
            give_back()
            asking.add_done_callback(lambda asked: asked.cancelled() or asked.exception())  # nothing else looks at it
            raise
        return granted.pop()

    # --- outcome ----------------------------------------------------------------------------------

    def replaced(self, breaker: str) -> None:
        """Take note that a guard inside has reported; what counts for a child need not count for its parent."""
        self._replaced = {*self._replaced, breaker, parent_of(breaker) or breaker}

    def found(self, breaker: str, verdict: Verdict) -> None:
        """Take note of what a guard inside the trial has found."""
        known = self._found.get(breaker)
        if known is None or known.outcome is not Outcome.FAILURE:
            self._found = {**self._found, breaker: verdict}

    def end(self, exc: BaseException | None) -> int:
        """End the call and report on it; return a ticket to wait for, 0 if there is no hurry."""
        if self.passes is _NO_PASSES:
            self.has_ended, breaker = True, self._breakers[0]
            is_replaced = breaker.name in self._replaced
            return 0 if exc is None else breaker._count_failure(self._epoch, exc, is_replaced=is_replaced)
        counted_for = None if exc is None else attributed_to(exc)
        seconds = perf_counter() - self._started
        if exc is None:
            verdicts = {each.name: each.judge_success(seconds, self.value) for each in self._breakers}
        else:
            verdicts = {each.name: each.judge(exc, seconds) for each in self._breakers}
            if len(verdicts) == 1 and verdicts[self._breakers[0].name].outcome is Outcome.FAILURE:
                attribute_to(exc, self._breakers[0].name)
        return self._close(verdicts, counted_for)

    def _close(self, verdicts: Mapping[str, Verdict], counted_for: str | None = None) -> int:
        self.has_ended = True
        self.leave()
        late = {each.name for each in self._breakers if self._was_overdue(each)}
        return max(self._report(guard, verdicts[each.name], counted_for, late) for guard, each in self._guards())

    def _was_overdue(self, breaker: Guarded) -> bool:
        """Watch the call no longer; return whether it has been reported as overdue, by itself or by what is around."""
        watch = self._watches.get(breaker.name)
        return perf_counter() - self._started > breaker._slow_after if watch is None else overdue.end(watch)

    def leave(self) -> None:
        """Let what follows be no part of the call."""
        if current.get() is self:  # a generator may leave a block in another context than it has entered it in
            current.set(self.outer)

    def give_up(self) -> None:
        """End a call that was not made after all."""
        if self.passes is not _NO_PASSES:
            self._breakers[0]._wait(self._close({breaker.name: _IGNORED for breaker in self._breakers}))

    def _report(self, guard: Guarded, verdict: Verdict, counted_for: str | None, late: Collection[str]) -> int:
        """Report to one breaker.

        Args:
            guard: the breaker.
            verdict: on the call.
            counted_for: the breaker for which a guard inside has counted the same exception.
            late: names of the breakers to which the call was reported as overdue.
        """
        name, held = guard.name, self.passes[guard.name]
        if held.trial:
            verdict = verdict if verdict.outcome is Outcome.FAILURE else self._found.get(name, verdict)
            if not held.leased:
                trial = next((scope for scope in live(self.outer) if shares(scope, name)), None)
                if trial is not None:
                    trial.found(name, verdict)
                return 0
        elif held.for_child and not held.leased:
            return 0
        elif name in self._replaced and _needs_no_report(name, verdict, counted_for):
            verdict = _IGNORED
        for scope in live(self.outer):
            scope.replaced(name)
        plain = _thread.plain
        if isinstance(plain[0], Guarded) and plain[0].name in (name, parent_of(name)):
            plain[0] = _REPLACED
        return self._send(guard, held, verdict, guard._voter(verdict), was_overdue=name in late)

    def _send(self, guard: Guarded, held: Pass, verdict: Verdict, voter: str, *, was_overdue: bool = False) -> int:
        if not held.leased:
            return guard.report(held.epoch, verdict, voter=voter, each=True, was_overdue=was_overdue)
        settle = guard._reporter.settle
        return settle(guard.spec, self._holder, held.epoch, verdict, voter=voter, each=True, was_overdue=was_overdue)

    def hand_over(self, result: Any, fn: Callable[..., Any]) -> Any:
        """Return what stands for a result that the call has not come to yet.

        Raises:
            ConfigurationError: ``fn`` is a generator function, or makes a context manager of one.
        """
        breaker = self._breakers[0]
        if type(result) is CoroutineType:  # nothing has happened yet: it is admitted when it is awaited
            self.give_up()
            return breaker._await(result)
        if hasattr(type(result), "__await__"):
            self.leave()
            return _Awaitable(self, result)
        if _is_generator_function(inspect.unwrap(fn)):
            self.give_up()
            raise ConfigurationError(
                f"breaker {breaker.name!r} cannot guard {fn!r}, whose body runs after the call: use guard() around"
                " the loop or block that runs it"
            )
        return _NO_VALUE


def _needs_no_report(name: str, verdict: Verdict, counted_for: str | None) -> bool:
    """Whether a call in whose stead guards inside it have reported has nothing to add: no failure of its own.

    Args:
        name: of the breaker.
        verdict: on the call.
        counted_for: the breaker for which one of them has counted the exception that has ended the call.
    """
    return verdict.outcome is not Outcome.FAILURE or name in (counted_for, parent_of(counted_for or ""))


class _Awaitable:
    """What a guarded function has returned to be awaited, or entered by ``async with``: that is part of the call."""

    def __init__(self, guard: Guard, inner: Any) -> None:
        self._guard: Guard | None = guard
        self._inner = inner

    def __await__(self) -> Generator[Any, None, Any]:
        return self._finish().__await__()

    async def _finish(self) -> Any:
        guard, self._guard = self._guard, None
        if guard is None:  # it is awaited a second time
            return await self._inner
        current.set(guard)
        try:
            guard.value = await self._inner
        except BaseException as exc:
            await guard.__aexit__(type(exc), exc, None)
            raise
        await guard.__aexit__(None, None, None)
        return guard.value

    async def __aenter__(self) -> Any:
        guard = self._guard
        if guard is not None:
            current.set(guard)
        try:
            return await self._inner.__aenter__()
        except BaseException as exc:
            await self._end(exc)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        try:
            is_handled = await self._inner.__aexit__(kind, exc, traceback)
        except BaseException as error:
            await self._end(error)
            raise
        await self._end(exc)
        return is_handled

    async def _end(self, exc: BaseException | None) -> None:
        guard, self._guard = self._guard, None
        if guard is not None:
            await guard.__aexit__(None, exc, None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __del__(self) -> None:
        if self._guard is not None:
            self._guard.give_up()


# --- a breaker's part ---------------------------------------------------------------------------------


class Guarded:
    """A dependency as this process calls it: the part of a ``Breaker`` that admits calls and reports outcomes.

    It is made at import time, before the store's address is known, so it finds its fleet on first use.

    Args:
        spec: the breaker as this process declares it.
        fleet: returns this process's ``Fleet``.
    """

    _view: View
    _reporter: Reporter

    def __init__(self, spec: Spec, fleet: Callable[[], Fleet]) -> None:
        self.spec = spec
        self._alone = (self,)
        self._find_fleet = fleet
        self._joined: Fleet | None = None
        self._standing = _NOWHERE
        # a success that is looked at does not take the fast path
        self._examines = spec.policy.slow_call_duration is not None or spec.policy.classify is not dependency_errors
        self._slow_after = math.inf if spec.policy.slow_call_duration is None else spec.policy.slow_call_duration

    @property
    def name(self) -> str:
        """Name of the breaker."""
        return self.spec.name

    @property
    def policy(self) -> BreakerPolicy:
        """The policy as this process declares it."""
        return self.spec.policy

    @property
    def guards(self) -> tuple[Guarded, ...]:
        """The breakers that a call must pass: a child's parent, and the breaker itself."""
        return (self,)

    def child_named(self, name: str) -> Guarded:
        """Return the child of a name that a process of the fleet has used."""
        raise NotImplementedError

    # --- membership -------------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        """This process's fleet; on first use the breaker's state is read from the store."""
        if self._joined is None:
            fleet = self._find_fleet()
            self._view, self._reporter = fleet.view, fleet.reporter
            self._standing = fleet.join(self.spec)
            self._joined = fleet
        return self._joined

    def detach(self) -> None:
        """Forget the fleet; the next use finds it anew."""
        self._joined = None
        self._standing = _NOWHERE

    # --- state ------------------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        """The breaker as this process sees it."""
        self.fleet.view.catch_up(self._standing)
        return self._standing

    @property
    def state(self) -> State:
        """State of the breaker as this process sees it."""
        return self.standing.snapshot.state

    @property
    def admits(self) -> bool:
        """Whether calls are admitted without asking the store."""
        return self.standing.admits

    def refuse(self) -> BreakerOpenError:
        """Return the error of a refusal, and count it; at capacity no call is kept from the dependency for good."""
        standing = self.standing
        if standing.admits and not standing.admits_freely:
            return BreakerOpenError(self.name, AT_CAPACITY, standing.retry_after)
        self.fleet.reporter.tally(self.name, REFUSED)
        return BreakerOpenError(self.name, standing.snapshot.state.value, standing.retry_after)

    # --- admission --------------------------------------------------------------------------------

    def _is_plain(self) -> bool:
        """Whether a call made now is plain, if there is no plain one around it in this thread; see :class:`Guard`."""
        scope = current.get()
        return (
            self._standing.admits_freely
            and not self._examines
            and not runs
            and (scope is None or (scope.has_ended and scope.outer is None))
            and (self._standing.counts is None or not self._standing.is_behind)
        )

    def _is_current(self) -> bool:
        """Whether this process can answer without I/O."""
        return self._joined is not None and not self._standing.is_behind

    def _admit_by_cache(self, outer: Scope | None, *, for_child: bool) -> Pass | None:
        """Admit or refuse a call by what this process knows; None: the store must be asked.

        Raises:
            BreakerOpenError: it is refused.
        """
        standing, name = self.standing, self.name
        held = [scope.passes[name] for scope in live(outer) if shares(scope, name)]
        if standing.admits_freely or (standing.admits and (for_child or held)):  # slots are the child's own
            return Pass(name, standing.epoch, for_child=for_child)
        if any(each.trial and each.epoch >= standing.epoch for each in held):  # it has not opened again since
            return Pass(name, standing.epoch, trial=True, for_child=for_child)
        if standing.refuses:
            raise self.refuse()
        return None

    def _ask_for_admission(self, holder: str, *, for_child: bool) -> Pass:
        grant = self.acquire(holder)
        if not grant.admitted:
            raise self.refuse()
        if grant.leased:
            self.hold(holder, self.policy.trial_timeout if grant.trial else math.inf)
        return Pass(self.name, grant.snapshot.epoch, grant.trial, leased=grant.leased, for_child=for_child)

    def acquire(self, holder: str) -> Grant:
        """Ask the store for admission, in HALF_OPEN for a permit.

        Args:
            holder: who holds the permit; unique to the call.
        """
        return self.fleet.acquire(self.spec, holder)

    def hold(self, holder: str, seconds: float) -> None:
        """Renew a permit until it is settled, at most for so many seconds."""
        fleet = self.fleet
        fleet.reporter.hold(self.name, holder, fleet.view.clock() + seconds)

    # --- outcomes ---------------------------------------------------------------------------------

    def judge(self, exc: BaseException, seconds: float = 0.0) -> Verdict:
        """Return what the exception that ended a call says about the dependency.

        One that ended a guarded call of another dependency inside this one says nothing here, nor does a refusal,
        whatever it is wrapped in. Another one that says nothing, like a cancellation, is SLOW if it came too late.

        Args:
            exc: the exception.
            seconds: how long the call has taken.
        """
        policy = self.policy
        other = attributed_to(exc)
        is_anothers = other is not None and self.name not in (other, parent_of(other))
        if is_anothers or refusal_in(exc, in_groups=False) is not None:
            return Verdict(Outcome.IGNORED, type(exc).__name__)
        said = judge(policy.classify, policy.failures, policy.ignore, exc)
        if said.undecided and log_undecided(known := parent_of(self.name) or self.name, exc):
            self.fleet.reporter.tally(known, UNDECIDED + said.cause)
        return _SLOW if said.outcome is Outcome.IGNORED and seconds > self._slow_after else said

    def judge_success(self, seconds: float, value: object = _NO_VALUE) -> Verdict:
        """Return what a call that returned says about the dependency; SLOW if it took too long.

        Args:
            seconds: that it took.
            value: what it returned, for a ``classify`` of the user's; nothing for a ``with`` block.
        """
        verdict = _SUCCESS if value is _NO_VALUE else judge_result(self.policy.classify, value)
        return _SLOW if verdict.outcome is Outcome.SUCCESS and seconds > self._slow_after else verdict

    def report(
        self, epoch: int, verdict: Verdict, *, voter: str = "", each: bool = False, was_overdue: bool = False
    ) -> int:
        """Report a call that was admitted in ``epoch`` without a permit; see :meth:`Reporter.report`."""
        return self.fleet.reporter.report(
            self._standing, epoch, verdict, voter=voter, each=each, was_overdue=was_overdue
        )

    def _count_failure(self, epoch: int, exc: BaseException, *, is_replaced: bool) -> int:
        """Report a plain call that has raised ``exc``, or say nothing if a guard inside has counted that."""
        counted_for, verdict = attributed_to(exc), self.judge(exc)
        if verdict.outcome is Outcome.FAILURE:
            attribute_to(exc, self.name)
        if is_replaced and _needs_no_report(self.name, verdict, counted_for):
            return 0
        return self._count(epoch, verdict)

    def _count(self, epoch: int, verdict: Verdict) -> int:
        return self.report(epoch, verdict, voter=self._voter(verdict), each=True)

    def _voter(self, verdict: Verdict) -> str:
        return "" if verdict.outcome is Outcome.SUCCESS else self.fleet.voter()

    def _wait(self, ticket: int) -> None:
        self._reporter.wait(ticket, self._report_timeout)

    async def _wait_async(self, ticket: int) -> None:
        if _get_running_loop() is None:  # trio: the next call need not see the effect of this one
            return
        give_up_at = perf_counter() + self._report_timeout
        # An event would have to cross over from the reporter's thread into each loop; failures are rare enough to poll.
        while not self._reporter.is_served(ticket) and perf_counter() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_INTERVAL)

    @property
    def _report_timeout(self) -> float:
        return REPORT_TIMEOUT if self._standing.admits else TRIAL_TIMEOUT

    # --- ways to guard a call ---------------------------------------------------------------------

    def guard(self) -> Guard:
        """Return a context manager for one guarded call, for ``with`` and ``async with``.

        Entering it raises :class:`BreakerOpenError` when the breaker refuses; the body does not run then. A time-out
        belongs inside, so that it ends the call as a failure: one around the guard only cancels it.
        """
        return Guard(self._alone)

    def call(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``fn`` under guard and return what it returns.

        If that is awaitable, the call lasts until it has been awaited, or until the end of its ``async with`` block.

        Raises:
            BreakerOpenError: the breaker refuses; ``fn`` does not run. For a coroutine function, when it is awaited.
            ConfigurationError: ``fn`` is a generator function; its body would run outside the guard.
        """
        plain, standing = _thread.plain, self._standing
        if (  # _is_plain(), without the price of a method
            plain[0] is not None
            or not standing.admits_freely
            or self._examines
            or runs
            or current.get() is not None
            or (standing.counts is not None and standing.is_behind)
        ):
            return self._call_with_care(fn, args, kwargs)
        epoch = standing.epoch
        plain[0] = self
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            around, plain[0] = plain[0], None
            self._wait(self._count_failure(epoch, exc, is_replaced=around is not self))
            raise
        around = plain[0]
        plain[0] = None
        kind = type(result)
        if kind is CoroutineType:
            return self._await(result)  # type: ignore[arg-type,return-value]  # a cast() is a call, too
        if kind not in _FINISHED and _is_unfinished(result):
            guard = Guard(self._alone)
            guard.be_plain(epoch)
            unfinished = guard.hand_over(result, fn)
            if unfinished is not _NO_VALUE:
                return cast("_T", unfinished)
        if around is self:
            standing.pending.append(epoch)
            if not standing.scheduled:
                self._reporter.schedule(standing)
        return result

    def _call_with_care(self, fn: Callable[..., _T], args: Any, kwargs: Any) -> _T:
        if inspect.iscoroutinefunction(fn):
            return cast("_T", self._await(fn(*args, **kwargs)))
        guard = Guard(self._alone)
        guard._begin(guard._admit())
        try:
            result = fn(*args, **kwargs)
        except BaseException as exc:
            self._wait(guard.end(exc))
            raise
        if _is_unfinished(result):
            unfinished = guard.hand_over(result, fn)
            if unfinished is not _NO_VALUE:
                return cast("_T", unfinished)
        guard.value = result
        self._wait(guard.end(None))
        return result

    async def _await(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        guard = Guard(self._alone)
        if _thread.plain[0] is None and self._is_plain():
            guard.be_plain(self._standing.epoch)
            current.set(guard)
        else:
            try:
                await guard.__aenter__()
            except BaseException:
                coroutine.close()  # it has not even begun
                raise
        try:
            guard.value = result = await coroutine
        except BaseException as exc:
            await self._wait_async(guard.end(exc))
            raise
        if not guard._ends_plainly():
            await self._wait_async(guard.end(None))
        return result

    def __call__(self, fn: _F) -> _F:
        """Decorate a function or a coroutine function: each call of it is a guarded call.

        Raises:
            ConfigurationError: ``fn`` is no such function; the message says what to write instead.
        """
        self._check_decorated(fn)
        if inspect.iscoroutinefunction(fn):

            @functools.wraps(fn)
            async def guarded_coroutine(*args: Any, **kwargs: Any) -> Any:
                return await self._await(fn(*args, **kwargs))

            return cast("_F", guarded_coroutine)

        @functools.wraps(fn)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            return self.call(fn, *args, **kwargs)

        return cast("_F", guarded)

    def _check_decorated(self, fn: Any) -> None:
        if _is_generator_function(fn):
            instead = "a generator function: use guard() inside it"
        elif isinstance(fn, (staticmethod, classmethod)):
            kind = type(fn).__name__
            instead = f"a {kind}: write @{kind} above the breaker, not below it"
        elif isinstance(fn, type):
            instead = f"a class: decorate its methods, or make one by call({fn.__name__})"
        elif hasattr(fn.__class__, "apply_async"):  # of what stands for a task, too
            instead = f"a Celery task: write @app.task(breaker={self.name!r})"
        elif not callable(fn):
            instead = "not callable: allowed is a function or a coroutine function"
        else:
            return
        raise ConfigurationError(f"breaker {self.name!r} cannot decorate {fn!r}, {instead}")


def call_guarded(breakers: Sequence[Guarded], fn: Callable[[], Any]) -> Any:
    """Call ``fn`` under guard of several breakers and return what it returns; its outcome counts for each of them.

    Raises:
        BreakerOpenError: one of them refuses; ``fn`` does not run, and permits of the others are given back.
    """
    guard = Guard(tuple(breakers))
    with contextlib.ExitStack() as stack:
        guard._begin(guard._admit())
        stack.push(guard)
        guard.value = fn()
    return guard.value


def _is_unfinished(result: object) -> bool:
    return hasattr(type(result), "__await__") or isinstance(result, _UNSTARTED)


def _is_generator_function(fn: Any) -> bool:
    return inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn)


def _nowhere() -> Standing:
    """Return a standing that admits nothing, for breakers that have not joined their fleet yet."""
    standing = Standing(Spec("nowhere"), perf_counter)
    standing.admits = standing.admits_freely = False
    return standing


_NOWHERE = _nowhere()
