"""Tasks without a worker: eager, called directly, with a base class of one's own, and tasks that need no breaker."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from celery import Celery, Task
from celery.app.trace import task_has_custom

from resilient_tasks import Breaker, BreakerOpenError, ConfigurationError, Resilience, ResilientTask, cached, constant
from resilient_tasks.core.model import Outcome
from resilient_tasks.testing import Clock, force

pytestmark = pytest.mark.usefixtures("clock")  # breakers are in memory
THREE_QUICK = tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())


@pytest.fixture
def app() -> Celery:
    app = Celery("tasks", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.task_always_eager = True
    return app


@pytest.fixture(params=["eagerly", "directly"])
def run(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a task in this process and return what it returns."""
    if request.param == "directly":
        return lambda task, *args, **kwargs: task(*args, **kwargs)
    return lambda task, *args, **kwargs: task.delay(*args, **kwargs).get()


class Dependency:
    """A function of one argument that fails as often as the test wants."""

    def __init__(self) -> None:
        self.failures_left = 0
        self.calls = 0

    def __call__(self, number: int) -> int:
        self.calls += 1
        if self.failures_left:
            self.failures_left -= 1
            raise ConnectionError("no answer")
        return number


@pytest.fixture
def dependency() -> Dependency:
    return Dependency()


@pytest.fixture
def task(app: Celery, dependency: Dependency) -> Callable[..., Any]:
    """Make a guarded task that calls the dependency."""

    def make(**options: Any) -> Any:
        @app.task(bind=True, name="call", shared=False, **{"breaker": "payments", **options})
        def call(self: Any, number: int) -> int:
            return dependency(number)

        return call

    return make


# --- eager and direct runs ------------------------------------------------------------------------


def test_a_run_is_counted(task: Any, run: Any, payments: Breaker, clock: Clock) -> None:
    assert run(task(), 7) == 7
    clock.settle()
    assert payments.snapshot().calls == 1


@pytest.mark.parametrize("on_open", ["defer", "fail"])
def test_while_open_it_is_refused(task: Any, run: Any, dependency: Dependency, payments: Breaker, on_open: str) -> None:
    call = task(on_open=on_open)
    force(payments, "OPEN")
    with pytest.raises(BreakerOpenError) as refused:
        run(call, 7)
    assert (refused.value.breaker, refused.value.state) == ("payments", "OPEN")
    assert 0 < (refused.value.retry_after or 0) <= 10
    assert dependency.calls == 0


def test_while_open_the_fallback_answers(task: Any, run: Any, payments: Breaker, clock: Clock) -> None:
    call = task(fallback=[cached(max_age=60), constant("n/a")])
    assert run(call, 7) == 7
    force(payments, "OPEN")
    assert run(call, 7) == 7
    assert run(call, 8) == "n/a"
    clock.advance(61)
    force(payments, "OPEN")
    assert run(call, 7) == "n/a"


def test_the_fallback_answers_for_a_failure_which_counts_all_the_same(
    task: Any, run: Any, dependency: Dependency, payments: Breaker
) -> None:
    call = task(fallback=constant("n/a"))
    dependency.failures_left = 3
    assert [run(call, number) for number in range(4)] == ["n/a"] * 4
    assert dependency.calls == 3
    assert payments.state == "OPEN"


def test_a_failure_without_fallback_is_the_callers(task: Any, run: Any, dependency: Dependency) -> None:
    call = task()
    dependency.failures_left = 3
    for _ in range(3):
        with pytest.raises(ConnectionError, match="no answer"):
            run(call, 7)
    with pytest.raises(BreakerOpenError):
        run(call, 7)
    assert dependency.calls == 3


def test_a_mistake_of_the_task_is_no_failure_of_the_dependency(
    app: Celery, run: Any, payments: Breaker, clock: Clock
) -> None:
    @app.task(name="broken", shared=False, breaker=payments, fallback=constant("n/a"))
    def broken() -> None:
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        run(broken)
    clock.settle()
    assert payments.snapshot().failures == 0


def test_retrying_makes_quick_attempts_that_all_count(
    task: Any, run: Any, dependency: Dependency, payments: Breaker, clock: Clock
) -> None:
    dependency.failures_left = 2
    assert run(task(retrying=THREE_QUICK), 7) == 7
    clock.settle()
    assert (dependency.calls, payments.snapshot().calls, payments.snapshot().failures) == (3, 3, 2)


def test_retrying_ends_when_the_breaker_opens(task: Any, run: Any, dependency: Dependency, payments: Breaker) -> None:
    call = task(retrying=tenacity.Retrying(stop=tenacity.stop_after_attempt(50), wait=tenacity.wait_none()))
    dependency.failures_left = 50
    with pytest.raises(ConnectionError):  # no task opens its breaker alone
        payments.call(dependency, 6)
    with pytest.raises(ConnectionError):
        run(call, 7)
    assert dependency.calls == 3
    assert payments.state == "OPEN"


def test_no_quick_attempt_is_waited_for_beyond_the_time_limit(task: Any, run: Any, dependency: Dependency) -> None:
    hourly = tenacity.Retrying(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_fixed(3600))
    dependency.failures_left = 1
    with pytest.raises(ConnectionError):
        run(task(retrying=hourly, time_limit=60, soft_time_limit=50), 7)
    assert dependency.calls == 1


