"""The gate: in the worker's main process, before a message costs a pool slot.

In CLOSED and OPEN it answers from the view. Only in HALF_OPEN does it ask the store, for a permit,
and it remembers a denial until the breaker's version moves; and where calls in flight are limited, for a slot.
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
from resilient_tasks.core.model import Grant, Outcome, State, parent_of, voter_of
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError
from resilient_tasks.scope import Pass
from resilient_tasks.store.background import Watch, overdue
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.execution import Admission, Report, limits_of

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency
    from resilient_tasks.store.view import CachedState
    from resilient_tasks.worker.context import Runtime
    from resilient_tasks.worker.request import GatedRequest

_NOTHING_SAID, _SUCCESS, _SLOW = Verdict(Outcome.IGNORED), Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW)

#: Seconds for which the permit of a trial that waits for its pool process is renewed.
LONGEST_WAIT = 600.0


class Gate:
    """Admits or refuses the requests of one worker."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._taken_up: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._places = Places()
        self._overruns = Overruns()
        self._unaccepted: set[GatedRequest] = set()  # counted, or with a permit, and no pool process yet

    def refusing(self, breakers: Sequence[Dependency], envelope: Envelope, task_id: str) -> Dependency | None:
        """Return the first breaker that refuses a task by what is known here, so that it need not wait for a pool slot.

        None: all admit it, or must be asked for a permit.
        """
        for breaker in breakers:
            if self._refuses(breaker.standing, breaker, envelope, task_id):
                return breaker
        return None

    def refuses_all(self, breaker: Dependency) -> bool:
        """Whether no task of a breaker would be admitted at present, not even as a trial."""
        standing = breaker.standing
        return standing.refuses or (not standing.admits and self._leaves_trials_to_probes(breaker))

    def _refuses(self, standing: CachedState, breaker: Dependency, envelope: Envelope, task_id: str) -> bool:
        if standing.admits_freely:
            return _ramps_out(standing, envelope, task_id)
        if standing.admits:
            return False
        return standing.refuses or self._leaves_trials_to_probes(breaker)

    def _leaves_trials_to_probes(self, breaker: Dependency) -> bool:
        """A probe keeps tasks from being trials, but while the store is away no tick can run it."""
        return breaker.probe_to_run is not None and not self._runtime.fleet.store.away

    def admit(self, request: GatedRequest) -> Admission:
        """Decide on a request that is about to enter the pool: it gets all permits that it needs, or none."""
        guards, envelope = request.guards, request.envelope
        refusing = self.refusing(guards, envelope, request.id)
        if refusing is not None:
            return self._refused(refusing, envelope, refusing.refuse())
        passes: list[Pass] = []
        parents = {parent_of(breaker.name) for breaker in guards}
        for breaker in guards:
            admitted = self._pass(breaker, request, for_child=breaker.name in parents)
            if admitted is None:
                self.settle(request, Admission(tuple(passes)), Report.of_all(_NOTHING_SAID, passes))
                return self._refused(breaker, envelope, self._denial(breaker))
            passes.append(admitted._replace(watched=self._watches(request, breaker, admitted)))
        return Admission(tuple(passes), attempts=envelope.attempts, trace=envelope.trace)

    @staticmethod
    def _denial(breaker: Dependency) -> BreakerOpenError:
        return BreakerOpenError(breaker.name, AT_CAPACITY, 0.0) if breaker.standing.admits_freely else breaker.refuse()

    @staticmethod
    def _refused(breaker: Dependency, envelope: Envelope, refusal: BreakerOpenError) -> Admission:
        return Admission((), breaker.name, refusal.state, refusal.retry_after, envelope.attempts, envelope.trace)

    def _pass(self, breaker: Dependency, request: GatedRequest, *, for_child: bool) -> Pass | None:
        """Return one breaker's pass; None if it denies a permit or a slot. A slot is the child's to give."""
        standing = breaker.standing
        is_counted = not for_child and _is_counted(breaker)
        if is_counted:
            if not self._places.take(breaker.name, most=self._most_here(breaker)):
                return None
            self._unaccepted.add(request)
        if standing.admits_freely or (standing.admits and for_child):
            counts = self._would_count(standing, request.envelope)
            return Pass(breaker.name, standing.epoch, counts=counts, for_child=for_child)
        grant = self._ask(breaker, request)
        if not grant.admitted:
            if is_counted:
                self._places.leave(breaker.name)
            return None
        counts = not grant.trial and self._would_count(standing, request.envelope)
        return Pass(breaker.name, grant.snapshot.epoch, grant.trial, counts, grant.leased, for_child)

    def _ask(self, breaker: Dependency, request: GatedRequest) -> Grant:
        """Ask the store for a permit or a slot, and hold it."""
        fleet, name = self._runtime.fleet, breaker.name
        grant = fleet.acquire(breaker.spec, request.holder)
        if grant.leased:
            self._unaccepted.add(request)
            until = fleet.view.clock() + LONGEST_WAIT if grant.trial else math.inf
            fleet.reporter.hold(name, request.holder, until)
        return grant

    def full(self, guards: Sequence[Dependency]) -> Dependency | None:
        """Return the first breaker of which this worker runs as many tasks as ``max_concurrency_per_worker`` allows."""
        parents = {parent_of(breaker.name) for breaker in guards} if len(guards) > 1 else ()
        limited = (each for each in guards if each.policy.max_concurrency_per_worker and each.name not in parents)
        return next((each for each in limited if self._places.count(each.name) >= self._most_here(each)), None)

    def _most_here(self, breaker: Dependency) -> float:
        """Return how many runs of a breaker's tasks this worker may have in flight by itself."""
        policy, away = breaker.policy, self._runtime.fleet.store.away
        if breaker.standing.snapshot.state in (State.DISABLED, State.SHADOW):
            return math.inf
        of_the_fleet = policy.most_in_flight if away else None
        return min(of_the_fleet or math.inf, policy.max_concurrency_per_worker or math.inf)

    def hold(self, request: GatedRequest, admission: Admission) -> None:
        """Note that a run has begun: its permits are renewed for as long as it may take, and it may become overdue."""
        self._unaccepted.discard(request)
        for breaker, admitted in zip(request.guards, admission.passes, strict=False):  # refused: no passes, a fallback
            if admitted.trial:
                breaker.hold(request.holder, _trial_limit(request, breaker))
            if admitted.watched and breaker.policy.slow_call_duration is not None:
                report = partial(self._report_overdue, request, breaker, admitted)
                seconds, once = breaker.policy.slow_call_duration, admitted.trial  # a trial has one outcome
                self._overruns.begin(request, breaker.name, seconds, report, once=once)

    def _watches(self, request: GatedRequest, breaker: Dependency, admitted: Pass) -> bool:
        """Whether a run is reported when it is overdue, unless its quick attempts, guards or child breaker are."""
        if breaker.policy.slow_call_duration is None or (admitted.for_child and not admitted.leased):
            return False
        has_attempts = request.task.options.retrying is not None and not admitted.trial
        return not has_attempts and self._overruns.watches(request, breaker.name)

    def _report_overdue(self, request: GatedRequest, breaker: Dependency, admitted: Pass) -> None:
        self._tell(request, breaker, admitted, OVERDUE)

    def _would_count(self, standing: CachedState, envelope: Envelope) -> bool:
        """Whether a failure now uses up an attempt: only if the dependency has served somebody since the last one.

        A task that has not failed before looks back over one window.
        """
        last_success = standing.snapshot.last_success_at
        if last_success is None:
            return False
        since = envelope.attempted_at or self._runtime.fleet.view.server_now() - standing.spec.policy.window
        return last_success > since

    def unaccepted(self) -> list[GatedRequest]:
        """Return the runs with a slot or permit that no pool process has accepted yet."""
        return list(self._unaccepted)

    def took_up(self, envelope: Envelope) -> None:
        """Note that a resumed task has reached a worker."""
        with self._counting:
            self._taken_up[envelope.breaker] += 1

    def tell_taken_up(self, tell: Callable[[str, int], object]) -> None:
        """Tell how many resumed tasks have arrived, by breaker; what raises is told again the next time."""
        for breaker in list(self._taken_up):
            count = self._taken_up[breaker]
            tell(breaker, count)
            with self._counting:
                self._taken_up[breaker] -= count
        with self._counting:
            self._taken_up = +self._taken_up

    def settle(self, request: GatedRequest, admission: Admission, report: Report) -> None:
        """Count what a run has found out, once, for each breaker that admitted it."""
        self._unaccepted.discard(request)
        passes = zip(request.guards, admission.passes, report.verdicts, strict=False)  # of the first, if one refused
        for breaker, admitted, said in passes:
            was_overdue = self._overruns.end(request, breaker.name, said)
            verdict = _SLOW if was_overdue and said == _SUCCESS else said
            if not admitted.for_child and _is_counted(breaker):
                self._places.leave(breaker.name)
            if admitted.leased:
                self._tell(request, breaker, admitted, verdict or _NOTHING_SAID, was_overdue=was_overdue)
            elif verdict is not None and not admitted.for_child:
                self._tell(request, breaker, admitted, verdict, was_overdue=was_overdue)

    def _tell(
        self, request: GatedRequest, breaker: Dependency, admitted: Pass, verdict: Verdict, *, was_overdue: bool = False
    ) -> None:
        """Report on a run; one that holds a permit or a slot is settled."""
        voter = "" if verdict.outcome is Outcome.SUCCESS else voter_of(request.id)
        if admitted.leased:
            reporter = self._runtime.fleet.reporter
            reporter.settle(breaker.spec, request.holder, admitted.epoch, verdict, voter=voter, was_overdue=was_overdue)
        else:
            breaker.report(admitted.epoch, verdict, voter=voter, was_overdue=was_overdue)


