"""Tasks that retry themselves beside ``breaker=``: once it is open, none uses up a retry, and none fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.conftest import Shop


def fail_while_open(shop: Shop, send: Callable[[], Any]) -> Any:
    """Send a task whose call is under way when the breaker opens, and then fails."""
    shop.set_health("payments", "hang")
    result = send()
    shop.wait(lambda: shop.calls("payments"), "it to call")
    shop.open("payments")
    shop.set_health("payments", "down")
    return result


def recover(shop: Shop, result: Any) -> Any:
    shop.set_health("payments", "up")
    shop.close("payments")
    return result.get(timeout=60)


@pytest.mark.parametrize("how", ["with the exception", "while it is handled", "plainly"])
@pytest.mark.parametrize("retries", [0, 1])
def test_a_failure_while_it_is_open_waits_and_uses_no_retry_up(running: Shop, how: str, retries: int) -> None:
    result = fail_while_open(running, lambda: running.persistent.apply_async((how,), retries=retries))
    running.wait_state(result, "DEFERRED")
    assert recover(running, result) == [how, retries]
    assert running.runs("persistent") == [result.id] * 2


@pytest.mark.parametrize("name", ["doomed", "doomed_inside"])
def test_nor_does_autoretry_for(running: Shop, name: str) -> None:
    result = fail_while_open(running, getattr(running, name).delay)
    running.wait_state(result, "DEFERRED")
    assert recover(running, result) == 0


def test_a_refusal_inside_the_body_uses_no_retry_up(running: Shop) -> None:
    running.open("payments")
    result = running.doomed_inside.delay()
    running.wait_state(result, "DEFERRED")
    assert result.info["breaker"] == "payments"
    assert recover(running, result) == 0


def test_trials_use_no_retries_up_and_count(running: Shop) -> None:
    running.set_health("payments", "down")
    running.trip("payments")
    result = running.doomed.delay()
    running.wait(lambda: len(running.runs("doomed")) >= 3, "trials to fail")
    assert result.state == "DEFERRED"
    running.wait(lambda: running.payments.snapshot().openings >= 3, "their failures to open it again")
    running.set_health("payments", "up")
    assert result.get(timeout=60) == 0


def test_a_retry_of_other_arguments_is_celerys_while_one_is_left(running: Shop) -> None:
    result = fail_while_open(running, lambda: running.persistent.delay("with other arguments"))
    running.wait_state(result, "DEFERRED")
    assert recover(running, result) == ["with the exception", 1]


def test_a_retry_for_another_reason_is_celerys(running: Shop) -> None:
    result = fail_while_open(running, lambda: running.persistent.apply_async(("for another reason",), retries=1))
    with pytest.raises(ValueError, match="not yet"):
        result.get(timeout=60)
    assert running.waiting("payments") == 0


def test_while_it_is_closed_retries_are_celerys(running: Shop) -> None:
    running.set_health("payments", "down")
    result = running.persistent.delay("with the exception")
    with pytest.raises(ConnectionError):
        result.get(timeout=60)
    assert len(running.runs("persistent")) == 2
