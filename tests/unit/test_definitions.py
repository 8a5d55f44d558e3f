"""Every way in which Celery's user guide defines and configures tasks, and what is said where one stays unguarded."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import tenacity
from celery import Celery, Task, shared_task
from celery.canvas import chain

from resilient_tasks import ConfigurationError, Resilience, ResilientTask, constant
from resilient_tasks.testing import in_memory
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.definitions import doubts, options_of


class Audited(Task):
    """A task class of a user's own, which knows nothing of breakers."""

    abstract = True
    sent = 0

    def apply_async(self, *args: Any, **options: Any) -> Any:
        type(self).sent += 1
        return super().apply_async(*args, **options)


class AuditedResilient(ResilientTask):
    abstract = True
    breaker = "payments"


class OwnApp(Celery):
    task_cls = "tests.unit.test_definitions:Audited"


def new_app(cls: type[Celery] = Celery, **options: Any) -> Celery:
    return cls("definitions", broker="memory://", backend="cache+memory://", set_as_current=False, **options)


@pytest.fixture
def app() -> Celery:
    return new_app()


@pytest.fixture
def resilience(app: Celery) -> Resilience:
    resilience = Resilience(app)
    resilience.breaker("payments")
    return resilience


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESILIENT_TASKS_STORE_URL", "redis://127.0.0.1:1/0")


def charge(order: int) -> int:
    return order


def assert_guarded(app: Celery, task: Any, **options: Any) -> None:
    expected = {"breakers": ("payments",), **options}
    found = options_of(task)
    assert {name: getattr(found, name) for name in expected} == expected
    assert (task.Strategy, task.Request) == (
        "resilient_tasks.worker.pipeline:strategy",
        "resilient_tasks.worker.request:GatedRequest",
    )
    assert app.tasks[task.name] is getattr(task, "_get_current_object", lambda: task)()
    runtime_of(app).validate()


# --- whatever class the app has, and whenever it was set ----------------------------------------------


def with_resilience(app: Celery) -> tuple[Celery, Resilience]:
    return app, Resilience(app)


def set_later() -> tuple[Celery, Resilience]:
    app = new_app()
    resilience = Resilience(app)
    app.task_cls = Audited
    return app, resilience


def by_attribute() -> tuple[Celery, Resilience]:
    app = new_app()
    app.Task = type("ContextTask", (Audited, app.Task), {"abstract": True})
    return with_resilience(app)


def used_before() -> tuple[Celery, Resilience]:
    app = new_app(task_cls=Audited)
    assert issubclass(app.Task, Audited)
    return with_resilience(app)


def by_init_app() -> tuple[Celery, Resilience]:
    app, resilience = new_app(task_cls=Audited), Resilience()
    resilience.init_app(app)
    return app, resilience


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_resilience(new_app(task_cls="tests.unit.test_definitions:Audited")),
        lambda: with_resilience(new_app(task_cls=Audited)),
        lambda: with_resilience(new_app(OwnApp)),
        set_later,
        by_attribute,
        used_before,
        by_init_app,
    ],
)
def test_the_apps_own_class_stays_and_is_ours(make: Callable[[], tuple[Celery, Resilience]]) -> None:
    app, resilience = make()
    resilience.breaker("payments")
    task = app.task(name="charge", shared=False, breaker="payments")(charge)
    assert isinstance(task._get_current_object(), (Audited, ResilientTask))
    assert_guarded(app, task)
    app.conf.task_always_eager = True
    sent = type(task._get_current_object()).sent
    assert task.apply_async((3,)).get() == 3
    assert type(task._get_current_object()).sent == sent + 1
    plain = app.task(name="plain", shared=False)(charge)
    assert options_of(plain) is None
    assert plain.apply_async((3,)).get() == 3


def test_a_class_that_is_ours_by_descent_stays_as_it_is() -> None:
    app = new_app(task_cls=AuditedResilient)
    Resilience(app).breaker("payments")
    assert app.Task.__mro__[1] is AuditedResilient
    assert_guarded(app, app.task(name="charge", shared=False)(charge))


def test_two_apps_each_derive_their_own() -> None:
    first, second = new_app(task_cls=Audited), new_app()
    for app in (first, second):
        Resilience(app).breaker("payments")
        assert_guarded(app, app.task(name="charge", shared=False, breaker="payments")(charge))
    assert issubclass(first.Task, Audited)
    assert not issubclass(second.Task, Audited)


