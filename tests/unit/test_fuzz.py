"""Whatever is written as a name, a key, a setting, a policy or an option: it is accepted, or a clear error."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from celery import Celery
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks import BreakerPolicy, ConfigurationError, Resilience, cached
from resilient_tasks.core.rules import Rules
from resilient_tasks.fallback import Call
from resilient_tasks.settings import PREFIX, Settings
from resilient_tasks.store.address import find_store
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.local import LocalStore
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.worker.definitions import TaskOptions

texts = st.text() | st.text("abz09_.-: {}\n\x00", max_size=12) | st.just("x" * 1000)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1, -1, True, 10**400, -(10**400), 1e-320, 2**63])
plain = st.none() | st.booleans() | numbers | texts | st.binary(max_size=5)
values = st.recursive(
    plain | st.sampled_from([len, KeyError, object()]),
    lambda inner: st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
POLICY_FIELDS = list(BreakerPolicy.__dataclass_fields__)
OPTIONS = ["breaker", "fallback", "on_open", "on_failure", "max_attempts", "defer_for", "retrying", "breaker_key"]
task_names = (f"task-{number}" for number in count())


def some_of(names: list[str], strategy: st.SearchStrategy[Any] = values) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), strategy, min_size=1, max_size=3)


@contextmanager
def clear_errors(names: Iterable[str]) -> Iterator[None]:
    """Take an error for an answer if it names at least one of what was given."""
    try:
        yield
    except ConfigurationError as error:
        text = str(error)
        see_one_named(text, names)


def see_one_named(text: str, names: Iterable[str]) -> None:
    assert any(name in text for name in names), text


@given(some_of(POLICY_FIELDS))
def test_a_policy(fields: dict[str, Any]) -> None:
    with clear_errors(fields):
        rules = Rules.from_policy(BreakerPolicy(**fields), 0)
        assert 0 < rules.open_for(10**6, 10**15, 1.0) <= 2 * rules.max_open_time + 1


@given(some_of([*POLICY_FIELDS, "unknown"]))
def test_a_breaker(fields: dict[str, Any]) -> None:
    with clear_errors(fields):
        assert Resilience(namespace="fuzz").breaker("payments", **fields).policy == BreakerPolicy(**fields)


@given(texts | values)
def test_the_name_of_a_breaker(name: Any) -> None:
    with clear_errors([f"breaker name {name!r}"]):
        assert Resilience(namespace="fuzz").breaker(name).name == name
        assert all("{" + name + "}" in key for key in Keys("fuzz").breaker(name))


@pytest.fixture(scope="module")
def app() -> Celery:
    app = Celery("fuzz", broker="memory://", set_as_current=False)
    Resilience(app, namespace="fuzz").breaker("payments")
    return app


def do_nothing() -> None: ...


@given(some_of(OPTIONS))
def test_task_options(app: Celery, options: dict[str, Any]) -> None:
    name = next(task_names)
    with clear_errors(f"task {name!r}: {option}" for option in options):
        task: Any = app.task(name=name, shared=False, lazy=False, **{"breaker": "payments", **options})(do_nothing)
        assert task.breaker is None or isinstance(task.options, TaskOptions)


# --- settings -----------------------------------------------------------------------------------------

variables = st.sampled_from([
    "STORE_URL", "NAMESPACE", "TICK_INTERVAL", "STORE_TIMEOUT", "STORE_MEMORY_LIMIT", "X",
    *(f"BREAKERS__PAYMENTS__{field.upper()}" for field in POLICY_FIELDS), "BREAKERS__PAYMENTS__NO_FIELD",
    "BREAKERS", "BREAKERS__PAYMENTS", "BREAKERS__",
]) | st.text("ABZ_09é", min_size=1, max_size=10)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"))  # what an environment can hold
said = (
    texts
    | numbers.map(str)
    | st.sampled_from(['{"payments": {"window": 3}}', "[1]", "{", "none", "redis://[", "redis://:x"])
)


def environment(settings: Mapping[str, str]) -> Any:
    return mock.patch.dict(os.environ, {PREFIX + name: value for name, value in settings.items()})


@given(st.dictionaries(variables, said, min_size=1, max_size=3))
def test_settings_from_the_environment(settings: dict[str, str]) -> None:
    variables = [PREFIX + name.upper() for name in settings] + [PREFIX + "BREAKERS"]
    with environment(settings), clear_errors([*variables, *(PREFIX + name for name in settings)]):
        loaded = Settings.load()
        assert loaded.policy_for("payments", BreakerPolicy()).window
        assert 0.05 <= loaded.tick_interval <= 3600


@given(some_of(["store_url", "namespace", "tick_interval", "store_timeout", "breakers", "unknown"]))
def test_settings_from_code(settings: dict[str, Any]) -> None:
    with clear_errors([*settings, PREFIX + "BREAKERS"]):
        assert Settings.load(**settings).namespace


urls = st.builds(
    "{}{}".format, st.sampled_from(["", "redis://", "rediss://", "unix://", "sentinel://", "amqp://"]), texts
)


@given(urls, urls, urls | st.none())
def test_where_the_store_is(broker: str, backend: str, store: str | None) -> None:
    conf = SimpleNamespace(
        broker_url=broker, broker_transport_options={}, broker_use_ssl=None,
        result_backend=backend, result_backend_transport_options={}, redis_backend_use_ssl=None,
    )  # fmt: skip
    with suppress(ConfigurationError):
        url, options = find_store(Settings.load(store_url=store).store_url, conf)
        RedisStore(url, namespace="fuzz", **options).close()


# --- keys ---------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(texts, texts), min_size=2, max_size=2, unique=True))
def test_keys_of_values_are_separate(keys: list[tuple[str, str]]) -> None:
    names = Keys("fuzz")
    by_key = [names.value("fallback", key) for _, key in keys]
    assert (by_key[0] == by_key[1]) == (keys[0][1] == keys[1][1])
    assert all(len(name) < 300 and name.isprintable() for name in by_key)


@given(texts, st.lists(values, max_size=2), st.dictionaries(texts, values, max_size=2))
def test_keys_of_cached_calls(key: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    fallback: Any = cached(max_age=60, key=lambda args, kwargs: key)
    call = Call("task", lambda *args, **kwargs: None, args, kwargs)
    digest = fallback.key_of(call)
    assert digest is None or (len(digest) == 64 and fallback.answer(call, LocalStore()) is None)
