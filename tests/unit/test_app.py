"""``Resilience`` and a Celery app: who may come first, and what start-up finds out."""

from __future__ import annotations

import re
from typing import Any

import pytest
from celery import Celery, Task
from celery.worker.consumer.mingle import Mingle

from resilient_tasks import Breaker, BreakerPolicy, ConfigurationError, Resilience, ResilientTask, StoreError
from resilient_tasks.testing import force, in_memory
from resilient_tasks.worker.bootsteps import ControlQueue
from resilient_tasks.worker.context import runtime_of


@pytest.fixture
def app() -> Celery:
    return Celery("shop", broker="memory://", backend="cache+memory://", set_as_current=False)


def define(app: Celery, **options: Any) -> Any:
    @app.task(name="charge", shared=False, **options)
    def charge() -> str:
        return "charged"

    return charge


# --- app and Resilience, in any order -----------------------------------------------------------------


def test_an_app_may_come_later(app: Celery) -> None:
    resilience = Resilience()
    payments = resilience.breaker("payments")
    task = define(app, breaker=payments)
    resilience.init_app(app)
    assert isinstance(task._get_current_object(), ResilientTask)
    assert task.options.breakers == ("payments",)
    runtime_of(app).validate()


def test_a_breaker_may_be_defined_after_the_tasks_that_name_it(app: Celery) -> None:
    resilience = Resilience(app)
    define(app, breaker="payments")
    app.finalize()
    with pytest.raises(ConfigurationError, match=r"task 'charge' names breaker 'payments', which is not defined"):
        runtime_of(app).validate()
    resilience.breaker("payments")
    runtime_of(app).validate()


def test_breakers_guard_calls_without_any_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://store.invalid:1/0")
    resilience = Resilience()
    payments = resilience.breaker("payments")
    with in_memory(resilience):
        assert payments.call(lambda: 7) == 7
        force(payments, "OPEN")
        with pytest.raises(Exception, match="'payments' is OPEN"), payments.guard():
            pytest.fail("the body must not run")


def test_without_an_app_and_without_a_url_the_store_is_unknown() -> None:
    with pytest.raises(ConfigurationError, match="RESILIENT_TASKS_STORE_URL"):
        Resilience().breaker("payments").snapshot()


def test_a_task_of_an_app_without_resilience_says_so(app: Celery) -> None:
    task = define(app, breaker="payments", base=ResilientTask)
    with pytest.raises(ConfigurationError, match=r"app 'shop' has no Resilience: call Resilience\(app\)"):
        task()


# --- definitions ----------------------------------------------------------------------------------------


def test_a_breaker_defined_twice_alike_is_one_breaker() -> None:
    resilience = Resilience()
    first = resilience.breaker("payments", open_duration=5)
    assert resilience.breaker("payments", open_duration=5) is first
    assert resilience.breaker("payments", BreakerPolicy(open_duration=5)) is first
    assert dict(resilience.breakers) == {"payments": first}


def test_a_breaker_defined_twice_differently_is_a_mistake() -> None:
    resilience = Resilience()
    first = resilience.breaker("payments", open_duration=5)
    with pytest.raises(
        ConfigurationError, match=r"'payments' is defined twice .*: open_duration=5 and open_duration=6$"
    ):
        resilience.breaker("payments", open_duration=6)
    assert resilience.breakers["payments"] is first


