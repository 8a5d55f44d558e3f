"""What the main process and a pool process tell each other about one run of a task.

``Admission`` goes in with the task, ``Report`` comes back with its result, ``TaskDeferred`` is how
the body says that the message must be put aside. All three cross a pipe. The first two do so with every
run, and packed into plain tuples: pickling an instance costs several times as much.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import tenacity
from billiard.einfo import ExceptionInfo
from celery import Task
from celery.exceptions import Ignore, MaxRetriesExceededError, Reject, Retry

from resilient_tasks.call import Call
from resilient_tasks.core.classification import Verdict, attributed_to, refusal_in
from resilient_tasks.core.model import Outcome, State, parent_of
from resilient_tasks.core.outage import FAILED
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError, ResilienceError
from resilient_tasks.fallback import Served, write_provenance
from resilient_tasks.guard import call_guarded
from resilient_tasks.monitor import tracing
from resilient_tasks.monitor.log import about
from resilient_tasks.scope import Pass, Scope, current_scope, within
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.options import DEFER

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency

logger = logging.getLogger("resilient_tasks")

Packed = tuple[Any, ...]

#: What Celery raises over forged callbacks and groups; the run would never end for the pool, and keep its slot.
INVALID_CALLBACKS = (AttributeError, LookupError, TypeError, ValueError)


def limits_of(task: Any, sent: Sequence[float | None] | None) -> tuple[float | None, float | None]:
    """Return the hard and the soft time limit of a run in seconds: those sent with its message, else its task's."""
    hard, soft = (*(sent or ()), None, None)[:2]
    return hard or task.time_limit, soft or task.soft_time_limit


class Admission(NamedTuple):
    """The gate's answer to one run.

    Args:
        passes: one of each of the task's breakers, in the task's order; empty when one has refused.
        refused_by: the first breaker that refused; "" when all have admitted.
        refused_in: the state in which it refused.
        retry_after: seconds until it may admit again.
        attempts: dependency failures of this task that counted so far.
        trace: ``traceparent`` of what the task did before it was deferred; "" if it never was, or nobody traces.
    """

    passes: tuple[Pass, ...] = ()
    refused_by: str = ""
    refused_in: str = ""
    retry_after: float | None = None
    attempts: int = 0
    trace: str = ""

    @property
    def refusal(self) -> BreakerOpenError | None:
        """The refusal as the error that it is; None when the run was admitted."""
        return BreakerOpenError(self.refused_by, self.refused_in, self.retry_after) if self.refused_by else None

    def pass_of(self, breaker: str) -> Pass | None:
        """Return the pass of a breaker; None if it has given none."""
        return next((one for one in self.passes if one.breaker == breaker), None)

    @property
    def answerable(self) -> str:
        """The first breaker for which an outcome of the run counts, whatever it was waiting for."""
        return next(one.breaker for one in self.passes if not one.for_child)

    def attempts_after_failure(self, breaker: str) -> int:
        """Return the attempts that count if this run fails, and the failure is put to ``breaker``."""
        judge = self.pass_of(breaker) or next(iter(self.passes), None)
        return self.attempts + (judge is not None and judge.counts)

    def pack(self) -> Packed:
        """Return the same as a tuple of plain values."""
        return (tuple(map(tuple, self.passes)), *self[1:])

    @classmethod
    def unpack(cls, packed: Packed) -> Admission:
        """Return what was packed."""
        passes, *others = packed
        return cls(tuple(map(Pass._make, passes)), *others)


class Report(NamedTuple):
    """What a run found out about its dependencies.

    Args:
        verdicts: one for each pass of its admission, in the same order; None when the body did not run, or
            when guards inside it have told already.
        source: the fallback that answered; "" if none did.
        age: age of a cached answer, seconds.
        served_for: the breaker whose refusal or failure the fallback answered.
        exhausted_by: the failure that has used up the task's ``max_attempts``; "" if none has.
        exhausted_for: the breaker that this failure is put to.
    """

    verdicts: tuple[Verdict | None, ...] = ()
    source: str = ""
    age: float | None = None
    served_for: str = ""
    exhausted_by: str = ""
    exhausted_for: str = ""

    @classmethod
    def of_all(cls, verdict: Verdict, passes: Sequence[Pass]) -> Report:
        """Return the report of a run about which there is one verdict, the same for every breaker."""
        return cls((verdict,) * len(passes))

    def pack(self) -> Packed:
        """Return the same as a tuple of plain values, an empty one for what nearly every report says."""
        return () if self == _WENT_WELL else (tuple(map(_pack_verdict, self.verdicts)), *self[1:])

    @classmethod
    def unpack(cls, packed: Packed) -> Report:
        """Return what was packed."""
        if not packed:
            return _WENT_WELL
        verdicts, *others = packed
        return cls(tuple(map(_unpack_verdict, verdicts)), *others)