# --- decorators, classes, annotations -----------------------------------------------------------------


def test_shared_tasks_from_before_and_after_the_app() -> None:
    before = shared_task(name="before", breaker="payments", on_open="fail")(charge)
    app = new_app()
    resilience = Resilience(app)
    resilience.breaker("payments")
    after = shared_task(name="after", breaker=resilience["payments"])(charge)
    app.finalize()
    late = shared_task(name="late", breaker="payments")(charge)
    for task in (before, after, late):
        name = task.name if task is not late else "late"
        assert_guarded(app, app.tasks[name], on_open="fail" if task is before else "defer")


@pytest.mark.parametrize("as_instance", [True, False])
@pytest.mark.parametrize("of_app", [True, False])
@pytest.mark.parametrize("own_name", ["charge", None])
def test_classes(app: Celery, resilience: Resilience, own_name: str | None, *, of_app: bool, as_instance: bool) -> None:
    base: Any = app.Task if of_app else ResilientTask

    class Charge(base):
        name = own_name
        breaker = "payments"
        max_attempts = 2

        def run(self, order: int) -> int:
            return order

    task = app.register_task(Charge() if as_instance else Charge)
    assert task.name == own_name or task.name.endswith(".Charge")
    assert_guarded(app, task, max_attempts=2)


def test_a_mistake_in_a_class_without_a_name_names_the_task(app: Celery, resilience: Resilience) -> None:
    class Charge(ResilientTask):
        breaker = "payments"
        on_open = "explode"  # type: ignore[assignment]  # what is tested

    with pytest.raises(ConfigurationError, match=r"task 'tests.*\.Charge': on_open='explode': allowed is"):
        app.register_task(Charge())


def test_a_base_given_to_the_decorator(app: Celery, resilience: Resilience) -> None:
    assert_guarded(app, app.task(name="charge", shared=False, base=AuditedResilient, bind=True)(charge))


@pytest.mark.parametrize(
    ("annotation", "options"),
    [
        ({}, {}),
        ({"on_open": "fail"}, {"on_open": "fail", "on_failure": "raise"}),
        ({"max_attempts": 2, "defer_for": 5}, {"max_attempts": 2, "defer_for": 5}),
        ({"on_failure": "raise"}, {"on_failure": "raise"}),
        ({"coalesce": "latest"}, {"coalesce": "latest"}),
    ],
)
@pytest.mark.parametrize("of_all", [True, False])
def test_annotations(
    app: Celery, resilience: Resilience, annotation: dict[str, Any], options: dict[str, Any], *, of_all: bool
) -> None:
    named = {"breaker": "payments"}
    app.conf.task_annotations = {"*": annotation} if of_all else {"charge": {**annotation, **named}}
    task = app.task(name="charge", shared=False, **(named if of_all else {}))(charge)
    assert_guarded(app, task, **options)
    assert callable(task.on_failure)
    assert callable(app.tasks["celery.chord"].on_failure)


def test_a_wrong_annotation_names_the_task(app: Celery, resilience: Resilience) -> None:
    app.conf.task_annotations = {"charge": {"max_attempts": 0}}
    task = app.task(name="charge", shared=False, breaker="payments")(charge)
    for use in (app.finalize, runtime_of(app).validate, lambda: task.delay(1)):
        with pytest.raises(ConfigurationError, match="task 'charge': max_attempts=0: allowed is"):
            use()


def test_options_that_celery_takes_from_its_configuration(app: Celery, resilience: Resilience) -> None:
    class Configured(ResilientTask):
        abstract = True
        from_config = (*Task.from_config, ("breaker", "default_breaker"))

    app.conf.default_breaker = "payments"
    assert_guarded(app, app.task(name="charge", shared=False, base=Configured)(charge))


def test_a_task_registered_with_two_apps(app: Celery, resilience: Resilience) -> None:
    class Charge(ResilientTask):
        name = "charge"
        breaker = "payments"

        def run(self, order: int) -> int:
            return order

    other = new_app()
    Resilience(other).breaker("payments")
    task = Charge()
    for each in (app, other):
        assert_guarded(each, each.register_task(task))


