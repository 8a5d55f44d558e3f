"""Tasks of several breakers: all must admit, and each dependency answers for itself."""

from __future__ import annotations

import pytest

from tests.integration.conftest import Shop


@pytest.fixture
def running(shop: Shop) -> Shop:
    shop.worker()
    return shop


def test_a_task_waits_for_one_breaker_after_the_other_and_runs_once(running: Shop) -> None:
    running.open("accounts")
    result = running.transfer.delay(1)
    running.wait(lambda: running.waiting("accounts") == 1, "it to wait for accounts")
    running.open("payments")
    running.close("accounts")
    running.wait(lambda: running.waiting("payments") == 1, "it to wait for payments")
    assert (result.state, result.info["breaker"]) == ("DEFERRED", "payments")
    assert running.waiting("accounts") == 0
    assert running.runs("transfer") == []
    running.close("payments")
    assert result.get(timeout=60) == 1
    assert running.runs("transfer") == [result.id]
    running.wait(lambda: running.payments.snapshot().calls == running.accounts.snapshot().calls == 1, "both to count")


def test_a_failure_is_put_to_the_dependency_that_was_called(running: Shop) -> None:
    running.set_health("accounts", "down")
    results = [running.transfer.delay(order) for order in range(6)]
    running.wait(lambda: running.accounts.snapshot().state == "OPEN", "accounts to open")
    assert running.payments.snapshot().failures == 0
    running.wait(lambda: running.waiting("accounts") == len(results), "all to wait for accounts")
    assert running.waiting("payments") == 0
    running.set_health("accounts", "up")
    running.wait_done(*results)
    assert running.payments.snapshot().failures == 0
