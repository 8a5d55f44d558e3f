from __future__ import annotations

import datetime as dt
import decimal
import logging
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from resilient_tasks.errors import BreakerOpenError, ConfigurationError, StoreError
from resilient_tasks.fallback import (
    LARGEST_VALUE,
    Call,
    FallbackChain,
    Provenance,
    Served,
    as_chain,
    cached,
    constant,
    read_provenance,
    write_provenance,
)


class SmallValues:
    """The part of a store that fallbacks use, with a clock that tests advance."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.away = False
        self.kept: dict[tuple[str, str], tuple[bytes, float, float]] = {}

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        if self.away:
            raise StoreError("away")
        self.kept[kind, key] = (value, self.now, ttl)

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        if self.away:
            raise StoreError("away")
        value, written, ttl = self.kept.get((kind, key), (b"", 0.0, 0.0))
        age = self.now - written
        return (value, age) if age < ttl else None

    @property
    def ttls(self) -> list[float]:
        return [ttl for _, _, ttl in self.kept.values()]


@pytest.fixture
def store() -> Any:
    return SmallValues()


def balance(account_id: int, currency: str = "EUR") -> int:
    return account_id * len(currency)


def chain_for(fallback: Any, body: Callable[..., Any] = balance) -> FallbackChain:
    chain = as_chain(fallback, "shop.balance", body)
    assert chain is not None
    return chain


def a_call(*args: Any, **kwargs: Any) -> Call:
    return Call("shop.balance", balance, args, kwargs, "17")


# --- functions and constants ------------------------------------------------------------------------


def test_no_fallback_is_no_chain() -> None:
    assert as_chain(None, "shop.balance", balance) is None
    assert as_chain([], "shop.balance", balance) is None


class OtherSource:
    def __call__(self, account_id: int, currency: str) -> int:
        return -account_id


@pytest.mark.parametrize(
    ("function", "served"),
    [
        (balance, Served(8, "balance")),
        (partial(balance), Served(8, "balance")),
        (OtherSource(), Served(-2, "OtherSource")),
        ([lambda account_id, currency: None, constant(7)], Served(None, "<lambda>")),  # None is an answer
    ],
)
def test_a_function_gets_the_arguments_of_the_task(store: Any, function: Any, served: Served) -> None:
    chain = chain_for(function)
    assert chain
    assert chain.answer(a_call(2, currency="USDT"), store) == served


@pytest.mark.parametrize(
    ("error", "has_traceback"), [(LookupError("no other source"), True), (BreakerOpenError("other-source"), False)]
)
def test_a_function_that_raises_is_logged_and_the_next_one_is_tried(
    store: Any, caplog: pytest.LogCaptureFixture, error: Exception, *, has_traceback: bool
) -> None:
    def broken(account_id: int) -> int:
        raise error

    chain = chain_for([broken, constant(7)])
    assert chain.answer(a_call(1), store) == Served(7, "constant")
    [record] = caplog.records
    assert f"shop.balance[17]: fallback broken: {error!r}" in record.getMessage()
    assert (record.task_id, record.task) == ("17", "shop.balance")  # type: ignore[attr-defined] # structured fields
    assert bool(record.exc_info) is has_traceback


def test_when_all_fail_there_is_no_answer(store: Any) -> None:
    chain = chain_for([lambda account_id: 1 / 0, cached(max_age=5)])
    assert chain.answer(a_call(1), store) is None


def test_changing_a_constant_that_was_served_changes_no_later_answer(store: Any) -> None:
    chain = chain_for(constant([1]))
    first = chain.answer(a_call(1), store)
    assert first is not None
    first.value.append(2)
    assert chain.answer(a_call(1), store) == Served([1], "constant")


# --- cached -----------------------------------------------------------------------------------------


def test_the_last_good_value_is_served_with_its_age(store: Any) -> None:
    chain = chain_for(cached(max_age=60))
    call = a_call(1)
    chain.remember(call, {"eur": 10}, store)
    chain.remember(call, {"eur": 12}, store)
    store.now += 59
    assert chain.answer(call, store) == Served({"eur": 12}, "cached", 59.0)
    store.now += 2
    assert chain.answer(call, store) is None
    assert store.ttls == [60]


def test_one_call_written_in_different_ways_is_one_key(store: Any) -> None:
    chain = chain_for(cached(max_age=60))
    chain.remember(a_call(1), 10, store)
    for args, kwargs in ([1, "EUR"], {}), ([1], {"currency": "EUR"}), ([], {"currency": "EUR", "account_id": 1}):
        assert chain.answer(a_call(*args, **kwargs), store) == Served(10, "cached", 0.0)


@pytest.mark.parametrize(
    "other", [a_call(2), a_call("1"), a_call(1, "USD"), a_call(account_id=3), Call("shop.other", balance, [1])]
)
def test_other_arguments_or_another_task_are_another_key(store: Any, other: Call) -> None:
    chain = chain_for(cached(max_age=60))
    chain.remember(a_call(1), 10, store)
    assert chain.answer(other, store) is None


def test_variadic_bodies(store: Any) -> None:
    def body(*args: Any, **kwargs: Any) -> None: ...

    chain = chain_for(cached(max_age=60), body)
    chain.remember(Call("shop.balance", body, [1, 2], {"a": 1, "b": 2}), 10, store)
    assert chain.answer(Call("shop.balance", body, [1, 2], {"b": 2, "a": 1}), store) == Served(10, "cached", 0.0)
    assert chain.answer(Call("shop.balance", body, [2, 1], {"a": 1, "b": 2}), store) is None


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [
        ("account_id", a_call(account_id=1), a_call(2, currency="USD")),
        (lambda args, kwargs: f"{args[0] % 2}{kwargs.get('currency')}", a_call(3, currency="USD"), a_call(1)),
    ],
)
def test_a_parameter_or_a_callable_as_key(store: Any, key: Any, same: Call, other: Call) -> None:
    chain = chain_for(cached(max_age=60, key=key))
    chain.remember(a_call(1, currency="USD"), 10, store)
    assert chain.answer(same, store) == Served(10, "cached", 0.0)
    assert chain.answer(other, store) is None


@pytest.mark.parametrize(
    ("key", "call"),
    [
        (lambda args, kwargs: kwargs["absent"], a_call(1)),
        (lambda args, kwargs: None, a_call(1)),
        (None, a_call(object())),
        (None, a_call(1, "EUR", "too many")),
    ],
)
def test_a_call_that_has_no_key_is_a_miss(store: Any, caplog: pytest.LogCaptureFixture, key: Any, call: Call) -> None:
    chain = chain_for([cached(max_age=60, key=key), constant(7)])
    chain.remember(call, 10, store)
    assert store.kept == {}
    assert chain.answer(call, store) == Served(7, "constant")
    assert "shop.balance[17]: this call cannot be cached" in caplog.text


@pytest.mark.parametrize(
    "value",
    [
        None,
        0,
        "text",
        [1, {"a": [2.5, None]}],
        dt.datetime(2030, 1, 2, 3, tzinfo=dt.timezone.utc),
        decimal.Decimal("1.10"),
        "x" * (LARGEST_VALUE - 2),  # JSON adds two quotes
        uuid.UUID(int=7),
    ],
)
def test_values_come_back_as_celery_results_do(store: Any, value: Any) -> None:
    chain = chain_for(cached(max_age=60))
    call = a_call(1)
    chain.remember(call, value, store)
    assert chain.answer(call, store) == Served(value, "cached", 0.0)


@pytest.mark.parametrize("value", ["x" * (LARGEST_VALUE - 1), object()])
def test_a_value_too_large_or_not_json_is_not_kept_and_warned_of_once(
    store: Any, caplog: pytest.LogCaptureFixture, value: Any
) -> None:
    chain = chain_for(cached(max_age=60))
    for account in 1, 2:
        chain.remember(a_call(account), value, store)
    assert store.kept == {}
    assert [(record.levelno, "shop.balance" in record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, True)
    ]


def test_a_value_that_cannot_be_read_is_a_miss(store: Any) -> None:
    chain = chain_for([cached(max_age=60), constant(7)])
    call = a_call(1)
    chain.remember(call, 10, store)
    [entry] = store.kept
    store.kept[entry] = (b"{broken", store.now, 60)
    assert chain.answer(call, store) == Served(7, "constant")


def test_two_ages_share_one_entry_that_lives_as_long_as_the_longer(store: Any) -> None:
    fresh, stale = cached(max_age=10), cached(max_age=60)
    chain = chain_for([fresh, lambda account_id: 1 / 0, stale])
    call = a_call(1)
    chain.remember(call, 10, store)
    store.now += 30
    assert store.ttls == [60]
    assert fresh.answer(call, store) is None
    assert chain.answer(call, store) == Served(10, "cached", 30.0)


def test_nothing_is_written_for_a_chain_without_cached(store: Any) -> None:
    chain = chain_for([balance, constant(1)])
    chain.remember(a_call(1), 10, store)
    assert store.kept == {}


def test_a_store_that_is_away_is_a_miss_and_does_no_harm(store: Any) -> None:
    chain = chain_for([cached(max_age=60), constant(7)])
    call = a_call(1)
    store.away = True
    chain.remember(call, 10, store)
    assert chain.answer(call, store) == Served(7, "constant")
    store.away = False
    assert store.kept == {}


# --- mistakes found at definition -------------------------------------------------------------------


async def asynchronous(account_id: int) -> int:
    return account_id


class AsynchronousObject:
    async def __call__(self, account_id: int) -> int:
        return account_id


@pytest.mark.parametrize(
    ("fallback", "allowed"),
    [
        ("other_source", "a function"),
        (7, "a function"),
        ([balance, None], "a function"),
        (cached, "cached(max_age=...)"),
        (constant, "constant(...)"),
        (cached(max_age=0), "positive number of seconds"),
        (cached(max_age=-1), "positive number of seconds"),
        (cached(max_age=float("inf")), "positive number of seconds"),
        (cached(max_age=True), "positive number of seconds"),
        (cached(max_age=cast("float", "60")), "positive number of seconds"),
        (cached(max_age=60, key="account"), "account_id, currency"),
        (cached(max_age=60, key=cast("str", 3)), "name of a parameter"),
        (constant(object()), "JSON"),
        (asynchronous, "plain function"),
        (partial(asynchronous, 1), "plain function"),
        (AsynchronousObject(), "plain function"),
    ],
)
def test_a_fallback_that_cannot_work_names_the_task_and_what_is_allowed(fallback: Any, allowed: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        chain_for(fallback)
    assert "'shop.balance'" in str(caught.value)
    assert allowed in str(caught.value)


def test_a_key_must_be_one_parameter_not_all_of_them() -> None:
    def body(*args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(ConfigurationError, match=r"key='kwargs'.*\(none\)"):
        chain_for(cached(max_age=60, key="kwargs"), body)


# --- provenance -------------------------------------------------------------------------------------


def test_provenance_is_kept_beside_the_result(store: Any) -> None:
    write_provenance(store, "task-1", Served(10, "cached", 30.0), "payments", ttl=60)
    assert read_provenance(store, "task-1") == Provenance("cached", 30.0, "payments")
    assert read_provenance(store, "task-2") is None
    store.now += 60
    assert read_provenance(store, "task-1") is None


def test_a_store_that_is_away_loses_provenance_and_cannot_return_it(store: Any) -> None:
    store.away = True
    write_provenance(store, "task-1", Served(10, "constant"), "payments", ttl=60)  # costs the note, not the task
    with pytest.raises(StoreError):
        read_provenance(store, "task-1")
