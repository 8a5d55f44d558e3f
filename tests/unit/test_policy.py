"""Policies are immutable and checked when they are written down."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.policy import BreakerPolicy


def test_a_policy_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BreakerPolicy().window = 5.0  # type: ignore[misc]
    assert BreakerPolicy(window=5) == BreakerPolicy(window=5.0)
    assert BreakerPolicy(window=5) != BreakerPolicy(window=6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("failure_rate_threshold", 0),
        ("failure_rate_threshold", 1.01),
        ("failure_rate_threshold", "0.5"),
        ("failure_rate_threshold", True),
        ("failure_rate_threshold", math.nan),
        ("slow_call_duration", 0),
        ("slow_call_rate_threshold", None),
        ("consecutive_failures", 0),
        ("consecutive_failures", 2.5),
        ("minimum_calls", 0),
        ("window", 0.05),
        ("window", 1e9),
        ("window", math.inf),
        ("open_duration", -1),
        ("open_multiplier", 0.9),
        ("open_jitter", 1.5),
        ("trial_calls", 0),
        ("trial_timeout", None),
        ("ramp", -0.1),
        ("resume_rate", 0),
        ("max_concurrency", 0),
        ("max_concurrency", 1_000_001),
        ("max_concurrency_per_worker", 2.0),
        ("concurrency", "auto"),
        ("concurrency", None),
        ("min_concurrency", 0),
        ("max_deferred", 0),
        ("overflow", "drop"),
        ("overflow", None),
        ("classify", "dependency_errors"),
        ("failures", (3,)),
        ("ignore", "ValueError"),
    ],
)
def test_the_message_names_field_value_and_what_is_allowed(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as raised:
        BreakerPolicy(**{field: value})
    assert str(raised.value).startswith(f"{field}={value!r}: allowed is ")


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"open_duration": 400.0}, ["max_open_duration", "open_duration"]),
        ({"trial_calls": 2, "trial_successes": 3}, ["trial_successes", "trial_calls"]),
        (
            {"concurrency": "adaptive", "min_concurrency": 5, "max_concurrency": 4},
            ["min_concurrency", "max_concurrency"],
        ),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(settings: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        BreakerPolicy(**settings)
    assert all(name in str(raised.value) for name in names)


@pytest.mark.parametrize("given", [KeyError, [KeyError], (KeyError,)])
def test_one_matcher_or_many(given: Any) -> None:
    policy = BreakerPolicy(failures=given, ignore=given)
    assert policy.failures == policy.ignore == (KeyError,)


def test_all_trials_must_succeed_unless_said_otherwise() -> None:
    assert BreakerPolicy(trial_calls=4).needed_successes == 4
    assert BreakerPolicy(trial_calls=4, trial_successes=2).needed_successes == 2