def test_a_name_of_ours_that_an_unguarded_task_uses_is_the_users(app: Celery, resilience: Resilience) -> None:
    class Export(ResilientTask):
        name = "export"
        options = ("csv",)  # type: ignore[assignment]  # what is tested

        def run(self) -> tuple:
            return self.options

    task = app.register_task(Export())
    app.conf.task_always_eager = True
    assert task.delay().get() == ("csv",)
    with pytest.raises(ConfigurationError, match=r"task 'guarded': options=\('csv',\): this name is taken"):
        app.register_task(type("Guarded", (Export,), {"name": "guarded", "breaker": "payments"})())


DERIVE = "is no ResilientTask: derive it from resilient_tasks.ResilientTask:"

# --- what cannot be guarded is said wherever it is used -----------------------------------------------


def with_base(base: type) -> Callable[[Celery], Any]:
    return lambda app: app.task(name="charge", shared=False, base=base, breaker="payments")(charge)


def breaker_set_afterwards(app: Celery) -> Any:
    task = app.task(name="charge", shared=False)(charge)
    app.finalize()
    task.breaker = "payments"
    return task


MIXED = type("Mine", (Audited, type("Locking", (Task,), {"abstract": True})), {"abstract": True})


@pytest.mark.parametrize(
    ("define", "advice"),
    [
        (with_base(Audited), f"its base Audited {DERIVE} class Audited(ResilientTask)"),
        (with_base(MIXED), f"its base Mine {DERIVE} class Mine(ResilientTask, Audited, Locking)"),
        (with_base(Task), "its base Task is no ResilientTask: leave base= out, and call Resilience(app) before"),
        (breaker_set_afterwards, "in an attribute of the instance: give it in the decorator, the class or"),
    ],
)
def test_a_task_that_stays_unguarded(
    app: Celery, resilience: Resilience, define: Callable[[Celery], Any], advice: str
) -> None:
    task = define(app)
    expected = re.escape(f"task 'charge' names breaker 'payments' but {advice}")
    uses = (
        runtime_of(app).validate,
        lambda: task.delay(1),
        lambda: task.s(1).apply_async(on_open="invalid"),
        lambda: chain(task.s(1), task.s()).delay(),
    )
    for use in uses:
        with pytest.raises(ConfigurationError, match=expected):
            use()


def test_a_class_that_is_changed_later_is_guarded(app: Celery, resilience: Resilience) -> None:
    task = app.task(name="charge", shared=False)(charge)
    app.finalize()
    type(app.tasks["charge"]).breaker = "payments"
    task.delay(1)
    assert_guarded(app, task)


def test_tasks_made_before_resilience_say_so(app: Celery) -> None:
    task = app.task(name="charge", shared=False, breaker="payments")(charge)
    app.finalize()
    Resilience(app).breaker("payments")
    for use in (runtime_of(app).validate, lambda: task.delay(1)):
        with pytest.raises(ConfigurationError, match=r"'charge' .* no ResilientTask: .* call Resilience\(app\) before"):
            use()


def test_a_misspelt_breaker_is_named_with_the_nearest(app: Celery, resilience: Resilience) -> None:
    app.task(name="charge", shared=False, breaker="paymnts")(charge)
    with pytest.raises(ConfigurationError, match=r"'paymnts', which is not defined; .*; did you mean 'payments'\?"):
        runtime_of(app).validate()


@pytest.mark.parametrize("base", [None, Task])
@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        ({"on_open": "invalid"}, "on_open='invalid'"),
        ({"on_open": "fail"}, "on_open='fail'"),
        ({"on_opn": "fail"}, "is sent with on_opn='fail': on_open='fail' or 'fallback' is for apply_async"),
        ({"fallback": 3}, "is sent with fallback=3: it belongs to the definition"),
        ({"breaker": "payments"}, "is sent with breaker='payments': it belongs to the definition"),
    ],
)
def test_options_that_would_travel_without_effect(
    app: Celery, resilience: Resilience, base: type | None, sent: dict[str, Any], complaint: str
) -> None:
    plain = app.task(name="plain", shared=False, base=base)(charge)
    sends = (
        plain.apply_async,
        lambda args, **options: plain.s(*args).set(**options).delay(),
        lambda args, **options: app.send_task("plain", args, **options),
    )
    for send in sends:
        with pytest.raises(ConfigurationError, match=re.escape(complaint)) as refused:
            send((1,), **sent)
        assert "task 'plain'" in str(refused.value)


def test_stamps_and_properties_of_ones_own_are_let_through(app: Celery, resilience: Resilience) -> None:
    plain = app.task(name="plain", shared=False)(charge)
    plain.apply_async((1,), fallback="a stamp", stamped_headers=["fallback"])
    plain.apply_async((1,), mine=3, correlation_id="x", queue="q", countdown=3, priority=1)
    app.send_task("elsewhere", (1,), queue="q")


