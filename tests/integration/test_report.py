"""An outage is reported afterwards as it was, and while it lasts as far as can be known."""

from __future__ import annotations

import json
from typing import Any

from resilient_tasks import BreakerOpenError
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.core.outage import Outage
from tests.integration.conftest import TIMEOUT, Shop
from tests.integration.test_cli import here

ORDERS = 30


def test_an_outage_is_reported_as_it_was(shop: Shop) -> None:
    shop.beat()
    shop.worker()
    shop.wait_done(shop.balance.delay(1))
    for dependency in ("payments", "accounts"):
        shop.set_health(dependency, "down")
    charges = [shop.charge.delay(order) for order in range(ORDERS)]
    shop.wait(lambda: shop.waiting("payments") == ORDERS, "all to wait")
    shop.wait(lambda: shop.accounts.snapshot().state == State.OPEN or not shop.balance.delay(1), "accounts to open")

    def is_refused() -> bool:
        result = shop.strict.delay(1)
        shop.wait_state(result, "FAILURE")
        return isinstance(result.result, BreakerOpenError)

    shop.wait(is_refused)  # and no trial

    def estimate() -> Any:
        return shop.resilience.estimate("payments")

    shop.wait(lambda: estimate().waiting == ORDERS, "the trials to be back")
    assert (estimate().rate, estimate().done_in) == (None, None)
    shop.wait(lambda: f"{ORDERS} waiting" in here(shop, "show", "payments").output, "the trials to be back")
    assert "unknown" in here(shop, "report", "payments").output

    for dependency in ("payments", "accounts"):
        shop.set_health(dependency, "up")
    shop.wait_done(*charges)

    def complete() -> Outage | None:
        [outage] = shop.resilience.outages("payments")
        counts = outage.counts
        is_whole = outage.drained and counts.resumed - counts.deferred_again == ORDERS
        return outage if is_whole and counts.calls.get(Outcome.SUCCESS, 0) else None

    shop.wait(complete, "the outage to be over, and all that was counted to be reported")
    outage = complete()
    assert outage is not None
    assert outage.counts.deferred == ORDERS
    assert outage.failed_calls == len(shop.runs("charge")) - ORDERS
    assert outage.causes == [("DependencyDownError", outage.failed_calls)]
    assert outage.counts.refused >= ORDERS - outage.failed_calls
    assert outage.opened < (outage.closed or 0) < (outage.drained or 0)
    assert 0 < outage.longest_wait < TIMEOUT
    assert shop.resilience.estimate("payments") is None

    [reported] = json.loads(here(shop, "report", "payments", "--since", "1h", "--format", "json").output)
    assert (reported["breaker"], reported["failed_calls"], reported["estimate"]) == (
        "payments",
        outage.failed_calls,
        None,
    )
    markdown = here(shop, "report", "--format", "markdown").output
    assert markdown.count("## Outage of ") == 2
    assert f"| tasks deferred | {ORDERS} |" in markdown
    assert here(shop, "report", "probed").output == "no outage is remembered\n"

    [accounts] = shop.resilience.outages("accounts")
    assert accounts.counts.fallbacks["cached"] >= 1
    assert accounts.counts.failed == 1
    assert 0 <= accounts.average_answer_age <= accounts.oldest_answer


def test_outages_of_a_tenant_and_by_hand_are_reported_as_they_were(shop: Shop) -> None:
    shop.worker()
    shop.set_health("tenants-acme", "down")
    bills = [shop.bill.delay(order) for order in range(10)]
    shop.wait(lambda: shop.waiting("tenants:acme") == len(bills), "the tenant's tasks to wait")
    shop.set_health("tenants-acme", "up")
    shop.wait_done(*bills)

    shop.payments.isolate(reason="maintenance", actor="ann@desk")
    shop.wait_until_known("payments")
    charges = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == len(charges), "all to wait")
    shop.resilience.deferred.drop("payments", [charges[0].id])
    shop.app.control.revoke(charges[1].id)
    shop.wait_state(charges[1], "REVOKED")
    shop.close("payments")
    shop.wait_done(*charges[2:])

    def complete(name: str, resumed: int) -> Outage | None:
        [outage] = shop.resilience.outages(name)
        net = outage.counts.resumed - outage.counts.deferred_again
        return outage if (net, outage.counts.calls.get(Outcome.SUCCESS)) == (resumed, resumed) else None

    def ends() -> tuple[int, int, int, int]:
        counts = shop.resilience.outages("payments")[0].counts
        return counts.deferred, counts.dropped, counts.revoked, counts.dead

    shop.wait(lambda: ends() == (5, 1, 1, 0), "this process to report what it dropped, too")
    shop.wait(lambda: complete("tenants", 10), "all about the tenant to be reported")
    shop.wait(lambda: complete("payments", 3), "all about the maintenance to be reported")
    [acme], [maintenance] = shop.resilience.outages("tenants"), shop.resilience.outages("payments")
    assert (acme.breaker, acme.counts.deferred) == ("tenants:acme", 10)
    assert acme.failed_calls == shop.calls("tenants-acme") - 10
    assert acme.causes == [("DependencyDownError", acme.failed_calls)]
    assert (maintenance.reason, maintenance.actor) == ("maintenance", "ann@desk")
    assert (maintenance.failed_calls, maintenance.causes) == (0, [])
    assert shop.resilience.outages("payments", since=3600) == [maintenance]
