"""One poisoned task among healthy ones: it uses up its attempts, and the breaker never opens."""

from __future__ import annotations

from tests.integration.conftest import Shop


def test_a_poisoned_task_opens_no_breaker(shop: Shop) -> None:
    worker = shop.worker()
    shop.set_health("poison", "down")
    poisoned = shop.charge.apply_async((0,), {"dependency": "poison"})
    healthy = []

    def failed_for_good_while_others_were_served() -> bool:
        healthy.append(shop.charge.delay(len(healthy)))
        return bool(healthy[-1].get(timeout=60) == len(healthy) - 1 and poisoned.state == "FAILURE")

    shop.wait(failed_for_good_while_others_were_served)
    assert shop.calls("poison") >= shop.charge.max_attempts
    history = shop.resilience.fleet.history
    shop.wait(lambda: history.totals(["payments"])["payments"].dead == 1, "its dead letter to be counted")
    assert history.transitions("payments") == []
    assert worker.running
