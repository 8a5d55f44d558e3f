"""``Guarded``: a dependency as this process calls it: how a call is admitted, and what becomes of its outcome.

In CLOSED a guarded call costs no I/O: admission reads this process's view, the outcome goes to the
reporter. Only when the breaker is not CLOSED may a call ask the store, for a permit to make a trial.
"""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, Protocol

from resilient_tasks.core.blame import blame, blamed_on
from resilient_tasks.core.classification import Verdict, dependency_errors, judge, judge_result
from resilient_tasks.core.counts import REFUSED
from resilient_tasks.core.model import Grant, Outcome, State
from resilient_tasks.core.names import parent_of
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec
from resilient_tasks.store.reports import Reporter
from resilient_tasks.store.standing import Standing
from resilient_tasks.store.view import View

if TYPE_CHECKING:
    from resilient_tasks.fleet import Fleet

PATIENCE = 0.25  # seconds a failed call may wait until its failure is counted, so that the next call sees the effect
TRIAL_PATIENCE = 1.0  # seconds a trial may wait until it is settled, for the same reason
_GLANCE = 0.001  # seconds between two looks of a coroutine at its report
_NO_PERMIT = ""
_PERMIT_OF_TASK = "task"  # the call is part of a trial that the task around it answers for
NO_VALUE = object()
_SUCCESS, _SLOW = Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW)


class Pass(NamedTuple):
    """An admitted call: the epoch, the holder of its permit or slot, and what the parent of a child has admitted."""

    epoch: int
    holder: str = _NO_PERMIT
    of_parent: Pass | None = None


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

    def refuse(self) -> BreakerOpenError:
        """Return the error of a refusal, and count it; at capacity no call is kept from the dependency for good."""
        standing = self.standing
        if standing.admits and not standing.admits_freely:
            return BreakerOpenError(self.name, AT_CAPACITY, standing.retry_after)
        self.fleet.reporter.tally(self.name, REFUSED)
        return BreakerOpenError(self.name, standing.snapshot.state.value, standing.retry_after)

    # --- admission --------------------------------------------------------------------------------

    def _admit(self) -> Pass:
        return self._admit_by_view() or self._ask_for_permit()

    def _is_current(self) -> bool:
        """Whether this process can answer without I/O."""
        return self._joined is not None and not self._view.is_behind

    def _admit_by_view(self) -> Pass | None:
        """Admit or refuse by what this process knows; None: the store must be asked for a permit."""
        standing, scope = self.standing, task_scope.get()
        if standing.admits_freely or (standing.admits and scope is not None and scope.holds_slot(self.name)):
            return Pass(standing.epoch)
        if scope is not None and scope.is_trial(self.name):
            return Pass(standing.epoch, _PERMIT_OF_TASK)
        if standing.refuses:
            raise self.refuse()
        return None

    def _ask_for_permit(self) -> Pass:
        holder = uuid.uuid4().hex
        grant = self.acquire(holder)
        if not grant.admitted:
            raise self.refuse()
        if not grant.leased:
            return Pass(grant.snapshot.epoch)
        self.hold(holder, self.policy.trial_timeout if grant.trial else math.inf)
        return Pass(grant.snapshot.epoch, holder)

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

    def judge(self, exc: BaseException) -> Verdict:
        """Tell what the exception that ended a call says about the dependency.

        One that ended a guarded call of another dependency inside this one says nothing here.
        """
        policy = self.policy
        blamed = blamed_on(exc)
        if blamed is not None and self.name not in (blamed, parent_of(blamed)):
            return Verdict(Outcome.IGNORED, type(exc).__name__)
        return judge(policy.classify, policy.failures, policy.ignore, exc)

    def judge_success(self, seconds: float, value: object = NO_VALUE) -> Verdict:
        """Tell what a call that returned says about the dependency; SLOW if it took too long.

        Args:
            seconds: that it took.
            value: what it returned, for a ``classify`` of the user's; nothing for a ``with`` block.
        """
        verdict = _SUCCESS if value is NO_VALUE else judge_result(self.policy.classify, value)
        return _SLOW if verdict.outcome is Outcome.SUCCESS and seconds > self._slow_after else verdict

    def report(
        self, epoch: int, verdict: Verdict, *, voter: str = "", each: bool = False, was_overdue: bool = False
    ) -> int:
        """Report a call that was admitted in ``epoch`` without a permit; see :meth:`Reporter.report`."""
        return self.fleet.reporter.report(
            self._standing, epoch, verdict, voter=voter, each=each, was_overdue=was_overdue
        )

    def _count_success(self, epoch: int) -> None:
        """Report a plain success without a permit: the one path that has to be fast."""
        standing = self._standing
        standing.pending.append(epoch)
        if not standing.scheduled:
            self._reporter.schedule(standing)
        if (scope := task_scope.get()) is not None:
            scope.replaced(self.spec.name)

    def _succeeded(self, admitted: Pass, seconds: float, value: object = NO_VALUE) -> int:
        return self._finished(admitted, self.judge_success(seconds, value))

    def _failed(self, admitted: Pass, exc: BaseException) -> int:
        verdict = self.judge(exc)
        if verdict.outcome is Outcome.FAILURE:
            blame(exc, self.name)
        return self._finished(admitted, verdict)

    def _finished(self, admitted: Pass, verdict: Verdict) -> int:
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


def _nowhere() -> Standing:
    """Return a standing that admits nothing, for breakers that have not joined their fleet yet."""
    standing = Standing(Spec("nowhere"), perf_counter)
    standing.admits = standing.admits_freely = standing.admits_plainly = False
    return standing


_NOWHERE = _nowhere()
