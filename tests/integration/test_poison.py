"""One poisoned task among healthy ones: however often it fails, the breaker never opens."""

from __future__ import annotations

from tests.integration.conftest import Shop

RUNS = 10  # of a task with nine retries


def test_a_task_that_fails_ten_times_in_a_row_opens_no_breaker(shop: Shop) -> None:
    worker = shop.worker()
    shop.set_health("poison", "down")
    poisoned = shop.poisoned.delay()
    shop.wait_state(poisoned, "FAILURE")
    shop.wait_done(shop.charge.delay(1))
    assert shop.calls("poison") == RUNS
    assert shop.payments.policy.consecutive_failures == 3
    assert shop.resilience.fleet.history.transitions("payments") == []
    assert worker.running


def test_a_task_that_waits_between_its_failures_uses_up_its_attempts_and_opens_no_breaker(shop: Shop) -> None:
    worker = shop.worker()
    shop.set_health("poison", "down")
    poisoned = shop.charge.apply_async((0,), {"dependency": "poison"})

    def failed_for_good_while_others_were_served() -> bool:
        shop.wait_done(shop.charge.delay(1))
        return bool(poisoned.state == "FAILURE")

    shop.wait(failed_for_good_while_others_were_served)
    assert shop.calls("poison") >= shop.charge.max_attempts
    history = shop.resilience.fleet.history
    shop.wait(lambda: history.totals(["payments"])["payments"].dead == 1, "its dead letter to be counted")
    assert history.transitions("payments") == []
    assert worker.running