_WENT_WELL = Report((Verdict(Outcome.SUCCESS),))


def _pack_verdict(verdict: Verdict | None) -> Packed | None:
    return None if verdict is None else (verdict.outcome.value, *verdict[1:])


def _unpack_verdict(packed: Packed | None) -> Verdict | None:
    return None if packed is None else Verdict(Outcome(packed[0]), *packed[1:])


class TaskDeferred(Ignore):  # type: ignore[misc]  # Celery is untyped
    """Raised by a task's run when its message must be put aside.

    An ``Ignore``, because Celery writes no result for it and fires no callbacks; an ordinary exception
    would have written FAILURE in the pool process already.

    Args:
        breaker: the breaker to wait for.
        reason: why, for people.
        attempts: dependency failures of this task that have counted, this one included.
        cause: what the failure of the task itself was, e.g. ``"ReadTimeout"``; "" if it was refused.
        trace: ``traceparent`` of the run; "" if nobody traces.
        backs_off: the breaker admits the task, and refuses what its body does: each time it waits longer.
    """

    def __init__(
        self, breaker: str, reason: str, attempts: int = 0, cause: str = "", trace: str = "", *, backs_off: bool = False
    ) -> None:
        super().__init__(breaker, reason, attempts, cause, trace)
        self.backs_off = backs_off
        self.breaker = breaker
        self.reason = reason
        self.attempts = attempts
        self.cause = cause
        self.trace = trace

    def __str__(self) -> str:
        return f"deferred, waits for breaker {self.breaker!r}: {self.reason}"


class Run(Scope):
    """One run of a guarded task in the pool, between its admission and its report.

    Attributes:
        begun: the body has begun.
        verdicts: on the task as a whole, one for each pass.
        served: what a fallback has answered.
        served_for: the breaker whose refusal or failure it has answered.
        exhausted_by: the failure that has used up the task's attempts.
        exhausted_for: the breaker that it is attributed to.
    """

    __slots__ = (
        "_found", "_reported", "admission", "begun", "exhausted_by", "exhausted_for", "served", "served_for",
        "verdicts",
    )  # fmt: skip

    def __init__(self, admission: Admission, task_id: str) -> None:
        super().__init__(admission.passes, task_id)
        self.admission = admission
        self.begun = False
        self.verdicts: Sequence[Verdict | None] = ()
        self.served: Served | None = None
        self.served_for = self.exhausted_by = self.exhausted_for = ""
        self._reported: set[str] = set()  # breakers whose own guards have reported
        self._found: dict[str, Verdict] = {}  # the worst that guards inside trials have found

    def begin(self, task_id: str | None) -> bool:
        """Claim the run for the task body; False for calls of other tasks, or of itself, inside it."""
        if self.begun or task_id != self.task_id:
            return False
        self.begun = True
        return True

    def replaced(self, breaker: str) -> None:
        """A guard inside the body has reported; what counts for a child need not count for its parent."""
        self._reported |= {breaker, parent_of(breaker) or breaker}

    def found(self, breaker: str, verdict: Verdict) -> None:
        """A guard inside the trial has come to a verdict, which replaces that on the task as a whole."""
        worst = self._found.get(breaker)
        if worst is None or worst.outcome is not Outcome.FAILURE:
            self._found[breaker] = verdict

    def report(self) -> Report:
        """Return what the main process should know."""
        served = (self.served.source, self.served.age, self.served_for) if self.served else ("", None, "")
        passes = self.admission.passes
        verdicts = tuple(map(self._verdict, passes, self.verdicts or [None] * len(passes)))
        return Report(verdicts, *served, self.exhausted_by, self.exhausted_for)

    def _verdict(self, admitted: Pass, verdict: Verdict | None) -> Verdict | None:
        if admitted.trial:
            return self._found.get(admitted.breaker, verdict)
        return None if admitted.breaker in self._reported else verdict


