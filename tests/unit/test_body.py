"""What a guarded body's run leads to, in a pool process and eagerly, without a worker."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import pytest
import tenacity
from billiard.einfo import ExceptionInfo
from celery import Celery
from celery.app.task import Context
from celery.app.trace import trace_task_ret
from celery.exceptions import Ignore, Retry
from celery.signals import task_postrun

from resilient_tasks import Breaker, BreakerOpenError, ConfigurationError, Outcome, Resilience, constant
from resilient_tasks.core.classification import Verdict
from resilient_tasks.dependency import Admitted
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.execution import WENT_WELL, Admission, Deferred, Report, run_admitted

pytestmark = pytest.mark.usefixtures("clock")  # breakers are in memory
TASK_ID = "d3f0"
SUCCESS, FAILURE = Verdict(Outcome.SUCCESS), Verdict(Outcome.FAILURE, "ConnectionError")


def admitted(*, attempts: int = 0, trial: bool = False, counts: bool = False, epoch: int = 0) -> Admission:
    return Admission((Admitted("payments", epoch, trial=trial, counts=counts),), attempts=attempts)


def gated(task: Any, admission: Admission) -> tuple[Any, Report]:
    """Run a task as a pool process does; return what it returned or raised, and the report."""

    def trace(_name: str, task_id: str) -> tuple[int, Any, float]:
        task.request_stack.push(Context(id=task_id, called_directly=False, retries=0))
        try:
            return 0, task(), 0.0
        except Exception:
            return 1, ExceptionInfo(), 0.0
        finally:
            task.request_stack.pop()

    with mock.patch.object(celery_internals, "tracer", return_value=trace):
        _, value, _, report = run_admitted(admission, task.name, TASK_ID)
    report = report or WENT_WELL
    error = getattr(value, "exception", value)
    return report.deferred or getattr(error, "exc", error), report._replace(deferred=None)


@pytest.fixture
def make(app: Celery) -> Callable[..., Any]:
    """Make a guarded task, by decorating its body."""
    return lambda **options: app.task(shared=False, **{"breaker": "payments", "name": "t", **options})


def seven() -> int:
    return 7


def failing(error: Exception) -> Callable[[], None]:
    def body() -> None:
        raise error

    return body


def test_a_success_is_reported(make: Any) -> None:
    task = make()(seven)
    assert gated(task, admitted()) == (7, Report((SUCCESS,)))


def test_a_dependency_failure_defers_the_task(make: Any) -> None:
    task = make()(failing(ConnectionError()))
    deferred, report = gated(task, admitted(attempts=2, counts=True))
    assert isinstance(deferred, Deferred)
    assert (deferred.breaker, deferred.attempts, deferred.cause) == ("payments", 3, "ConnectionError")
    assert report == Report((FAILURE,))


def test_the_last_attempt_fails_for_good(make: Any) -> None:
    task = make(max_attempts=3)(failing(ConnectionError("still")))
    error, report = gated(task, admitted(attempts=2, counts=True))
    assert isinstance(error, ConnectionError)
    assert report == Report((FAILURE,), exhausted_by="ConnectionError", exhausted_for="payments")


def test_a_users_classify_is_asked_once_about_a_failed_run(make: Any, resilience: Resilience) -> None:
    asked: list[BaseException] = []

    def classify(exc: BaseException) -> Outcome:
        asked.append(exc)
        return Outcome.FAILURE

    resilience.breaker("mail", classify=classify)
    error = ValueError("no such mailbox")
    task = make(breaker="mail")(failing(error))
    deferred, _ = gated(task, Admission((Admitted("mail"),)))
    assert (deferred.breaker, deferred.cause) == ("mail", "ValueError")
    assert asked == [error]


@pytest.mark.parametrize("options", [{"on_failure": "raise"}, {"autoretry_for": (ConnectionError,), "max_retries": 0}])
def test_attempts_are_used_up_only_where_failures_are_deferred(make: Any, options: dict[str, Any]) -> None:
    task = make(max_attempts=1, **options)(failing(ConnectionError()))
    error, report = gated(task, admitted(counts=True))
    assert isinstance(error, ConnectionError)
    assert report.exhausted_by == ""


def test_a_refused_run_is_deferred_failed_or_served(make: Any) -> None:
    refused = Admission((), BreakerOpenError("payments", "HALF_OPEN", 1.0))
    for options, kind in (({}, Deferred), ({"on_open": "fail"}, BreakerOpenError)):
        task = make(name=f"t-{kind.__name__}", **options)(failing(AssertionError("ran")))
        value, report = gated(task, refused)
        assert isinstance(value, kind)
        assert report == Report()
    task = make(name="served", fallback=constant(1))(failing(AssertionError("ran")))
    assert gated(task, refused) == (1, Report(source="constant", served_for="payments"))


class WrapperError(ConnectionError):
    """What users make of the errors that their clients raise."""

    def __init__(self, original: Exception) -> None:
        super().__init__("no answer")
        self.original_exception = original


def raised_from(refusal: Exception) -> Callable[[], None]:
    def body() -> None:
        raise RuntimeError("order not sent") from refusal

    return body


def raised_while_handling(refusal: Exception) -> Callable[[], None]:
    def body() -> None:
        try:
            raise refusal
        except BreakerOpenError:
            raise RuntimeError("order not sent")  # noqa: B904

    return body


def raised_by_tenacity(refusal: Exception) -> Callable[[], None]:
    again = tenacity.retry(stop=tenacity.stop_after_attempt(1))(failing(refusal))

    def body() -> None:
        again()

    return body


def kept_as_attribute(refusal: Exception) -> Callable[[], None]:
    return failing(WrapperError(refusal))


wrapped = pytest.mark.parametrize("wrap", [raised_from, raised_while_handling, raised_by_tenacity, kept_as_attribute])


@wrapped
def test_a_wrapped_refusal_is_a_refusal(make: Any, wrap: Any) -> None:
    body = wrap(BreakerOpenError("payments"))
    deferring = make()(body)
    deferred, report = gated(deferring, admitted(counts=True))
    assert (deferred.breaker, deferred.attempts, deferred.cause) == ("payments", 0, "")
    assert [verdict.outcome for verdict in report.verdicts if verdict] == [Outcome.IGNORED]
    serving = make(name="u", fallback=constant("n/a"))(body)
    assert gated(serving, admitted())[0] == "n/a"
    failing_ = make(name="v", on_open="fail")(body)
    assert not isinstance(gated(failing_, admitted())[0], Deferred)


def test_a_mistake_made_while_a_refusal_was_handled_is_a_mistake(make: Any) -> None:
    @make()
    def fails() -> None:
        try:
            failing(BreakerOpenError("payments"))()
        except BreakerOpenError:
            raise KeyError("order")  # noqa: B904

    assert isinstance(gated(fails, admitted())[0], KeyError)


@pytest.mark.parametrize("state", ["AT_CAPACITY", "HALF_OPEN", "OPEN"])
def test_a_task_backs_off_when_its_breaker_admits_it_and_refuses_its_body(make: Any, state: str) -> None:
    task = make()(failing(BreakerOpenError("payments", state, 0.0)))
    assert gated(task, admitted())[0].backs_off is (state != "OPEN")


def test_a_breaker_that_opened_on_the_way_refuses(make: Any, payments: Breaker) -> None:
    task = make()(failing(AssertionError("ran")))
    force(payments, "OPEN")
    value, report = gated(task, admitted())
    assert isinstance(value, Deferred)
    assert not value.cause
    assert report == Report((None,))


def test_a_guard_inside_a_trial_decides_it(make: Any, payments: Breaker, clock: Clock) -> None:
    @make()
    def swallows() -> str:
        with suppress(ConnectionError):
            payments.call(failing(ConnectionError()))
        return "swallowed"

    force(payments, "OPEN")
    clock.advance(1000)
    value, report = gated(swallows, admitted(trial=True, epoch=payments.snapshot().epoch))
    assert value == "swallowed"
    assert report == Report((FAILURE,))


def test_a_guard_inside_an_ordinary_run_speaks_for_itself(make: Any, payments: Breaker) -> None:
    @make()
    def guarded() -> int:
        return payments.call(lambda: 3)

    assert gated(guarded, admitted()) == (3, Report((None,)))


def test_a_refusal_by_a_foreign_breaker_is_the_tasks_own_error(make: Any) -> None:
    task = make()(failing(BreakerOpenError("elsewhere")))
    value, _ = gated(task, admitted())
    assert isinstance(value, BreakerOpenError)


@pytest.mark.parametrize("error", [Retry(exc=ConnectionError()), Ignore(), BreakerOpenError("payments")])
def test_quick_attempts_never_repeat_control_flow(make: Any, error: Exception) -> None:
    calls = []

    @make(retrying=tenacity.Retrying(stop=tenacity.stop_after_attempt(5)))
    def once() -> None:
        calls.append(1)
        raise error

    gated(once, admitted())
    assert calls == [1]


def test_provenance_of_an_eager_task(make: Any, resilience: Resilience) -> None:
    task = make(fallback=constant("n/a"))(failing(ConnectionError()))
    result = task.apply()
    assert result.get() == "n/a"
    provenance = resilience.provenance(result.id)
    assert provenance is not None
    assert (provenance.source, provenance.breaker) == ("constant", "payments")


def test_an_unknown_breaker_is_named(make: Any) -> None:
    task = make(breaker="unknown")(seven)
    with pytest.raises(ConfigurationError, match="unknown"):
        task()


# --- several breakers ---------------------------------------------------------------------------------------


@pytest.fixture
def accounts(resilience: Resilience, clock: Clock) -> Breaker:
    return resilience.breaker("accounts", consecutive_failures=3, open_jitter=0)


BOTH = Admission((Admitted("payments"), Admitted("accounts", counts=True)))
SAYS_NOTHING = Verdict(Outcome.IGNORED, "ConnectionError")


def test_the_outcome_goes_to_all_that_admitted(make: Any, accounts: Breaker) -> None:
    task = make(breaker=["payments", accounts])(seven)
    assert gated(task, BOTH) == (7, Report((SUCCESS, SUCCESS)))
    task = make(breaker=["payments", accounts], name="u")(failing(ConnectionError()))
    deferred, report = gated(task, BOTH)
    assert (deferred.breaker, report.verdicts) == ("payments", (FAILURE, FAILURE))


@pytest.mark.parametrize("error", [ConnectionError(), ValueError()])
def test_a_failure_inside_a_guard_is_that_breakers_alone(make: Any, accounts: Breaker, error: Exception) -> None:
    @make(breaker=["payments", accounts], max_attempts=2)
    def wraps() -> None:
        try:
            accounts.call(failing(ConnectionError()))
        except ConnectionError as exc:
            raise error from exc

    deferred, report = gated(wraps, BOTH)
    assert (deferred.breaker, deferred.attempts, deferred.cause) == ("accounts", 1, "ConnectionError")
    assert report.verdicts == (Verdict(Outcome.IGNORED, type(error).__name__), None)
    assert gated(wraps, BOTH._replace(attempts=1))[1].exhausted_for == "accounts"


def test_a_mistake_after_a_failure_inside_is_nobodys(make: Any, accounts: Breaker) -> None:
    @make(breaker=["payments", accounts])
    def fails() -> None:
        try:
            accounts.call(failing(ConnectionError()))
        except ConnectionError as exc:
            raise KeyError("order") from exc

    assert isinstance(gated(fails, BOTH)[0], KeyError)


def test_a_guard_inside_a_trial_of_two_decides_its_own(make: Any, accounts: Breaker) -> None:
    @make(breaker=["payments", accounts])
    def guarded() -> None:
        accounts.call(failing(ConnectionError()))

    admission = Admission((Admitted("payments", trial=True), Admitted("accounts", trial=True)))
    assert gated(guarded, admission)[1].verdicts == (SAYS_NOTHING, FAILURE)


def test_any_breaker_that_opened_on_the_way_refuses(make: Any, accounts: Breaker) -> None:
    task = make(breaker=["payments", accounts])(failing(AssertionError("ran")))
    force(accounts, "OPEN")
    deferred, report = gated(task, BOTH)
    assert deferred.breaker == "accounts"
    assert report.verdicts == (None, None)


def test_quick_attempts_end_when_any_breaker_opens(make: Any, accounts: Breaker) -> None:
    calls = []

    @make(breaker=["payments", accounts], retrying=tenacity.Retrying(stop=tenacity.stop_after_attempt(5)))
    def flaky() -> None:
        calls.append(1)
        if len(calls) == 2:
            force(accounts, "OPEN")
        raise ConnectionError

    gated(flaky, BOTH)
    assert len(calls) == 2


def test_an_eager_task_is_guarded_by_all(make: Any, payments: Breaker, accounts: Breaker, clock: Clock) -> None:
    @make(breaker=["payments", accounts])
    def fails() -> None:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        fails()
    clock.settle()
    assert [breaker.snapshot().failures for breaker in (payments, accounts)] == [1, 1]
    force(accounts, "OPEN")
    with pytest.raises(BreakerOpenError, match="accounts"):
        fails()
    clock.settle()
    assert payments.snapshot().calls == 1


def test_celerys_tracer_lets_a_deferral_pass(make: Any, app: Celery) -> None:
    """It cleans up, and writes neither a result nor a traceback, which takes a millisecond to format."""
    task = make()(failing(ConnectionError()))
    ended: list[Any] = []
    task_postrun.connect(lambda **sent: ended.append(sent["task_id"]), sender=task, weak=False)
    tracer = partial(trace_task_ret, app=app)
    with (
        mock.patch.object(celery_internals, "tracer", return_value=tracer),
        mock.patch.object(app.backend, "store_result") as written,
    ):
        found = run_admitted(admitted(), task.name, TASK_ID, {"id": TASK_ID}, ((), {}, {}), None, None)
    assert found[3] is not None
    assert found[3].deferred == Deferred("payments", "the task failed: ConnectionError", 0, "ConnectionError")
    assert len(pickle.dumps(found)) < 500
    assert not written.called
    assert ended == [TASK_ID]
    assert task.request_stack.top is None