def test_the_wait_for_a_quick_attempt_ends_when_the_breaker_opens(
    task: Any, run: Any, dependency: Dependency, payments: Breaker
) -> None:
    def trip(_: tenacity.RetryCallState) -> None:
        threading.Timer(0.2, payments.trip).start()

    hourly = tenacity.Retrying(stop=tenacity.stop_after_attempt(2), wait=tenacity.wait_fixed(3600), before_sleep=trip)
    dependency.failures_left = 1
    with pytest.raises(BreakerOpenError):
        run(task(retrying=hourly), 7)
    assert dependency.calls == 1


def test_after_the_open_time_the_next_runs_are_trials(task: Any, run: Any, payments: Breaker, clock: Clock) -> None:
    call = task()
    force(payments, "OPEN")
    clock.advance(payments.snapshot().retry_after or 0)
    assert payments.state == "HALF_OPEN"
    assert [run(call, number) for number in range(3)] == [0, 1, 2]
    clock.settle()
    assert payments.state == "CLOSED"


def test_a_refused_eager_task_is_a_failure(task: Any, payments: Breaker) -> None:
    force(payments, "OPEN")
    result = task().apply(args=(7,), throw=False)
    assert (result.state, type(result.result)) == ("FAILURE", BreakerOpenError)


def test_a_direct_call_sees_its_arguments_in_the_request(app: Celery, payments: Breaker) -> None:
    @app.task(bind=True, name="seen", shared=False, breaker=payments)
    def seen(self: Any, *args: int, **kwargs: int) -> tuple:
        return self.request.args, self.request.kwargs, self.request.called_directly

    assert seen(1, two=2) == ((1,), {"two": 2}, True)


# --- base classes -----------------------------------------------------------------------------------


class Context(ResilientTask):
    """Runs each task inside something, as web frameworks' recipes for Celery do."""

    abstract = True
    entered = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).entered += 1
        return self.run(*args, **kwargs)


class PoliteContext(Context):
    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        type(self).entered += 1
        return super(Context, self).__call__(*args, **kwargs)


@pytest.mark.parametrize("base", [Context, PoliteContext])
def test_a_base_class_may_have_a_call_of_its_own(task: Any, run: Any, payments: Breaker, base: type) -> None:
    call = task(base=base)
    assert run(call, 7) == 7
    assert type(call._get_current_object()).entered == 1
    force(payments, "OPEN")
    with pytest.raises(BreakerOpenError):
        run(call, 7)
    assert type(call._get_current_object()).entered == 1


def test_options_in_a_base_class_are_those_of_its_tasks(app: Celery) -> None:
    class Payment(ResilientTask):
        abstract = True
        breaker = "payments"
        on_open = "fail"

    @app.task(name="pay", shared=False, base=Payment)
    def pay() -> None: ...

    @app.task(name="pay_later", shared=False, base=Payment, on_open="defer")
    def pay_later() -> None: ...

    assert Payment.options is None
    assert (pay.options.breakers, pay.options.on_open) == (("payments",), "fail")
    assert (pay_later.options.breakers, pay_later.options.on_open) == (("payments",), "defer")


@pytest.mark.parametrize("part", ["Strategy", "Request"])
def test_a_guarded_task_needs_our_strategy_and_request(app: Celery, payments: Breaker, part: str) -> None:
    with pytest.raises(ConfigurationError, match=f"task 'mine': {part}='mine:own': a guarded task needs"):

        @app.task(name="mine", shared=False, lazy=False, breaker=payments, **{part: "mine:own"})
        def mine() -> None: ...


def test_autoretry_goes_on_working(app: Celery, run: Any, payments: Breaker, clock: Clock) -> None:
    tries: list[int] = []

    @app.task(
        name="insistent", shared=False, breaker=payments, autoretry_for=(ConnectionError,), retry_backoff=False,
        default_retry_delay=0, max_retries=1,
    )  # fmt: skip
    def insistent() -> int:
        tries.append(1)
        if len(tries) < 2:
            raise ConnectionError
        return len(tries)

    assert insistent.delay().get() == 2
    clock.settle()
    assert payments.snapshot().failures == 1


# --- tasks without a breaker ------------------------------------------------------------------------


def test_a_task_without_a_breaker_is_exactly_celerys(app: Celery) -> None:
    @app.task(name="plain", shared=False)
    def plain() -> None: ...

    other = Celery("other", set_as_current=False)

    @other.task(name="plain", shared=False)
    def same() -> None: ...

    assert (plain.Strategy, plain.Request) == (same.Strategy, same.Request)
    assert not task_has_custom(plain._get_current_object(), "__call__")
    assert type(plain._get_current_object()).__call__ is Task.__call__
    assert plain.options is None


@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_the_tick_task_is_not_guarded_and_goes_to_the_control_queue(app: Celery) -> None:
    app.conf.task_always_eager = False
    tick = app.tasks["resilient_tasks.tick"]
    assert not isinstance(tick, ResilientTask)
    tick.delay()
    with app.connection_for_read() as connection:
        message = connection.SimpleQueue("resilient.control").get(timeout=60)
    assert message.headers["task"] == "resilient_tasks.tick"


def test_a_policys_classify_sees_what_a_task_returns(
    app: Celery, resilience: Resilience, run: Any, clock: Clock
) -> None:
    def classify(result: Any) -> Outcome:
        return Outcome.FAILURE if result == {"status": "error"} else Outcome.SUCCESS

    picky = resilience.breaker("picky", classify=classify)

    @app.task(name="ask", shared=False, breaker=picky)
    def ask(status: str) -> dict[str, str]:
        return {"status": status}

    assert [run(ask, "error"), run(ask, "fine")] == [{"status": "error"}, {"status": "fine"}]
    clock.settle()
    assert (picky.snapshot().calls, picky.snapshot().failures) == (2, 1)