@pytest.mark.parametrize(
    ("arguments", "fields", "message"),
    [
        (("payments",), {"open_duration": -1}, "breaker 'payments': open_duration=-1: allowed is a positive"),
        (("payments",), {"opne_duration": 1}, "breaker 'payments': unknown policy field opne_duration; allowed are"),
        (("payments", 0.5), {}, "breaker 'payments': policy=0.5: allowed is a BreakerPolicy"),
        (("payments", BreakerPolicy()), {"window": 1}, r"give a policy or its fields \(window\), not both"),
        (("payments",), {"runbook": "javascript:alert(1)"}, "runbook='javascript.*: allowed is a URL that begins with"),
        (("payments",), {"description": 5}, "description=5: allowed is a text of up to 1,000 characters"),
        (("pay ments",), {}, "breaker name 'pay ments': allowed is"),
        (("",), {}, "breaker name '': allowed is"),
        ((3,), {}, "breaker name 3: allowed is"),
        ((None,), {}, "breaker name None: allowed is"),
    ],
)
def test_a_wrong_definition_is_refused(arguments: tuple, fields: dict, message: str) -> None:
    resilience = Resilience()
    with pytest.raises(ConfigurationError, match=message):
        resilience.breaker(*arguments, **fields)
    assert not resilience.breakers


def test_a_look_up_defines_nothing() -> None:
    resilience = Resilience(store_url="redis://127.0.0.1:1/0")
    payments = resilience.breaker("payments", open_duration=5)
    assert resilience["payments"] is payments
    assert resilience["payments:acme"] is payments.child("acme")
    expected = "breaker 'paymnts' is defined nowhere; defined: payments; did you mean 'payments'?"
    with pytest.raises(ConfigurationError, match=re.escape(expected)) as missed:
        resilience["paymnts"]
    assert isinstance(missed.value, KeyError)
    assert str(missed.value) == expected
    assert dict(resilience.breakers) == {"payments": payments}


def test_breakers_cannot_be_added_behind_the_scenes() -> None:
    breakers: Any = Resilience().breakers
    with pytest.raises(TypeError):
        breakers["payments"] = Breaker


# --- a worker's start-up ----------------------------------------------------------------------------------


@pytest.fixture
def amqp_app() -> Celery:
    return Celery("shop", broker="amqp://store.invalid//", backend="cache+memory://", set_as_current=False)


def test_a_store_that_no_setting_names_is_one_clear_error(amqp_app: Celery) -> None:
    resilience = Resilience(amqp_app)
    resilience.breaker("payments")
    with pytest.raises(ConfigurationError) as refused:
        amqp_app.WorkController(pool_cls="solo")
    assert "neither the broker ('amqp://store.invalid//') nor the result backend" in str(refused.value)
    assert "set RESILIENT_TASKS_STORE_URL, for example to redis://localhost:6379/0" in str(refused.value)


def test_a_wrong_task_keeps_a_worker_from_starting(amqp_app: Celery) -> None:
    Resilience(amqp_app)
    define(amqp_app, breaker="payments")
    with pytest.raises(ConfigurationError, match=r"task 'charge' names breaker 'payments'.*; defined: none"):
        amqp_app.WorkController(pool_cls="solo")


def test_a_task_that_celery_has_copied_from_another_app_is_left_to_celery(
    app: Celery, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://127.0.0.1:1/0")
    other = Celery("other", broker="memory://", set_as_current=False)
    theirs = Resilience(other)
    theirs.breaker("their-own")

    @other.task(name="theirs", breaker="their-own")
    def task() -> None:
        pass

    other.finalize()
    Resilience(app)
    app.WorkController(pool_cls="solo")
    assert app.tasks["theirs"].Strategy == Task.Strategy
    with pytest.raises(ConfigurationError, match="their-own"):
        app.tasks["theirs"]()


def test_a_store_that_is_away_is_no_error_at_start_up(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://127.0.0.1:1/0")
    resilience = Resilience(app)
    payments = resilience.breaker("payments")
    app.WorkController(pool_cls="solo")
    assert payments.snapshot().state == payments.state == "CLOSED"
    with pytest.raises(StoreError):
        payments.isolate()
    resilience.fleet.close()


def test_ticks_are_taken_only_after_mingling(app: Celery, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mingle waits for a second of silence on the connection, which ticks would never let come."""
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://127.0.0.1:1/0")
    Resilience(app)
    steps = [type(step) for step in app.WorkController(pool_cls="solo").consumer.blueprint.order]
    assert steps.index(ControlQueue) > steps.index(Mingle)
