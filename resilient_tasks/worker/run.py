"""What the main process and a pool process tell each other about one run of a task.

``Admission`` goes in with the task, ``Report`` comes back with its result, ``TaskDeferred`` is how
the body says that the message must be put aside. All three cross a pipe. The first two do so with every
run, and packed into plain tuples: pickling an instance costs several times as much.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from billiard.einfo import ExceptionInfo
from celery.exceptions import Ignore

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, parent_of
from resilient_tasks.errors import BreakerOpenError
from resilient_tasks.fallback import Served
from resilient_tasks.monitor.log import about
from resilient_tasks.scope import Pass, Scope, within
from resilient_tasks.worker import seams

logger = logging.getLogger("resilient_tasks")

Packed = tuple[Any, ...]

#: What Celery stumbles into over forged callbacks and groups; the run would never end for the pool, and keep its slot.
NONSENSE = (AttributeError, LookupError, TypeError, ValueError)


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
    trace = seams.tracer(seams.current_app())
    with within(run):
        try:
            failed, value, runtime = trace(name, task_id, *args)
        except NONSENSE:
            what = "Task %s[%s] has run, and its callbacks make no sense"
            logger.exception(what, name, task_id, extra=about(task_id, name))
            failed, value, runtime = 1, ExceptionInfo(internal=True), 0.0
    return failed, value, runtime, run.report().pack()
