"""Task options are checked when a task is made; a mistake names the task, the option, the value and what is allowed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from celery import Celery

from resilient_tasks import BreakerPolicy, ConfigurationError, Resilience, cached, constant
from resilient_tasks.worker.definitions import TaskOptions


@pytest.fixture
def app() -> Celery:
    app = Celery("options", broker="memory://", set_as_current=False)
    Resilience(app).breaker("payments")
    return app


def options_of(app: Celery, **options: Any) -> TaskOptions:
    @app.task(name="charge", shared=False, lazy=False, **{"breaker": "payments", **options})
    def charge(order_id: int) -> int:
        return order_id

    return charge.options


def test_several_breakers(app: Celery) -> None:
    accounts = Resilience().breaker("accounts")
    assert options_of(app, breaker=("payments", accounts)).breakers == ("payments", "accounts")


def test_defaults(app: Celery) -> None:
    options = options_of(app)
    assert (options.breakers, options.on_open, options.on_failure) == (("payments",), "defer", "defer")
    assert (options.max_attempts, options.defer_for, options.retrying) == (8, None, None)
    assert not options.fallback


def test_on_failure_follows_on_open(app: Celery) -> None:
    assert options_of(app, on_open="fail").on_failure == "raise"


def test_all_options(app: Celery) -> None:
    retrying = tenacity.Retrying()
    options = options_of(
        app, fallback=[cached(max_age=60), constant(0)], on_open="fail", on_failure="defer", max_attempts=3,
        defer_for=60, retrying=retrying,
    )  # fmt: skip
    assert (options.on_open, options.on_failure, options.max_attempts) == ("fail", "defer", 3)
    assert (options.defer_for, options.retrying) == (60, retrying)
    assert options.fallback


BAD: list[tuple[str, Any, str]] = [
    ("on_open", "explode", "'defer' or 'fail'"),
    ("on_open", None, "'defer' or 'fail'"),
    ("on_open", ["defer"], "'defer' or 'fail'"),
    ("on_failure", "fail", "'defer' or 'raise'"),
    ("on_failure", "", "'defer' or 'raise'"),
    ("on_failure", 3, "'defer' or 'raise'"),
    ("on_failure", ["raise"], "'defer' or 'raise'"),
    ("max_attempts", 0, "an integer of 1 or more"),
    ("max_attempts", 2.0, "an integer of 1 or more"),
    ("max_attempts", True, "an integer of 1 or more"),
    ("max_attempts", None, "an integer of 1 or more"),
    ("defer_for", 0, "a positive number of seconds or None"),
    ("defer_for", -1.0, "a positive number of seconds or None"),
    ("defer_for", float("nan"), "a positive number of seconds or None"),
    ("defer_for", float("inf"), "a positive number of seconds or None"),
    ("defer_for", 10**400, "a positive number of seconds or None"),
    ("defer_for", "60", "a positive number of seconds or None"),
    ("defer_for", True, "a positive number of seconds or None"),
    ("retrying", 3, "a tenacity.Retrying or None"),
    ("retrying", tenacity.Retrying, "a tenacity.Retrying or None"),
    ("breaker", 3, "a Breaker, the name of one, or a list"),
    ("breaker", b"payments", "a Breaker, the name of one, or a list"),
    ("breaker", [], "a list of such"),
    ("breaker", ["payments", "payments"], "each different"),
    ("breaker", ["payments", 3], "a list of such"),
    ("breaker_key", "tenant", "the name of a parameter, or a callable"),
    ("breaker_key", 3, "the name of a parameter, or a callable"),
    ("fallback", 3, "allowed are cached"),
    ("fallback", [constant(0), "other_source"], "allowed are cached"),
    ("fallback", cached, "allowed are cached"),
]


@pytest.mark.parametrize(
    ("option", "value", "allowed"), BAD, ids=lambda value: getattr(value, "__name__", repr(value)[:30])
)
def test_a_bad_value_names_task_option_value_and_what_is_allowed(
    app: Celery, option: str, value: Any, allowed: str
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        options_of(app, **{option: value})
    wrong = value[1] if option == "fallback" and isinstance(value, list) else value
    for part in ("task 'charge'", f"{option}={wrong!r}", allowed):
        assert part in str(refused.value)


def test_a_wait_grows_with_every_failure_up_to_the_longest_open_time(app: Celery) -> None:
    options = options_of(app)
    policy = BreakerPolicy(open_duration=10, open_multiplier=2, max_open_duration=60)
    assert [options.delay(policy, attempts) for attempts in range(6)] == [10, 10, 20, 40, 60, 60]
    assert options.delay(policy, 10**9) == 60


@pytest.mark.parametrize("define", [lambda value: {"on_failure": value}, lambda value: {"base": _base_with(value)}])
def test_on_failure_as_an_option_leaves_celerys_handler_alone(
    app: Celery, define: Callable[[str], dict[str, Any]]
) -> None:
    @app.task(name="careful", shared=False, lazy=False, breaker="payments", **define("raise"))
    def careful() -> None: ...

    assert careful.options.on_failure == "raise"
    assert careful.on_failure.__func__ is app.Task.__mro__[2].on_failure  # celery.app.task.Task's own
    assert careful.on_failure(ValueError(), "an-id", (), {}, None) is None


def _base_with(on_failure: Any) -> type:
    from resilient_tasks import ResilientTask

    return type("Base", (ResilientTask,), {"abstract": True, "on_failure": on_failure})


@pytest.mark.parametrize(("option", "expected"), [({}, "defer"), ({"on_failure": "raise"}, "raise")])
def test_a_handler_of_ones_own_is_no_option_and_goes_together_with_it(
    app: Celery, option: dict[str, str], expected: str
) -> None:
    base = _base_with(lambda *_: "handled")

    @app.task(name="handling", shared=False, lazy=False, breaker="payments", base=base, **option)
    def handling() -> None: ...

    assert handling.options.on_failure == expected
    assert handling.on_failure() == "handled"
