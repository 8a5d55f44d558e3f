from __future__ import annotations

import ssl
from typing import Any

import pytest
from celery import Celery

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.settings import Settings
from resilient_tasks.store.address import Address, Kind, find_store, hide_password

PAYMENTS = "RESILIENT_TASKS_BREAKERS__PAYMENTS__"


def environment(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(f"RESILIENT_TASKS_{name}", value)


def refusal(**overrides: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        Settings.load(**overrides)
    assert caught.value.__cause__ is None
    return str(caught.value)


# --- reading ----------------------------------------------------------------------------------------


def test_defaults() -> None:
    settings = Settings.load()
    assert (settings.store_url, settings.namespace, settings.breakers) == (None, "resilient", {})
    assert (settings.tick_interval, settings.store_timeout, settings.store_memory_limit) == (1.0, 0.5, "80%")
    assert settings.gate_producers is False


def test_arguments_win_over_environment_and_none_is_no_argument(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, STORE_URL="redis://store/3", NAMESPACE="shop", TICK_INTERVAL="0.25", GATE_PRODUCERS="true")
    settings = Settings.load(namespace="mine", tick_interval=None)
    assert (settings.store_url, settings.namespace) == ("redis://store/3", "mine")
    assert (settings.tick_interval, settings.gate_producers) == (0.25, True)


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, STORE_URL="", TICK_INTERVAL="", BREAKERS__PAYMENTS__WINDOW="")
    settings = Settings.load()
    assert settings.store_url is None
    assert settings.tick_interval == 1.0
    assert settings.policy_for("payments", BreakerPolicy(window=60.0)).window == 60.0


def test_settings_do_not_change_after_loading() -> None:
    settings = Settings.load()
    with pytest.raises(ValueError, match="frozen"):
        settings.namespace = "other"


def test_the_password_does_not_show_in_the_repr() -> None:
    assert "hush" not in repr(Settings.load(store_url="redis://:hush@store"))


# --- mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("TICK_INTERVAL", "fast", "a number of seconds from 0.05 to 3600"),
        ("TICK_INTERVAL", "0.04", "a number of seconds from 0.05 to 3600"),
        ("TICK_INTERVAL", "3601", "a number of seconds from 0.05 to 3600"),
        ("TICK_INTERVAL", "nan", "a number of seconds from 0.05 to 3600"),
        ("STORE_TIMEOUT", "0", "a number of seconds from 0.01 to 60"),
        ("STORE_MEMORY_LIMIT", "much", "a share of the server's maxmemory like 80%, a size like 512mb, or none"),
        ("STORE_MEMORY_LIMIT", "101%", "a share of the server's maxmemory"),
        ("LATE_AFTER", "0", "a number of seconds from 0.01 to 3600"),
        ("SPARE_SLOTS", "-1", "a whole number from 0 to 64"),
        ("SPARE_SLOTS", "65", "a whole number from 0 to 64"),
        ("SPARE_SLOTS", "some", "a whole number from 0 to 64"),
        ("NAMESPACE", "my shop", "letters, digits"),
        ("NAMESPACE", "-shop", "letters, digits"),
        ("NAMESPACE", "größe", "letters, digits"),
        ("NAMESPACE", "x" * 101, "1 to 100"),
        ("STORE_URL", "http://store", "redis://"),
        ("STORE_URL", "***", "redis://"),
        ("GATE_PRODUCERS", "perhaps", "true or false"),
        ("BREAKERS", "[1]", "policy fields per breaker"),
        ("BREAKERS__PAYMENTS", "3", "policy fields per breaker"),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, allowed: str
) -> None:
    environment(monkeypatch, **{variable: value})
    message = refusal()
    assert f"RESILIENT_TASKS_{variable}" in message
    assert value in message
    assert allowed in message


@pytest.mark.parametrize(
    ("variable", "value", "shown"),
    [
        ("STORE_URL", ":s3cret@store", "='***': allowed is"),
        ("STORE_URL", "amqp://me:s3cret@store", "='amqp://me:***@store': allowed is"),
        ("BREAKERS", "{s3cret", " is no JSON: allowed is a JSON object"),
    ],
)
def test_what_may_hold_a_password_is_not_quoted(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, shown: str
) -> None:
    environment(monkeypatch, **{variable: value})
    message = refusal()
    assert message.startswith(f"RESILIENT_TASKS_{variable}{shown}")
    assert "s3cret" not in message


def test_a_bad_argument_is_named_as_the_argument_it_is() -> None:
    assert refusal(tick_interval="fast").startswith("tick_interval='fast': allowed is")