# --- what may be a mistake is a warning ---------------------------------------------------------------


def retrying_by_itself(self: Any, order: int) -> int:
    try:
        return order
    except OSError as exc:
        raise self.retry(exc=exc) from exc


def retrying_in_a_nested_function(task: Any, order: int) -> int:
    def again() -> None:
        task.retry()

    again()
    return order


def retrying_by_name(order: int) -> Any:
    return order or retrying_by_name.retry()  # type: ignore[attr-defined]  # it is a task


def retrying_something_else(self: Any, order: Any) -> Any:
    return order.retry() or tenacity.retry


RETRIES = "charge: breaker= beside autoretry_for or self.retry"


@pytest.mark.parametrize(
    ("options", "function", "expected"),
    [
        ({"breaker": "payments", "autoretry_for": (OSError,)}, charge, [RETRIES]),
        ({"breaker": "payments", "bind": True}, retrying_by_itself, [RETRIES]),
        ({"breaker": "payments", "bind": True}, retrying_in_a_nested_function, [RETRIES]),
        ({"breaker": "payments"}, retrying_by_name, [RETRIES]),
        ({"breaker": "payments", "bind": True}, retrying_something_else, []),
        ({"breaker": "payments", "autoretry_for": (OSError,), "on_failure": "raise"}, charge, []),
        ({"autoretry_for": (OSError,)}, charge, []),
        ({"on_open": "fail", "fallback": constant(1)}, charge, ["charge: fallback=, on_open= without breaker="]),
        ({"on_failure": "raise"}, charge, ["charge: on_failure= without breaker="]),
        ({"breaker": "payments", "fallbak": charge}, charge, ["charge: fallbak= is no option"]),
        ({"breaker": "payments", "breaker_keys": "order"}, charge, ["charge: breaker_keys= is no option"]),
        ({"max_attempt": 3}, charge, ["charge: max_attempt= is no option"]),
        ({"brekaer": "payments"}, charge, ["charge: brekaer= is no option"]),
        ({"breaker": "payments", "max_retries": 3, "rate_limit": "1/s", "mine": 3}, charge, []),
        ({"breaker": "payments", "on_failure": "raise", "acks_on_failure": False}, charge, []),
    ],
)
def test_doubts(
    app: Celery, resilience: Resilience, caplog: Any, options: dict[str, Any], function: Any, expected: list[str]
) -> None:
    app.task(name="charge", shared=False, **options)(function)
    found = list(doubts(app))
    assert [doubt.what for doubt in found] == expected
    runtime_of(app).validate()
    assert [record.getMessage() for record in caplog.records] == ["{}: {}; {}".format(*doubt) for doubt in found]


def test_a_breaker_under_any_name_is_meant_as_one(app: Celery, resilience: Resilience) -> None:
    app.task(name="charge", shared=False, circuit=resilience["payments"])(charge)
    assert [(doubt.what, doubt.advice) for doubt in doubts(app)] == [
        ("charge: circuit= is no option", "did you mean breaker=?")
    ]


def test_attributes_of_ones_own_are_no_misspelt_options(app: Celery, resilience: Resilience) -> None:
    class Base(ResilientTask):
        abstract = True
        max_attempt = 3

    class Charge(Base):
        name = "charge"
        breaker = "payments"
        max_attempt = 4
        fallbacks = ("a", "b")

        def run(self, order: int) -> Any:
            return self.fallbacks

        def on_opened(self) -> None:
            """One more method."""

    app.conf.task_annotations = {"*": {"on_open": "fail", "max_attempts": 3}}
    app.register_task(Charge())
    assert list(doubts(app)) == []


def test_the_first_retry_that_no_definition_shows_is_a_warning(
    app: Celery, resilience: Resilience, caplog: Any
) -> None:
    def again(task: Any) -> None:
        task.retry(countdown=0, max_retries=2)

    @app.task(name="charge", shared=False, bind=True, breaker="payments")
    def charge(self: Any) -> int:
        if self.request.retries < 2:
            again(self)
        return 3

    with in_memory(resilience):
        assert charge.apply().get() == 3
    warned = [record.getMessage() for record in caplog.records if "max_retries" in record.getMessage()]
    assert len(warned) == 1
    assert warned[0].startswith(RETRIES)
