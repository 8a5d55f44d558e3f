"""Snippets of the manual run as printed, and do what their pages say."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from resilient_tasks import checks, signals
from resilient_tasks.breaker import ProbeOptions
from resilient_tasks.checks import run_check
from resilient_tasks.core.model import State, Transition
from resilient_tasks.dependency import with_parents
from resilient_tasks.fallback import Call, key_of
from resilient_tasks.testing import Clock, force, in_memory
from resilient_tasks.worker.context import runtime_of
from tests.support.doubles import wait_until
from tests.support.receiver import Receiver

DOCS = Path(__file__).parents[2] / "docs"
CATALOGUE = (DOCS / "health-checks.md").read_text()
FIRST_CELLS = re.findall(r"^\| (`.+?`(?:, `.+?`)*) \|", CATALOGUE, flags=re.MULTILINE)
OPENED = Transition(
    "payments", State.CLOSED, State.OPEN, 1789000000123, 1789000000.123,
    "3 consecutive failures, last: ReadTimeout", "", 17, 5, 0,
)  # fmt: skip


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL)


def defined_by(page: str, **given: Any) -> dict[str, Any]:
    """Run a page's snippets, one after the other; return what they define."""
    names: dict[str, Any] = {"__name__": page, **given}
    for snippet in snippets(page):
        exec(snippet, names)
    return names


@pytest.mark.parametrize("page", ["migrating", "options"])
def test_snippets_that_define_alone_run(page: str) -> None:
    assert "resilience" in defined_by(page)


# --- coalescing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "key"),
    [("sync", (), {"account": "acme", "version": 3}, "acme"), ("rename", ("ACME", "Acme"), {}, "acme")],
)
def test_coalesced_tasks_have_the_keys_that_are_named(name: str, args: Any, kwargs: Any, key: str) -> None:
    names = defined_by("coalescing")
    task = names[name]
    assert task.options.coalesce == names["refresh"].options.coalesce == "latest"
    assert key_of(Call(task.name, task.run, args, kwargs), task.options.coalesce_key) == key
    assert names["refresh"].options.coalesce_key is None


# --- producers ------------------------------------------------------------------------------------------


@pytest.fixture
def website() -> dict[str, Any]:
    return defined_by("producers")


