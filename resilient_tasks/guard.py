"""Guarding calls: how one is admitted, and what becomes of its outcome.

In CLOSED a guarded call costs no I/O: admission reads this process's view, the outcome goes to the
reporter. Only when the breaker is not CLOSED may a call ask the store, for a permit to make a trial.
No lock is held while the user's code runs, and the exception that it raises always reaches the caller.
"""

from __future__ import annotations

import asyncio
import math
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextvars import ContextVar
from time import perf_counter
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from resilient_tasks.core.blame import blame, blamed_on
from resilient_tasks.core.classification import Verdict, dependency_errors, judge, judge_result
from resilient_tasks.core.counts import REFUSED
from resilient_tasks.core.model import Grant, Outcome, State
from resilient_tasks.core.names import parent_of
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec
from resilient_tasks.store.reports import LEASE, Reporter
from resilient_tasks.store.standing import Standing
from resilient_tasks.store.view import View

if TYPE_CHECKING:
    from resilient_tasks.fleet import Fleet

# ruff: noqa: SLF001  Guard and Guarded are two halves of one thing

PATIENCE = 0.25  # seconds a failed call may wait until its failure is counted, so that the next call sees the effect
TRIAL_PATIENCE = 1.0  # seconds a trial may wait until it is settled, for the same reason
_GLANCE = 0.001  # seconds between two looks of a coroutine at its report
_NO_PERMIT = ""
_PERMIT_OF_TASK = "task"  # the call is part of a trial that the task around it answers for
_NO_VALUE = object()
_SUCCESS, _SLOW = Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW)


class _Pass(NamedTuple):
    """An admitted call: the epoch, the holder of its permit or slot, and what the parent of a child has admitted."""

    epoch: int
    holder: str = _NO_PERMIT
    of_parent: _Pass | None = None


class TaskScope(Protocol):
    """The run of a guarded task around a guard; the task layer puts it into :data:`task_scope`."""

    def replaced(self, breaker: str) -> None:
        """Take note that a guard inside has reported for ``breaker``: the task as a whole need not."""

    def is_trial(self, breaker: str) -> bool:
        """Whether the run holds a permit of ``breaker``: guards inside are part of that one trial."""

    def holds_slot(self, breaker: str) -> bool:
        """Whether the run is in flight for ``breaker`` anyway: guards inside need no slot of their own."""

    def found(self, breaker: str, verdict: Verdict) -> None:
        """Take note of what a guard inside the trial of ``breaker`` has found; it replaces the task-level outcome."""


task_scope: ContextVar[TaskScope | None] = ContextVar("resilient_tasks_scope", default=None)