def _is_counted(breaker: Dependency) -> bool:
    """Whether the runs of a breaker's tasks are limited, in the fleet or here."""
    return breaker.policy.max_concurrency_per_worker is not None or breaker.policy.most_in_flight is not None


class Places:
    """How many runs this worker has in flight, by breaker whose runs are limited."""

    def __init__(self) -> None:
        self._taken: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, breaker: str, *, most: float) -> bool:
        """Count one more run, if there are not so many already."""
        with self._lock:
            is_free = self._taken[breaker] < most
            self._taken[breaker] += is_free
            return is_free

    def count(self, breaker: str) -> int:
        """Return how many there are."""
        return self._taken.get(breaker, 0)

    def leave(self, breaker: str) -> None:
        """Count one run less."""
        with self._lock:
            self._taken[breaker] -= 1
            if not self._taken[breaker]:
                del self._taken[breaker]  # there may be a breaker for every key that there ever was


def _ramps_out(standing: CachedState, envelope: Envelope, task_id: str) -> bool:
    """Whether the ramp after a recovery keeps this task out; those that waited for this breaker have their own pace.

    The lot is drawn from the task's id, so that it falls alike wherever it is asked for.
    """
    share = standing.ramp_share()
    if share >= 1.0 or (envelope.resumed == standing.epoch and envelope.breaker == standing.name):
        return False
    return crc32(f"{standing.epoch}:{task_id}".encode()) >= share * 2**32


