"""What type checkers see. Each ignore below is itself a check: mypy complains of one that is not needed."""

from __future__ import annotations

from dataclasses import fields

import pytest

from resilient_tasks import BreakerPolicy, ConfigurationError, Resilience
from resilient_tasks.policy import PolicyFields
from resilient_tasks.settings import Settings, SettingsFields
from resilient_tasks.testing import in_memory


def test_keyword_arguments_of_a_breaker_are_the_fields_of_its_policy() -> None:
    declared = {each.name: each.type for each in fields(BreakerPolicy)}
    lenient = dict.fromkeys(("failures", "ignore"), "Matcher | Sequence[Matcher]")
    found = {name: reference.__forward_arg__ for name, reference in PolicyFields.__annotations__.items()}
    assert found == {**declared, **lenient}


def test_keyword_arguments_of_resilience_are_its_settings() -> None:
    assert SettingsFields.__annotations__.keys() == Settings.model_fields.keys()


def test_mistakes_are_seen_before_anything_runs() -> None:
    resilience = Resilience(store_url="redis://127.0.0.1:1/0", namespace="typing")
    with pytest.raises(ConfigurationError, match="did you mean 'failure_rate_threshold'"):
        resilience.breaker("x", failure_rate_treshold=0.5)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(ConfigurationError):
        resilience.breaker("x", window="thirty")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ConfigurationError):
        resilience.breaker("x", concurrency="invalid")  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ConfigurationError):
        Resilience(namespce="x")  # type: ignore[call-arg]  # what is tested
    payments = resilience.breaker("payments", failures=KeyError, ignore=[OSError], overflow="block")
    with in_memory(resilience):
        length: int = payments.call(len, "abc")
        assert length == 3
        with pytest.raises(TypeError):
            payments.call(len, 3)  # type: ignore[arg-type]  # what is tested