def test_while_all_is_well_tasks_are_sent(website: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def send_task(name: str, *_: Any, **__: Any) -> Any:
        return website["app"].AsyncResult(f"id of {name}")

    monkeypatch.setattr(website["app"], "send_task", send_task)
    with in_memory(website["resilience"]):
        assert website["checkout_page"]() == "pay now"
        assert website["pay"](7) == f"id of {website['charge'].name}"


def test_while_payments_is_down_the_website_answers(website: dict[str, Any]) -> None:
    with in_memory(website["resilience"]):
        force(website["payments"], "OPEN")
        assert website["checkout_page"]() == "pay on delivery"
        assert re.fullmatch(r"try again in (9|10|11) s", website["pay"](7))
        assert website["account_page"](3) == {"account": 3, "balance": "unknown"}


# --- many breakers --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> Iterator[dict[str, Any]]:
    names = defined_by("many-breakers")
    with in_memory(names["resilience"]):
        yield names


def test_every_task_names_its_breakers(many: dict[str, Any]) -> None:
    def guards(task: str, *args: Any, **kwargs: Any) -> list[str]:
        return [guard.name for guard in with_parents(runtime_of(many[task].app).guarding(many[task], args, kwargs))]

    assert guards("charge_and_notify", 1) == ["payments", "mail"]
    assert guards("bill", 1) == ["tenants", "tenants:house"]
    assert guards("bill", 1, "acme") == ["tenants", "tenants:acme"]
    assert guards("fetch", 1, host="API.example:80") == ["tenants", "tenants:api.example%3A80", "mail"]


def test_a_guard_and_a_probe_know_the_child(many: dict[str, Any]) -> None:
    assert many["look_up"]("acme", 7) == 7
    many["resilience"].fleet.reporter.flush(60)
    acme = many["tenants"].child("acme")
    assert acme.snapshot().calls == 1
    assert acme._dependency.probe_to_run.function.func is many["ping"]


# --- isolation ------------------------------------------------------------------------------------------


@pytest.fixture
def isolation() -> Iterator[dict[str, Any]]:
    names = defined_by("isolation", ask=lambda address: f"coordinates of {address}")
    with in_memory(names["resilience"]):
        yield names


def test_beyond_the_limit_a_call_is_refused(isolation: dict[str, Any]) -> None:
    assert isolation["coordinates"]("home") == "coordinates of home"
    spec = isolation["geocoder"]._dependency.spec
    for number in range(4):
        assert isolation["resilience"].fleet.acquire(spec, f"call {number}").admitted
    assert isolation["coordinates"]("home") == "AT_CAPACITY"
    assert isolation["locate_now"].apply(args=["home"]).state == "FAILURE"


def test_an_adaptive_limit_begins_at_its_lower_bound(isolation: dict[str, Any]) -> None:
    assert isolation["llm"].snapshot().concurrency_limit == 2
    assert isolation["converter"].policy.max_concurrency_per_worker == 2


# --- failures -------------------------------------------------------------------------------------------


@pytest.fixture
def failures() -> dict[str, Any]:
    return defined_by("failures")


@pytest.fixture
def clock(failures: dict[str, Any]) -> Iterator[Clock]:
    with in_memory(failures["resilience"]) as clock:
        yield clock


def fail(breaker: Any, error: Exception) -> None:
    def call() -> None:
        raise error

    with pytest.raises(type(error)):
        breaker.call(call)


def test_it_takes_three_tasks(failures: dict[str, Any], clock: Clock) -> None:
    payments = failures["payments"]
    assert payments.policy.needed_tasks == 3
    for _ in range(7):
        payments.call(str)
    for state in ("CLOSED", "CLOSED", "OPEN"):
        fail(payments, ConnectionError())
        assert payments.snapshot().state == state


def test_what_hangs_and_quick_attempts_are_declared_as_printed(failures: dict[str, Any]) -> None:
    search, find = failures["search"], failures["find"]
    assert (search.policy.slow_call_duration, search.policy.slow_call_rate_threshold) == (1, 0.8)
    assert find.options.breakers == ("search",)
    assert find.options.retrying.stop.max_attempt_number == 3


# --- notifications --------------------------------------------------------------------------------------


@pytest.fixture
def received() -> Iterator[list[Any]]:
    received: list[Any] = []
    namespace: dict[str, Any] = {
        "pager": SimpleNamespace(send=received.append),
        "orders": SimpleNamespace(mark_as_delayed=received.append),
    }
    exec(snippets("notifications")[0], namespace)
    yield received
    signals.breaker_opened.disconnect(namespace["page_on_call"])
    signals.task_deferred.disconnect(namespace["notify_the_customer"])


def test_receivers_are_called(received: list[Any]) -> None:
    app = Celery("shop", set_as_current=False)
    signals.notify_of_transition(app, OPENED)
    fields = {"task_id": "17", "task": "charge", "breaker": "payments", "since": 1.0, "reason": "it is OPEN"}
    signals.notify(signals.task_deferred, app, **fields)
    wait_until(lambda: len(received) == 2)
    assert received == ["shop: payments is OPEN: 3 consecutive failures, last: ReadTimeout", "17"]


def test_a_recipe_posts_to_a_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    namespace: dict[str, Any] = {}
    exec(snippets("notifications")[1], namespace)
    try:
        with Receiver() as receiver:
            monkeypatch.setenv("CHAT_URL", receiver.url)
            signals.notify_of_transition(Celery("shop", set_as_current=False), OPENED)
            wait_until(lambda: bool(receiver.requests))
        [(_, body)] = receiver.requests
        assert json.loads(body) == {"text": "payments is OPEN: 3 consecutive failures, last: ReadTimeout"}
    finally:
        for signal in (signals.breaker_opened, signals.breaker_closed):
            signal.disconnect(namespace["post_to_chat"])


# --- health checks --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def health() -> dict[str, Any]:
    return defined_by("health-checks")


@pytest.mark.parametrize(
    ("breaker", "check", "when"),
    [
        ("payments", "http_check('https://pay.example/health')", "always"),
        ("database", "all_of(tcp_check('db.example', 5432), command_check(['pg_isready', ...]))", "while open"),
        ("ledger", "grpc_check('ledger.example:50051', 'shop.Ledger')", "while open"),
        ("search", "any_of(consul_check('search'), http_check('https://search.example/ping'))", "while open"),
        ("importer", "heartbeat(ttl=30)", "always"),
        ("rates", "http_check('https://rates.example/health')", "always"),
    ],
)
def test_every_example_registers_its_probe(health: dict[str, Any], breaker: str, check: str, when: str) -> None:
    probe = health[breaker]._dependency.probe
    assert (repr(probe.function), probe.active) == (check, when == "always")


def test_a_function_of_ones_own(health: dict[str, Any]) -> None:
    probe = health["mail"]._dependency.probe
    assert (probe.function, probe.timeout, probe.interval) == (health["greeting"], 3, 15)
    run_check(probe.function)


def test_a_heartbeat_is_received(health: dict[str, Any]) -> None:
    with in_memory(health["resilience"]) as clock:
        health["after_each_batch"]()
        clock.advance(7)
        assert health["resilience"].fleet.store.get("heartbeat", "importer") == (b"", 7)


def signature(function: Any) -> str:
    parameters = inspect.signature(function).parameters.values()
    shown = ", ".join(str(one.replace(annotation=one.empty)) for one in parameters)
    return f"{function.__name__}({shown})".replace("'", '"')


def test_the_catalogue_is_complete() -> None:
    functions = [getattr(checks, name) for name in checks.__all__]
    written = {cell.strip("`") for cells in FIRST_CELLS for cell in cells.split("`, `")}
    assert {signature(one) for one in functions if inspect.isfunction(one)} <= written


def test_the_arguments_of_a_probe_are_complete() -> None:
    arguments = set(ProbeOptions.__annotations__)
    assert {f"`{argument}`" for argument in arguments} <= set(FIRST_CELLS)