def _trial_limit(request: GatedRequest, breaker: Dependency) -> float:
    """Longest time in seconds for which a trial's permit is renewed."""
    hard, soft = limits_of(request.task, request.time_limits)
    return float(hard or soft or breaker.policy.trial_timeout)


OVERDUE = Verdict(Outcome.OVERDUE)


class Overruns:
    """The runs of one worker that are watched, each for one of the breakers that have admitted it.

    Not those of tasks whose own guards have turned out to report on the breaker: how long they take says nothing.
    """

    def __init__(self) -> None:
        self._watches: dict[tuple[GatedRequest, str], Watch] = {}
        self._guarded_inside: set[tuple[str, str]] = set()  # task, and breaker without its key: as many as the code has

    def watches(self, request: GatedRequest, breaker: str) -> bool:
        """Whether a run would be watched, as far as is known of its task."""
        return _guard_inside(request, breaker) not in self._guarded_inside

    def begin(
        self, request: GatedRequest, breaker: str, seconds: float, report: Callable[[], object], *, once: bool
    ) -> None:
        """Watch a run that begins now; ``report`` is called each time that it has taken so many seconds more."""
        self._watches[request, breaker] = overdue.begin(seconds, report, once=once)

    def end(self, request: GatedRequest, breaker: str, verdict: Verdict | None) -> bool:
        """Watch a run no longer; return whether it has been overdue. Without a verdict guards inside have reported."""
        watch = self._watches.pop((request, breaker), None)
        if watch is None:
            return False
        if verdict is None:
            self._guarded_inside.add(_guard_inside(request, breaker))
        return overdue.end(watch)


def _guard_inside(request: GatedRequest, breaker: str) -> tuple[str, str]:
    return request.task.name, parent_of(breaker) or breaker
