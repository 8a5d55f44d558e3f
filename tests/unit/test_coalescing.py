"""What may replace what: the keys of tasks, and which tasks are coalesced at all."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery, chain, chord, group

from resilient_tasks import Breaker, ConfigurationError
from resilient_tasks.fallback import Call, is_task_key, key_of
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.request import GatedRequest, coalesced_as, superseded_among


@pytest.fixture
def task(app: Celery, payments: Breaker) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        @app.task(bind=True, name="sync", shared=False, **{"breaker": payments, "coalesce": "latest", **options})
        def sync(self: Any, account: str, version: int = 1, *, dry: bool = False) -> None: ...

        return sync

    return make


@pytest.fixture
def digest(app: Celery) -> Callable[..., list[str]]:
    """Send something, and return under what each message of a task would be coalesced."""

    def coalesced(message: Any) -> str:
        return coalesced_as(
            GatedRequest(message, app=app, task=app.tasks["sync"], **celery_internals.parts_of(message))
        )

    def of(signature: Any) -> list[str]:
        signature.apply_async()
        with app.connection_for_read() as connection:
            channel = connection.default_channel
            return [coalesced(message) for message in iter(lambda: channel.basic_get("celery", no_ack=True), None)]

    return of


# --- keys ---------------------------------------------------------------------------------------------


def body(account: str, version: int = 1, *versions: int, dry: bool = False, **others: int) -> None: ...


@pytest.mark.parametrize(
    ("key", "args", "kwargs", "found"),
    [
        ("account", ("acme",), {}, "acme"),
        ("account", (), {"account": "acme"}, "acme"),
        ("version", ("acme",), {}, "1"),
        ("dry", ("acme",), {"dry": True}, "True"),
        (lambda args, kwargs: f"{args[0]}/{kwargs['version']}", ("acme",), {"version": 3}, "acme/3"),
    ],
)
def test_a_key_is_found_however_the_argument_is_passed(key: Any, args: Any, kwargs: Any, found: str) -> None:
    assert key_of(Call("sync", body, args, kwargs), key) == found


def test_a_key_function_returns_a_text() -> None:
    with pytest.raises(TypeError, match="the key of task 'sync' is 7: allowed is a str"):
        key_of(Call("sync", body, (7,)), lambda args, _: args[0])


@pytest.mark.parametrize(
    ("key", "valid"),
    [("account", True), ("dry", True), (len, True), ("versions", False), ("unknown", False), (7, False)],
)
def test_a_key_is_a_parameter_or_a_function(key: Any, valid: Any) -> None:
    assert is_task_key(key, body) is valid


# --- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"coalesce": "first"}, "task 'sync': coalesce='first': allowed is 'latest' or None"),
        (
            {"coalesce_key": "tenant"},
            "task 'sync': coalesce_key='tenant': allowed is the name of a parameter, or a callable (args, kwargs) ->",
        ),
        (
            {"coalesce": None, "coalesce_key": "account"},
            "task 'sync': coalesce_key='account': allowed with coalesce='latest' only",
        ),
    ],
)
def test_a_bad_option_is_found_when_the_task_is_defined(task: Any, options: dict[str, Any], refusal: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        task(**options).s()
    assert str(refused.value).startswith(refusal)


# --- what is coalesced ----------------------------------------------------------------------------------


def test_calls_with_one_key_are_coalesced(task: Any, digest: Any) -> None:
    sync = task(coalesce_key="account")
    first, second, other = (digest(sync.s(*args))[0] for args in [("acme", 1), ("acme", 2), ("zeta", 1)])
    assert first == second != other
    assert first


def test_without_a_key_all_arguments_count_defaults_included(task: Any, digest: Any) -> None:
    sync = task()
    assert digest(sync.s("acme")) == digest(sync.s(account="acme", version=1))
    assert digest(sync.s("acme")) != digest(sync.s("acme", 2))


def test_other_tasks_are_never_coalesced(task: Any, digest: Any) -> None:
    assert digest(task(coalesce=None).s("acme")) == [""]


def test_what_a_caller_waits_for_is_not_coalesced(task: Any, digest: Any) -> None:
    one = task(coalesce_key="account").si("acme")
    linked = one.clone()
    linked.link(one)
    with_errback = one.clone()
    with_errback.link_error(one)
    assert digest(linked) == digest(chain(one, one)) == [""]
    assert digest(group(one, one)) == ["", ""]
    assert digest(chord([one, one], one)) == ["", ""]
    assert digest(with_errback) == digest(one)


def test_a_key_that_cannot_be_found_does_no_harm(task: Any, digest: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert digest(task(coalesce_key=lambda args, _: args[7]).s("acme")) == [""]
    assert "has no key to be coalesced by: IndexError" in caplog.text


def test_a_task_is_superseded_by_the_one_that_has_claimed_its_key() -> None:
    def waiting(task_id: str, digest: str) -> Any:
        return SimpleNamespace(task_id=task_id, envelope=SimpleNamespace(coalesced_as=digest))

    claims = {"same": "third", "other": "fourth"}
    ledger: Any = SimpleNamespace(claims=lambda digests: {one: claims[one] for one in digests if one in claims})
    entries = [waiting("first", "same"), waiting("second", ""), waiting("third", "same"), waiting("fifth", "unclaimed")]
    assert superseded_among(entries, ledger) == {"first": "third"}
    assert superseded_among(entries, ledger, gone={"third"}) == {}
