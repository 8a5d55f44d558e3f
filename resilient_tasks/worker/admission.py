"""The gate: in the worker's main process, before a message costs a pool slot.

In CLOSED and OPEN it answers from the cached state. Only in HALF_OPEN does it ask the store, for a permit, and it
remembers a denial until the breaker's version moves; and where calls in flight are limited, for a slot.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING
from zlib import crc32

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, State, voter_of
from resilient_tasks.dependency import Admitted, Dependency
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.store.background import Watch, overdue
from resilient_tasks.store.view import CachedState
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import Admission, Report, limits_of

if TYPE_CHECKING:
    from resilient_tasks.worker.context import Runtime
    from resilient_tasks.worker.request import GatedRequest

_IGNORED, _SUCCESS, _SLOW = Verdict(Outcome.IGNORED), Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW)
_OVERDUE = Verdict(Outcome.OVERDUE)

#: Seconds for which the permit of a trial that waits for its pool process is renewed.
LONGEST_WAIT = 600.0


class Gate:
    """Admits or refuses the requests of one worker, and reports how their runs end."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._taken_up: Counter[str] = Counter()  # resumed tasks that have arrived, by breaker
        self._in_flight: Counter[str] = Counter()  # runs of this worker, by breaker whose runs are limited
        self._watches: dict[tuple[GatedRequest, str], Watch] = {}
        self._guarded_inside: set[tuple[str, str]] = set()  # see _watched_as; as many as the code has

    # --- what is known here -----------------------------------------------------------------------

    def refusing(
        self, guards: Sequence[Dependency], envelope: Envelope, task_id: str, *, in_line: bool = False
    ) -> Dependency | None:
        """Return the first breaker that refuses a task by what is known here, so that it need not wait for a pool slot.

        None: all admit it, or must be asked for a permit. ``in_line``: not before tasks that wait for a slot already.
        """
        for breaker in guards:
            cached = breaker.cached_state
            if cached.admits_freely:
                if cached.ramps and _ramps_out(cached, envelope, task_id):
                    return breaker
            elif not breaker.accepting or (in_line and _is_waited_for(cached, envelope)):
                return breaker
        return None

    def full(self, breakers: Sequence[Dependency]) -> Dependency | None:
        """Return the first breaker of which this worker runs as many tasks as ``max_concurrency_per_worker`` allows."""
        for breaker in breakers:
            is_limited = breaker.policy.max_concurrency_per_worker is not None
            if is_limited and self._in_flight.get(breaker.name, 0) >= self._most_here(breaker):
                return breaker
        return None

    def took_up(self, envelope: Envelope) -> None:
        with self._lock:
            self._taken_up[envelope.breaker] += 1

    def report_taken_up(self, report: Callable[[str, int], object]) -> None:
        """Report how many resumed tasks have arrived, by breaker; what raises is reported again the next time."""
        for breaker, count in list(self._taken_up.items()):
            report(breaker, count)
            with self._lock:
                self._taken_up[breaker] -= count
                self._taken_up = +self._taken_up

    # --- admission --------------------------------------------------------------------------------

    def admit(self, request: GatedRequest) -> Admission:
        """Decide on a request that is about to enter the pool: it gets all permits that it needs, or none."""
        refusing = self.refusing(request.guards, request.envelope, request.id)
        return self.grant(request) if refusing is None else _denied(request, refusing.refuse())

    def grant(self, request: GatedRequest) -> Admission:
        """Decide on a request that no breaker refuses by what is known here."""
        admitted_by: list[Admitted] = []
        for breaker in request.guards:
            admitted = self._admit_one(breaker, request)
            if admitted is None:
                self.settle(request, Admission(tuple(admitted_by)), Report.of_all(_IGNORED, admitted_by))
                is_full = breaker.cached_state.admits_freely
                refusal = BreakerOpenError(breaker.name, AT_CAPACITY, 0.0) if is_full else breaker.refuse()
                return _denied(request, refusal)
            admitted_by.append(admitted)
        return Admission(tuple(admitted_by), None, request.envelope.attempts, request.envelope.trace)

    def _admit_one(self, breaker: Dependency, request: GatedRequest) -> Admitted | None:
        """Return what one breaker grants; None if it denies a permit or a slot. A slot is the child's to give."""
        cached, for_child = breaker.cached_state, breaker not in request.breakers
        is_counted = breaker.is_limited and not for_child
        if is_counted and not self._count(breaker):
            return None
        trial = leased = False
        is_free = cached.admits_freely or (cached.admits and for_child)
        epoch = cached.epoch  # after that: see CachedState.take
        if not is_free:
            lease = breaker.lease(request.holder, for_child=for_child, renewed_for=LONGEST_WAIT)
            if lease is None:
                if is_counted:
                    self._uncount(breaker.name)
                return None
            epoch, trial, leased = lease.epoch, lease.trial, lease.leased
        counts = not trial and _would_count(breaker, cached, request.envelope)
        is_watched = breaker.slow_after < math.inf and (leased or not for_child)
        watched = is_watched and self._is_watched(request, breaker, trial=trial)
        return Admitted(breaker.name, epoch, trial, counts, leased, for_child, watched)

    def _most_here(self, breaker: Dependency) -> float:
        """Return how many runs of a breaker's tasks this worker may have in flight by itself."""
        policy, away = breaker.policy, self._runtime.fleet.store.is_unavailable
        if breaker.cached_state.snapshot.state in (State.DISABLED, State.SHADOW):
            return math.inf
        of_the_fleet = policy.most_in_flight if away else None
        return min(of_the_fleet or math.inf, policy.max_concurrency_per_worker or math.inf)

    def _count(self, breaker: Dependency) -> bool:
        most = self._most_here(breaker)
        with self._lock:
            has_room = self._in_flight[breaker.name] < most
            self._in_flight[breaker.name] += has_room
            return has_room

    def _uncount(self, breaker: str) -> None:
        with self._lock:
            self._in_flight[breaker] -= 1
            if not self._in_flight[breaker]:
                del self._in_flight[breaker]  # there may be a breaker for every key that there ever was

    # --- the run ----------------------------------------------------------------------------------

    def _is_watched(self, request: GatedRequest, breaker: Dependency, *, trial: bool) -> bool:
        """Whether a run is reported when it is overdue, unless its quick attempts or the guards inside it are."""
        has_attempts = request.task.options.retrying is not None and not trial
        return not has_attempts and _watched_as(request, breaker) not in self._guarded_inside

    def hold(self, request: GatedRequest, admission: Admission) -> None:
        """Note that a run has begun: its permits are renewed for as long as it may take, and it may become overdue."""
        admitted_by = admission.admitted_by  # by none, if refused: a fallback answers
        for breaker, admitted in zip(request.guards, admitted_by, strict=False):
            if admitted.trial:
                hard, soft = limits_of(request.task, request.time_limits)
                breaker.hold(request.holder, float(hard or soft or breaker.policy.trial_timeout))
            if admitted.watched:
                report = partial(_report, request, breaker, admitted, _OVERDUE)
                once = admitted.trial  # it has one outcome
                self._watches[request, breaker.name] = overdue.begin(breaker.slow_after, report, once=once)

    def settle(self, request: GatedRequest, admission: Admission, report: Report) -> None:
        """Count what a run has found out, once, for each breaker that admitted it."""
        admitted_by = admission.admitted_by  # by those before the first that has refused, if one has
        for breaker, admitted, found in zip(request.guards, admitted_by, report.verdicts, strict=False):
            was_overdue = admitted.watched and self._end_watch(request, breaker, found)
            if breaker.is_limited and not admitted.for_child:
                self._uncount(breaker.name)
            if admitted.leased or (found is not None and not admitted.for_child):
                verdict = _SLOW if was_overdue and found == _SUCCESS else found or _IGNORED
                _report(request, breaker, admitted, verdict, was_overdue=was_overdue)

    def _end_watch(self, request: GatedRequest, breaker: Dependency, verdict: Verdict | None) -> bool:
        """Watch a run no longer; return whether it has been overdue.

        Without a verdict guards inside have reported: how long runs of this task take then says nothing.
        """
        watch = self._watches.pop((request, breaker.name), None)
        if watch is None:
            return False
        if verdict is None:
            self._guarded_inside.add(_watched_as(request, breaker))
        return overdue.end(watch)


