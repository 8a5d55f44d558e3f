"""Tasks of several breakers: all must admit, and each dependency answers for itself."""

from __future__ import annotations

from tests.integration.conftest import Shop


def test_a_task_waits_for_one_breaker_after_the_other_and_runs_once(shop: Shop) -> None:
    shop.open("payments")
    shop.open("accounts")
    shop.worker()
    result = shop.transfer.delay(1)
    shop.wait(lambda: shop.waiting("payments") == 1, "it to wait for payments")
    shop.close("payments")
    shop.wait(lambda: shop.waiting("accounts") == 1, "it to wait for accounts")
    assert (result.state, result.info["breaker"]) == ("DEFERRED", "accounts")
    assert shop.waiting("payments") == 0
    assert shop.runs("transfer") == []
    shop.close("accounts")
    assert result.get(timeout=60) == 1
    assert shop.runs("transfer") == [result.id]
    shop.wait(lambda: shop.payments.snapshot().calls == shop.accounts.snapshot().calls == 1, "both to count")


def test_a_failure_is_put_to_the_dependency_that_was_called(shop: Shop) -> None:
    shop.worker()
    shop.set_health("accounts", "down")
    results = [shop.transfer.delay(order) for order in range(6)]
    shop.wait(lambda: shop.accounts.snapshot().state == "OPEN", "accounts to open")
    assert shop.payments.snapshot().failures == 0
    shop.wait(lambda: shop.waiting("accounts") == len(results), "all to wait for accounts")
    assert shop.waiting("payments") == 0
    shop.set_health("accounts", "up")
    shop.wait_done(*results)
    assert shop.payments.snapshot().failures == 0