def run_admitted(admission: Packed, name: str, task_id: str, *args: Any) -> tuple[int, Any, float, Packed]:
    """Run a task in the pool with Celery's own tracer, and report on its dependency."""
    run = Run(Admission.unpack(admission), task_id)
    trace = celery_internals.tracer(celery_internals.current_app())
    with within(run):
        try:
            failed, value, runtime = trace(name, task_id, *args)
        except INVALID_CALLBACKS:
            what = "Task %s[%s] has run, and its callbacks are invalid"
            logger.exception(what, name, task_id, extra=about(task_id, name))
            failed, value, runtime = 1, ExceptionInfo(internal=True), 0.0
    return failed, value, runtime, run.report().pack()


_CONTROL_FLOW = (Ignore, Reject, Retry, ResilienceError)
_GLANCE = 0.1  # seconds between two looks at the breakers during a wait


def bounded(retrying: tenacity.Retrying, breakers: Sequence[Dependency], limit: float | None) -> tenacity.Retrying:
    """Return a task's ``retrying`` within bounds: no attempt after a breaker opened, no wait past the time limit.

    Args:
        retrying: as the user wrote it; a ``sleep`` of the user's own is kept.
        breakers: all must admit before each attempt, and during each wait.
        limit: seconds that the run may take; ``None``: no limit.
    """
    stop = _StopWhenOpen(breakers, retrying.stop)
    return retrying.copy(
        stop=stop if limit is None else tenacity.stop_any(stop, tenacity.stop_before_delay(limit)),
        retry=_RetryErrors(retrying.retry),
        sleep=partial(_sleep, breakers) if retrying.sleep is tenacity.nap.sleep else retrying.sleep,
        reraise=True,
    )


def time_limit(task: Any) -> float | None:
    """Return the shortest time limit of a task's run, in seconds; None if it has none."""
    return min((float(limit) for limit in limits_of(task, task.request.timelimit) if limit), default=None)


def _all_admit(breakers: Sequence[Dependency]) -> bool:
    return all(guard.standing.admits for breaker in breakers for guard in breaker.guards)


def _sleep(breakers: Sequence[Dependency], seconds: float) -> None:
    """Wait for the next attempt; no longer than the breakers admit it, which will then refuse it."""
    end = time.monotonic() + seconds
    while _all_admit(breakers) and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _GLANCE))


class _StopWhenOpen(tenacity.stop.stop_base):
    """Ends quick attempts when the user's own condition does, or as soon as a breaker no longer admits."""

    def __init__(self, breakers: Sequence[Dependency], otherwise: Any) -> None:
        self._breakers = breakers
        self._otherwise = otherwise

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return not _all_admit(self._breakers) or bool(self._otherwise(retry_state))


class _RetryErrors(tenacity.retry_base):
    """Repeats what the user's own condition does, but no control flow: ``self.retry()`` has sent a message already."""

    def __init__(self, otherwise: Any) -> None:
        self._otherwise = otherwise

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        is_over = isinstance(error, _CONTROL_FLOW) or (error is not None and refusal_in(error) is not None)
        return not is_over and bool(self._otherwise(retry_state))


_REFUSING = (State.OPEN, State.FORCED_OPEN)
_ADMITTING_TASKS = (AT_CAPACITY, State.HALF_OPEN)  # a breaker that has refused a guard may admit its task again at once
_BODY = "_resilient_tasks_body"  # of a request: the body that runs for it