@pytest.mark.parametrize("variable", ["TICK_INTERVALL", "STORE_URL__HOST", "X", "tick_intervall"])
def test_an_unknown_variable_is_an_error(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    environment(monkeypatch, **{variable: "redis://:hush@x"})
    message = refusal()
    assert f"RESILIENT_TASKS_{variable}" in message
    assert "RESILIENT_TASKS_TICK_INTERVAL," in message
    assert "hush" not in message


def test_an_unknown_argument_is_an_error() -> None:
    assert refusal(tick=3).startswith("tick is not a setting; allowed are store_url, namespace, tick_interval, ")


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("FAILURE_RATE", "0.3", "failure_rate_threshold"),
        ("FAILURE_RATE_THRESHOLD", "1.5", "a number above 0 and up to 1"),
        ("FAILURE_RATE_THRESHOLD", "high", "a number above 0 and up to 1"),
        ("MINIMUM_CALLS", "2.5", "an integer of 1 or more"),
        ("WINDOW", "inf", "seconds"),
        ("WINDOW", "none", "seconds"),
        ("CLASSIFY", "shop.classify", "give it in code"),
        ("FAILURES", "KeyError", "give it in code"),
        ("IGNORE", "KeyError", "give it in code"),
        ("WINDOW__X", "1", "seconds"),
    ],
)
def test_a_bad_override_is_found_at_loading(
    monkeypatch: pytest.MonkeyPatch, field: str, value: str, allowed: str
) -> None:
    monkeypatch.setenv(PAYMENTS + field, value)
    message = refusal()
    assert message.startswith(PAYMENTS + field.partition("__")[0])
    assert value in message
    assert allowed in message


# --- overrides per breaker --------------------------------------------------------------------------


def test_an_override_wins_over_code_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PAYMENTS + "FAILURE_RATE_THRESHOLD", "0.3")
    monkeypatch.setenv(PAYMENTS + "MINIMUM_CALLS", "20")
    monkeypatch.setenv(PAYMENTS + "SLOW_CALL_DURATION", "None")
    in_code = BreakerPolicy(failure_rate_threshold=0.9, window=60.0, slow_call_duration=2.0)
    settings = Settings.load()
    policy = settings.policy_for("payments", in_code)
    assert policy == BreakerPolicy(failure_rate_threshold=0.3, minimum_calls=20, window=60.0)
    assert settings.policy_for("mail", in_code) is in_code


@pytest.mark.parametrize("name", ["pay_api.v2", "pay-api-v2", "Pay.API.v2", "pay:api v2"])
def test_names_of_variables_know_neither_case_nor_punctuation(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    environment(monkeypatch, BREAKERS__PAY_API_V2__WINDOW="5")
    settings = Settings.load()
    assert settings.policy_for(name, BreakerPolicy()).window == 5
    assert settings.unknown_overrides([name]) == []


def test_overrides_may_be_json(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, BREAKERS='{"pay.api": {"window": 5, "consecutive_failures": null}}')
    policy = Settings.load().policy_for("pay.api", BreakerPolicy(consecutive_failures=3))
    assert (policy.window, policy.consecutive_failures) == (5, None)


def test_an_override_that_contradicts_the_code_names_breaker_and_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PAYMENTS + "OPEN_DURATION", "500")
    with pytest.raises(ConfigurationError) as caught:
        Settings.load().policy_for("payments", BreakerPolicy())
    assert "'payments'" in str(caught.value)
    assert PAYMENTS + "OPEN_DURATION" in str(caught.value)
    assert "max_open_duration=300.0" in str(caught.value)


def test_two_overrides_for_one_breaker_are_ambiguous() -> None:
    settings = Settings.load(breakers={"pay-api": {"window": 5}, "pay_api": {"window": 6}})
    with pytest.raises(ConfigurationError, match=r"'pay-api', 'pay_api'"):
        settings.policy_for("pay.api", BreakerPolicy())


def test_one_override_for_two_breakers_is_ambiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, BREAKERS__PAY_API__WINDOW="5")
    with pytest.raises(ConfigurationError, match=r"RESILIENT_TASKS_BREAKERS__PAY_API__.*'pay-api', 'pay\.api'"):
        Settings.load().unknown_overrides(["pay.api", "pay-api", "mail"])


def test_overrides_of_breakers_that_no_app_defines_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PAYMENTS + "WINDOW", "5")
    environment(monkeypatch, BREAKERS__PAYMENT__WINDOW="5")
    assert Settings.load().unknown_overrides(["payments", "mail"]) == ["payment"]


# --- the store's place -------------------------------------------------------------------------------


def conf(**settings: Any) -> Any:
    """Return Celery's settings."""
    return Celery("shop", set_as_current=False, changes=settings).conf


@pytest.mark.parametrize(
    ("broker", "backend", "expected"),
    [
        ("redis://", None, "redis://"),
        ("redis", None, "redis://"),
        ("redis://:secret@broker:6380/2", "redis://backend", "redis://:secret@broker:6380/2"),
        ("redis://broker?visibility_timeout=5", None, "redis://broker"),
        ("redis+socket:///run/redis.sock?virtual_host=1", None, "redis+socket:///run/redis.sock?virtual_host=1"),
        ("valkey://broker/1", None, "valkey://broker/1"),
        ("redis://one/1;redis://two/1", None, "redis://one/1"),
        (["redis://one/1", "redis://two/1"], None, "redis://one/1"),
        ("amqp://broker", "redis://backend/1", "redis://backend/1"),
    ],
)
def test_the_store_defaults_to_the_first_redis(broker: str | list[str], backend: str | None, expected: str) -> None:
    place = find_store(None, conf(broker_url=broker, result_backend=backend))
    assert place == (expected, {})