def _report(
    request: GatedRequest, breaker: Dependency, admitted: Admitted, verdict: Verdict, *, was_overdue: bool = False
) -> None:
    voter = "" if verdict.outcome is Outcome.SUCCESS else voter_of(request.id)
    holder = request.holder if admitted.leased else ""
    breaker.conclude(admitted, verdict, holder=holder, voter=voter, was_overdue=was_overdue)


def _denied(request: GatedRequest, refusal: BreakerOpenError) -> Admission:
    return Admission((), refusal, request.envelope.attempts, request.envelope.trace)


def _watched_as(request: GatedRequest, breaker: Dependency) -> tuple[str, str]:
    return request.task.name, breaker.root


def _would_count(breaker: Dependency, cached: CachedState, envelope: Envelope) -> bool:
    """Whether a failure now uses up an attempt: only if the dependency has served a task since the last one.

    A task that has not failed before looks back over one window.
    """
    last_success = cached.snapshot.last_success_at
    if last_success is None:
        return False
    return last_success > (envelope.attempted_at or breaker.fleet.view.server_now() - breaker.policy.window)


def _was_resumed(cached: CachedState, envelope: Envelope) -> bool:
    return envelope.resumed == cached.epoch and envelope.breaker == cached.name


def _is_waited_for(cached: CachedState, envelope: Envelope) -> bool:
    is_limited = cached.admits and not cached.admits_freely
    return is_limited and cached.snapshot.deferred > 0 and not _was_resumed(cached, envelope)


def _ramps_out(cached: CachedState, envelope: Envelope, task_id: str) -> bool:
    """Whether the ramp after a recovery keeps a task out, by a lot drawn from its id: it falls alike everywhere."""
    share = cached.ramp_share()
    if share >= 1.0 or _was_resumed(cached, envelope):
        return False
    return crc32(f"{cached.epoch}:{task_id}".encode()) >= share * 2**32