def run_guarded(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the body of a guarded task: its ``__call__``.

    Raises:
        BreakerOpenError: the breaker refused and nothing else answers.
        TaskDeferred: the message must be put aside; only from a worker's pool.
        ConfigurationError: nobody defines the task's breaker.
    """
    run = current_scope()
    if isinstance(run, Run) and run.begin(task.request.id):
        return _GatedBody(task, args, kwargs, run).run()
    return _UngatedBody(task, args, kwargs).run()


class DeferredRetry(Retry):  # type: ignore[misc]  # Celery is untyped
    """Ends a run that would have retried while its breaker is open: a ``Retry`` of which no message is published.

    Args:
        exc: the failure; it counts.
        refusal: what the next run would meet with.
    """

    def __init__(self, exc: BaseException, refusal: BreakerOpenError) -> None:
        super().__init__(exc=exc)
        self._refused = refusal.args  # its parts: an exception in an attribute would be part of the failure

    @property
    def refusal(self) -> BreakerOpenError:
        """The refusal."""
        return BreakerOpenError(*self._refused)


def defer_retry(task: Any, exc: BaseException | None, *, same_message: bool) -> None:
    """Have a run that asks for a retry put aside instead, if a breaker that it needs is open.

    Args:
        task: that asks for it.
        exc: why; None without a failure.
        same_message: whether the retry would be the same message again; a changed one is Celery's to send, unless
            no retry is left.

    Raises:
        DeferredRetry: a breaker is open.
    """
    body = getattr(task.request, _BODY, None)
    if body is None or exc is None or not same_message or task.options.on_open != DEFER:
        return
    refusal = body.refusal_behind(exc)
    if refusal is not None:
        raise DeferredRetry(exc, refusal)


class _Body:
    """One run of a body, with its breakers and fallbacks around it."""

    def __init__(self, task: Any, args: Any, kwargs: Any) -> None:
        self.task, self.args, self.kwargs = task, args, kwargs
        self.options = task.options
        self.runtime = runtime_of(task.app)
        self.breakers = self._breakers()
        self._verdicts: dict[str, Verdict] = {}  # on the exception that has ended the run, by breaker

    def _breakers(self) -> list[Dependency]:
        """Return the breakers that answer for this call."""
        return self.runtime.breakers_of(self.task, self.args, self.kwargs)

    def run(self) -> Any:
        """Run it and answer for it."""
        try:
            value = self.attempts()
        except DeferredRetry as retry:
            refusal = retry.refusal
            return self.answer(refusal.breaker, partial(self.refused, refusal, refusal))
        except Retry:
            raise  # Celery has sent the task off again: this run has no answer of its own
        except Exception as exc:
            found = refusal_in(exc)
            if found is not None:
                return self.answer(found.breaker, partial(self.refused, found, exc))
            culprit = self.culprit(exc)
            if culprit is None:
                raise
            return self.answer(culprit.name, partial(self.failed, exc, culprit))
        if self.options.fallback:
            self.options.fallback.remember(self.call, value, self.runtime.fleet.store)
        return value

    @property
    def call(self) -> Call:
        """What a fallback answers for."""
        return Call(self.task.name, self.task.run, self.args, self.kwargs, self.task.request.id or "")

    def judge(self, breaker: Dependency, exc: BaseException) -> Verdict:
        """Tell what the exception that has ended the run says about a dependency; a user's function is asked once."""
        if breaker.name not in self._verdicts:
            self._verdicts[breaker.name] = breaker.judge(exc)
        return self._verdicts[breaker.name]

    def culprit(self, exc: BaseException) -> Dependency | None:
        """Return the breaker whose dependency has failed the run: that of a guard inside, else the first to say so."""
        inside = attributed_to(exc)
        asked = self.breakers
        if inside is not None:
            asked = [self.runtime.breaker(inside)] if self.runtime.defines(inside) else []
        return next((breaker for breaker in asked if self.judge(breaker, exc).outcome is Outcome.FAILURE), None)

    def attempts(self) -> Any:
        """Make the one attempt, or the quick ones of ``retrying=``."""
        retrying = self.options.retrying
        if retrying is None:
            return self.attempt()
        return bounded(retrying, self.breakers, time_limit(self.task))(self.attempt)

    def attempt(self) -> Any:
        """Call the body once."""
        return call_guarded(self.breakers, self.function, self.args, self.kwargs)

    @property
    def function(self) -> Callable[..., Any]:
        """The ``__call__`` of a user's base class, else what Celery would call."""
        function: Callable[..., Any] = self.task.own_call or self.task.run
        return function

    def answer(self, breaker: str, otherwise: Callable[[], Any]) -> Any:
        """Return what a fallback serves; if none does, what ``otherwise`` makes of it."""
        served = self.options.fallback.answer(self.call, self.runtime.fleet.store)
        if served is None:
            return otherwise()
        self.runtime.count_answer(served, breaker)
        if self.task.request.id:
            ttl = self.runtime.result_ttl
            write_provenance(self.runtime.fleet.store, self.task.request.id, served, breaker, ttl)
        self.serve(served, breaker)
        return served.value

    def serve(self, served: Any, breaker: str) -> None:
        """Take note that a fallback has answered."""

    def refused(self, _refusal: BreakerOpenError, exc: Exception) -> NoReturn:
        """End a run that ``exc`` has ended, which is or wraps a refusal, and no fallback has answered."""
        raise exc

    def failed(self, exc: Exception, _culprit: Dependency) -> NoReturn:
        """End a run that has failed through a dependency, and no fallback has answered."""
        raise exc


class _UngatedBody(_Body):
    """A run that passed no gate: eager, or a direct call."""

    @property
    def function(self) -> Callable[..., Any]:
        """A direct call gets a request of its own, as Celery's own ``__call__`` gives it."""
        if self.task.own_call is None and not self.task.request.is_eager:
            return partial(Task.__call__, self.task)
        return super().function


class _GatedBody(_Body):
    """A run that came through the gate and reports to it."""

    def __init__(self, task: Any, args: Any, kwargs: Any, run: Run) -> None:
        self.gated = run
        super().__init__(task, args, kwargs)
        setattr(task.request, _BODY, self)

    def _breakers(self) -> list[Dependency]:
        passes = self.gated.admission.passes
        self.guards = [self.runtime.breaker(admitted.breaker) for admitted in passes]
        answerable = [guard for guard, admitted in zip(self.guards, passes, strict=True) if not admitted.for_child]
        return answerable or super()._breakers()

    def attempts(self) -> Any:
        """Attempt it if it is still admitted, and judge the run as a whole."""
        tracing.record_run({each.name: each.state for each in self.breakers}, self.gated.admission.trace)
        refusal = self.gated.admission.refusal or self._refusal_since()
        if refusal is not None:
            raise refusal
        started = perf_counter()
        try:
            value = super().attempts()
        except BaseException as exc:
            self.gated.verdicts = [self.judge(guard, exc) for guard in self.guards]
            raise
        seconds = perf_counter() - started
        self.gated.verdicts = [guard.judge_success(seconds, value) for guard in self.guards]
        return value

    def attempt(self) -> Any:
        """Call the body; quick attempts are outcomes of their own, but for those of a trial, which has one."""
        if self.options.retrying is None or any(admitted.trial for admitted in self.gated.admission.passes):
            return self.function(*self.args, **self.kwargs)
        return super().attempt()

    def serve(self, served: Any, breaker: str) -> None:
        """Have the main process tell of it."""
        self.gated.served, self.gated.served_for = served, breaker

    def refused(self, refusal: BreakerOpenError, exc: Exception) -> NoReturn:
        """Defer the task until the breaker that refused admits, if that is one of this app."""
        if self.options.on_open != DEFER or not self.runtime.defines(refusal.breaker):
            self.runtime.fleet.reporter.tally(refusal.breaker, FAILED)
            raise exc
        trace = tracing.record_deferral(refusal.breaker, str(refusal))
        attempts, is_inside = self.gated.admission.attempts, refusal.state in _ADMITTING_TASKS
        raise TaskDeferred(refusal.breaker, str(refusal), attempts, trace=trace, backs_off=is_inside) from exc

    def failed(self, exc: Exception, culprit: Dependency) -> NoReturn:
        """Defer the task, unless it has used up its attempts, or its retries before the breaker opened."""
        if self._has_retried(exc) and not self._is_open(culprit):
            raise exc
        name, cause = culprit.name, self.judge(culprit, exc).cause
        attempts = self.gated.admission.attempts_after_failure(name)
        defers = self.options.on_failure == DEFER
        if defers and attempts < self.options.max_attempts:
            reason = f"the task failed: {cause}"
            raise TaskDeferred(name, reason, attempts, cause, tracing.record_deferral(name, reason)) from exc
        if defers:
            self.gated.exhausted_by, self.gated.exhausted_for = cause, name
        self.runtime.fleet.reporter.tally(name, FAILED)
        raise exc

    def refusal_behind(self, exc: BaseException) -> BreakerOpenError | None:
        """Return the refusal that has led to an exception, or would meet another run at once; None if there is none."""
        refusal = refusal_in(exc)
        if refusal is not None and self.runtime.defines(refusal.breaker):
            return refusal
        culprit = self.culprit(exc)
        self._verdicts.clear()  # another exception may end the run
        return culprit.refuse() if culprit is not None and self._is_open(culprit) else None

    def _is_open(self, culprit: Dependency) -> bool:
        """Whether a breaker has opened since it admitted the run, or has admitted it as a trial."""
        admitted = self.gated.admission.pass_of(culprit.name)
        return (admitted is not None and admitted.trial) or culprit.state in (*_REFUSING, State.HALF_OPEN)

    def _refusal_since(self) -> BreakerOpenError | None:
        """Return the refusal of a breaker that has opened since the gate let this run through."""
        for guard, admitted in zip(self.guards, self.gated.admission.passes, strict=True):
            if not admitted.trial and guard.state in _REFUSING:
                return guard.refuse()
        return None

    def _has_retried(self, exc: Exception) -> bool:
        """Whether Celery's own retrying has had its say about this failure."""
        automatic = tuple(getattr(self.task, "autoretry_for", None) or ())
        return bool(self.task.request.retries > 0 or isinstance(exc, (MaxRetriesExceededError, *automatic)))