@pytest.mark.parametrize(
    ("broker", "use_ssl", "expected"),
    [
        ("rediss://broker/1?ssl_cert_reqs=CERT_REQUIRED", None, ("rediss://broker/1?ssl_cert_reqs=CERT_REQUIRED", {})),
        ("rediss://broker", None, ("rediss://broker", {"ssl_cert_reqs": "none"})),
        ("rediss://broker", {"ssl_cert_reqs": "CERT_NONE"}, ("rediss://broker", {"ssl_cert_reqs": "none"})),
        ("redis://broker", {"ssl_ca_certs": "/ca"}, ("rediss://broker", {"ssl_ca_certs": "/ca"})),
        (
            "redis://broker",
            {"ssl_cert_reqs": ssl.CERT_OPTIONAL, "keyfile": "of another broker"},
            ("rediss://broker", {"ssl_cert_reqs": ssl.CERT_OPTIONAL}),
        ),
    ],
)
def test_the_store_is_reached_by_tls_as_the_broker_is(broker: str, use_ssl: dict, expected: tuple[str, dict]) -> None:
    assert find_store(None, conf(broker_url=broker, broker_use_ssl=use_ssl)) == expected


def test_the_store_is_reached_by_tls_as_the_result_backend_is() -> None:
    use_ssl = {"ssl_ca_certs": "/ca"}
    place = find_store(None, conf(broker_url="amqp://", result_backend="redis://b", redis_backend_use_ssl=use_ssl))
    assert place == ("rediss://b", use_ssl)


@pytest.mark.parametrize(
    "settings",
    [
        {"broker_url": "sentinel://:hush@one:26379/2;sentinel://two", "broker_transport_options": {"master_name": "m"}},
        {
            "broker_url": ["sentinel://:hush@one/2", "sentinel://two:26379"],
            "broker_transport_options": {"master_name": "m"},
        },
        {
            "broker_url": "amqp://",
            "result_backend": "sentinel://:hush@one/2;sentinel://two/2",
            "result_backend_transport_options": {"master_name": "m"},
        },
    ],
)
def test_sentinels_are_those_of_celery(settings: dict) -> None:
    url, options = find_store(None, conf(**settings))
    address = Address.parse(url)
    assert address.kind is Kind.SENTINEL
    assert address.hosts == (("one", 26379), ("two", 26379))
    assert address.options == {"password": "hush", "db": 2}
    assert address.discovery == {"master_name": "m"}
    assert options == {"sentinel_kwargs": {"ssl": False}}


def test_sentinels_are_asked_as_celery_asks_them() -> None:
    transport_options = {"master_name": "m", "min_other_sentinels": 1, "sentinel_kwargs": {"password": "hush"}}
    settings = conf(
        broker_url="sentinel://one", broker_transport_options=transport_options, broker_use_ssl={"ssl_ca_certs": "/ca"}
    )
    url, options = find_store(None, settings)
    assert url == "sentinels://one?master_name=m&min_other_sentinels=1"
    assert options == {"ssl_ca_certs": "/ca", "sentinel_kwargs": {"ssl": False, "password": "hush"}}


def test_the_setting_wins_and_keeps_its_options() -> None:
    url = "valkeys://store/3?socket_timeout=2"
    store_url = Settings.load(store_url=url).store_url
    assert find_store(store_url, conf(broker_url="redis://broker")) == find_store(store_url) == (url, {})


def test_without_any_redis_the_error_says_what_to_set() -> None:
    with pytest.raises(ConfigurationError, match="RESILIENT_TASKS_STORE_URL") as caught:
        find_store(None, conf(broker_url="amqp://me:hush@broker", result_backend="db+sqlite:///x"))
    assert "amqp://me:***@broker" in str(caught.value)
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"the broker \(not set\)"):
        find_store(None)


@pytest.mark.parametrize(
    ("url", "hidden"),
    [
        ("redis://localhost/0", "redis://localhost/0"),
        ("redis://:hush@host:6379/0", "redis://:***@host:6379/0"),
        ("amqp://me:hush@host//", "amqp://me:***@host//"),
        ("redis://me:hu@sh/;x@host", "redis://me:***@host"),
        ("unix:///run/x.sock?db=1&password=hush", "unix:///run/x.sock?db=1&password=***"),
        ("redis://:hush@one;redis://:hush@two", "redis://:***@two"),
        ("sentinel://one?master_name=m&sentinel_password=hush", "sentinel://one?master_name=m&sentinel_password=***"),
        ("memory://", "memory://"),
        ("", ""),
    ],
)
def test_passwords_are_hidden(url: str, hidden: str) -> None:
    assert hide_password(url) == hidden