class Guarded:
    """A dependency as this process calls it: the half of a ``Breaker`` that admits calls and reports outcomes.

    It is made at import time, before anybody knows where the store is, so it finds its fleet on first use.

    Args:
        spec: the breaker as this process declares it.
        fleet: returns this process's ``Fleet``.
    """

    _view: View
    _reporter: Reporter

    def __init__(self, spec: Spec, fleet: Callable[[], Fleet]) -> None:
        self.spec = spec
        self._find_fleet = fleet
        self._joined: Fleet | None = None
        self._standing = _NOWHERE
        # a success that nobody need look at takes the fast path
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
        self.fleet.view.catch_up()
        return self._standing

    @property
    def state(self) -> State:
        """State of the breaker as this process sees it."""
        return self.standing.snapshot.state

    @property
    def admits(self) -> bool:
        """Whether calls are admitted without asking the store."""
        return self.standing.admits

    @property
    def trial_due(self) -> bool:
        """Whether the next call may be a trial, as far as time goes."""
        return self.standing.trial_due

    def refusal(self) -> BreakerOpenError:
        """Return the error that tells of a refusal at this moment."""
        standing = self.standing
        at_capacity = standing.admits and not standing.admits_freely
        state = AT_CAPACITY if at_capacity else standing.snapshot.state.value
        return BreakerOpenError(self.name, state, standing.retry_after)

    def refuse(self) -> BreakerOpenError:
        """Return the same, and count the refusal; being at capacity keeps no call from the dependency for good."""
        refusal = self.refusal()
        if refusal.state != AT_CAPACITY:
            self.fleet.reporter.tally(self.name, REFUSED)
        return refusal

    # --- admission --------------------------------------------------------------------------------

    def _admit(self) -> _Pass:
        return self._admit_by_view() or self._ask_for_permit()

    def _is_current(self) -> bool:
        """Whether this process can answer without I/O."""
        return self._joined is not None and not self._view.is_behind

    def _admit_by_view(self) -> _Pass | None:
        """Admit or refuse by what this process knows; None: the store must be asked for a permit."""
        standing, scope = self.standing, task_scope.get()
        if standing.admits_freely or (standing.admits and scope is not None and scope.holds_slot(self.name)):
            return _Pass(standing.epoch)
        if scope is not None and scope.is_trial(self.name):
            return _Pass(standing.epoch, _PERMIT_OF_TASK)
        if standing.refuses:
            raise self.refuse()
        return None

    def _ask_for_permit(self) -> _Pass:
        holder = uuid.uuid4().hex
        grant = self.acquire(holder)
        if not grant.admitted:
            raise self.refuse()
        if not grant.leased:
            return _Pass(grant.snapshot.epoch)
        self.hold(holder, self.policy.trial_timeout if grant.trial else math.inf)
        return _Pass(grant.snapshot.epoch, holder)

    def acquire(self, holder: str, lease: float = LEASE) -> Grant:
        """Ask the store for admission, in HALF_OPEN for a permit.

        Args:
            holder: who holds the permit; unique to the call.
            lease: seconds after which the permit expires unless it is held or renewed.
        """
        return self.fleet.acquire(self.spec, holder, lease=lease)

    def hold(self, holder: str, seconds: float) -> None:
        """Renew a permit until it is settled, at most for so many seconds."""
        fleet = self.fleet
        fleet.reporter.hold(self.name, holder, fleet.view.clock() + seconds)

    # --- outcomes ---------------------------------------------------------------------------------

    def judge(self, exc: BaseException) -> Verdict:
        """Tell what the exception that ended a call says about the dependency.

        One that ended a guarded call of another dependency inside this one says nothing here.
        """
        policy = self.policy
        blamed = blamed_on(exc)
        if blamed is not None and self.name not in (blamed, parent_of(blamed)):
            return Verdict(Outcome.IGNORED, type(exc).__name__)
        return judge(policy.classify, policy.failures, policy.ignore, exc, split_local_errors=policy.split_local_errors)

    def judge_success(self, seconds: float, value: object = _NO_VALUE) -> Verdict:
        """Tell what a call that returned says about the dependency; SLOW if it took too long.

        Args:
            seconds: that it took.
            value: what it returned, for a ``classify`` of the user's; nothing for a ``with`` block.
        """
        verdict = _SUCCESS if value is _NO_VALUE else judge_result(self.policy.classify, value)
        return _SLOW if verdict.outcome is Outcome.SUCCESS and seconds > self._slow_after else verdict

    def report(self, epoch: int, verdict: Verdict, *, voter: str = "", each: bool = False) -> int:
        """Report a call that was admitted in ``epoch`` without a permit; see :meth:`Reporter.report`."""
        return self.fleet.reporter.report(self._standing, epoch, verdict, voter=voter, each=each)

    def _count_success(self, epoch: int) -> None:
        """Report a plain success without a permit: the one path that has to be fast."""
        standing = self._standing
        standing.pending.append(epoch)
        if not standing.scheduled:
            self._reporter.schedule(standing)
        if (scope := task_scope.get()) is not None:
            scope.replaced(self.spec.name)

    def _succeeded(self, admitted: _Pass, seconds: float, value: object = _NO_VALUE) -> int:
        return self._finished(admitted, self.judge_success(seconds, value))

    def _failed(self, admitted: _Pass, exc: BaseException) -> int:
        verdict = self.judge(exc)
        if verdict.outcome is Outcome.FAILURE:
            blame(exc, self.name)
        return self._finished(admitted, verdict)

    def _finished(self, admitted: _Pass, verdict: Verdict) -> int:
        """Report an admitted call; return a ticket to wait for, 0 if there is no hurry."""
        scope, (epoch, holder, _) = task_scope.get(), admitted
        if holder == _PERMIT_OF_TASK:
            if scope is not None:
                scope.found(self.name, verdict)
            return 0
        if scope is not None:
            scope.replaced(self.name)
        voter = "" if verdict.outcome is Outcome.SUCCESS else self.fleet.voter()
        if holder:
            return self._reporter.settle(self.spec, holder, epoch, verdict, voter=voter, each=True)
        return self.report(epoch, verdict, voter=voter, each=True)

    def _wait(self, ticket: int) -> None:
        self._reporter.wait(ticket, self._patience)

    async def _wait_async(self, ticket: int) -> None:
        give_up_at = perf_counter() + self._patience
        # An event would have to cross over from the reporter's thread into each loop; failures are rare enough to look.
        while not self._reporter.is_served(ticket) and perf_counter() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(_GLANCE)

    @property
    def _patience(self) -> float:
        return PATIENCE if self._standing.admits else TRIAL_PATIENCE


class Guard:
    """One guarded call as a context manager; ``Breaker.guard()`` makes it. Not to be nested in itself."""

    __slots__ = ("_admitted", "_breaker", "_epoch", "_is_plain", "_started", "_value")

    def __init__(self, breaker: Guarded) -> None:
        self._breaker = breaker
        self._value: object = _NO_VALUE

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

    async def _admit_in_thread(self) -> _Pass:
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

    def _begin(self, admitted: _Pass) -> None:
        self._admitted = admitted
        self._started = perf_counter()

    def _finish(self, exc: BaseException | None) -> int:
        breaker, admitted = self._breaker, _Pass(self._epoch) if self._is_plain else self._admitted
        if exc is not None:
            return breaker._failed(admitted, exc)
        return breaker._succeeded(admitted, perf_counter() - self._started, self._value)


class _HandingOver:
    """An admission on its way from a thread to a coroutine, which may be cancelled, or its loop closed, meanwhile."""

    def __init__(self, breaker: Guarded) -> None:
        self._breaker = breaker
        self._lock = threading.Lock()
        self._admitted: _Pass | None = None
        self._is_unwanted = False

    def admit(self) -> _Pass:
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


def call_guarded(breakers: Sequence[Guarded], fn: Callable[[], Any]) -> Any:
    """Call ``fn`` under guard of several breakers and return what it returns; its outcome counts for each of them.

    Raises:
        BreakerOpenError: one of them refuses; ``fn`` does not run, and permits of the others are given back.
    """
    passes: list[_Pass] = []
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


def _finish_all(admitted: Iterable[tuple[Guarded, _Pass]], verdicts: Sequence[Verdict]) -> None:
    tickets = [(breaker, breaker._finished(own, verdict)) for (breaker, own), verdict in zip(admitted, verdicts)]  # noqa: B905 - those that refused have no pass
    for breaker, ticket in tickets:
        breaker._wait(ticket)


def _nowhere() -> Standing:
    """Return a standing that admits nothing, for breakers that have not joined their fleet yet."""
    standing = Standing(Spec("nowhere"), perf_counter)
    standing.admits = standing.admits_freely = standing.admits_plainly = False
    return standing


_NOWHERE = _nowhere()
