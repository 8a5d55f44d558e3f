"""The gate: in the worker's main process, before a message costs a pool slot.

In CLOSED and OPEN it answers from the view. Only in HALF_OPEN does it ask the store, for a permit,
and it remembers a denial until the breaker's version moves.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from zlib import crc32

from resilient_tasks.core.model import Outcome
from resilient_tasks.worker.run import Admission, Report
from resilient_tasks.worker.ticket import Ticket

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.store.view import Standing
    from resilient_tasks.worker.request import GatedRequest
    from resilient_tasks.worker.runtime import Runtime


#: Seconds for which the permit of a trial that waits for its pool process is renewed.
LONGEST_WAIT = 600.0


class Gate:
    """Admits or refuses the requests of one worker."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._taken_up: Counter[str] = Counter()
        self._counting = threading.Lock()

    def refuses_now(self, breaker: Breaker, ticket: Ticket, task_id: str) -> bool:
        """Whether a message that has just arrived need not even wait for a pool slot."""
        return self._refuses(self._runtime.fleet.view.standing(breaker.name), breaker, ticket, task_id)

    def refuses_all(self, breaker: Breaker) -> bool:
        """Whether no task of a breaker would be admitted at present, not even as a trial."""
        standing = self._runtime.fleet.view.standing(breaker.name)
        return not standing.admits and (standing.refuses or self._leaves_trials_to_probes(breaker))

    def _refuses(self, standing: Standing, breaker: Breaker, ticket: Ticket, task_id: str) -> bool:
        if standing.admits:
            return _ramps_out(standing, ticket, task_id)
        return standing.refuses or self._leaves_trials_to_probes(breaker)

    def _leaves_trials_to_probes(self, breaker: Breaker) -> bool:
        """A probe keeps tasks from being trials, but while the store is away no tick can run it."""
        return breaker.registered_probe is not None and not self._runtime.fleet.store.away

    def admit(self, breaker: Breaker, request: GatedRequest) -> Admission:
        """Decide on a request that is about to enter the pool; may take a permit."""
        standing, ticket = self._runtime.fleet.view.standing(breaker.name), request.ticket
        if self._refuses(standing, breaker, ticket, request.id):
            return self._refused(breaker, ticket)
        if not standing.admits:
            return self._trial(breaker, request)
        counts = self.would_count(breaker, ticket)
        return Admission(breaker.name, standing.epoch, attempts=ticket.attempts, counts=counts)

    def _refused(self, breaker: Breaker, ticket: Ticket) -> Admission:
        refusal = breaker.refusal()
        return Admission(
            breaker.name, refused_in=refusal.state, retry_after=refusal.retry_after, attempts=ticket.attempts
        )  # fmt: skip

    def _trial(self, breaker: Breaker, request: GatedRequest) -> Admission:
        fleet = self._runtime.fleet
        grant = fleet.acquire(breaker.spec, request.holder)
        if not grant.admitted:
            return self._refused(breaker, request.ticket)
        if grant.trial:
            fleet.reporter.hold(breaker.name, request.holder, fleet.view.clock() + LONGEST_WAIT)
        return Admission(breaker.name, grant.snapshot.epoch, trial=grant.trial, attempts=request.ticket.attempts)

    def hold(self, breaker: Breaker, request: GatedRequest) -> None:
        """Renew the permit of a trial that has begun to run, for as long as it may take."""
        fleet = self._runtime.fleet
        fleet.reporter.hold(breaker.name, request.holder, fleet.view.clock() + _trial_limit(request, breaker))

    def would_count(self, breaker: Breaker, ticket: Ticket) -> bool:
        """Whether a failure now uses up an attempt: only if the dependency has served somebody since the last one.

        A task that has not failed before looks back over one window.
        """
        view = self._runtime.fleet.view
        last_success = view.standing(breaker.name).snapshot.last_success_at
        since = ticket.attempted_at or view.server_now() - breaker.policy.window
        return last_success is not None and last_success > since

    def took_up(self, ticket: Ticket) -> None:
        """Note that a resumed task has reached a worker."""
        if ticket.resumed:
            with self._counting:
                self._taken_up[ticket.breaker] += 1

    def tell_taken_up(self, tell: Callable[[str, int], object]) -> None:
        """Tell how many resumed tasks have arrived, by breaker; what raises is told again the next time."""
        for breaker in list(self._taken_up):
            count = self._taken_up[breaker]
            tell(breaker, count)
            with self._counting:
                self._taken_up[breaker] -= count
        with self._counting:
            self._taken_up = +self._taken_up

    def settle(self, breaker: Breaker, admission: Admission, holder: str, report: Report) -> None:
        """Count what a run has found out, once."""
        fleet = self._runtime.fleet
        told = report.cause, report.retry_after
        if admission.trial:
            fleet.reporter.settle(breaker.spec, holder, admission.epoch, report.outcome or Outcome.IGNORED, *told)
        elif report.outcome is not None:
            fleet.reporter.report(fleet.view.standing(breaker.name), admission.epoch, report.outcome, *told)


def _ramps_out(standing: Standing, ticket: Ticket, task_id: str) -> bool:
    """Whether the ramp after a recovery keeps this task out; resumed tasks have a pace of their own.

    The lot is drawn from the task's id, so that it falls alike wherever it is asked for.
    """
    share = standing.ramp_share()
    if share >= 1.0 or ticket.resumed == standing.epoch:
        return False
    return crc32(f"{standing.epoch}:{task_id}".encode()) >= share * 2**32


def _trial_limit(request: GatedRequest, breaker: Breaker) -> float:
    """Longest time in seconds for which a trial's permit is renewed."""
    hard, soft = (*(request.time_limits or ()), None, None)[:2]
    task: Any = request.task
    return float(hard or task.time_limit or soft or task.soft_time_limit or breaker.policy.trial_timeout)
