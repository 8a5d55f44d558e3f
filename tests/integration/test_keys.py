"""Breakers of single tenants, regions and hosts: each fails for itself, up to a point."""

from __future__ import annotations

import pytest
from celery.bin.base import CLIContext
from click.testing import CliRunner

from resilient_tasks import ConfigurationError, cli
from tests.integration.conftest import Shop


def breakers(shop: Shop, *args: str) -> str:
    """Run a command of ``celery breakers`` in this process, and return what it prints."""
    result = CliRunner().invoke(cli.breakers, args, obj=CLIContext(app=shop.app, no_color=True, workdir=None))
    assert result.exit_code == 0, result.output
    return result.output


def test_the_outage_of_one_tenant_defers_its_tasks_alone_and_outlives_the_workers(shop: Shop) -> None:
    worker = shop.worker()
    shop.set_health("tenants-acme", "down")
    suffering = [shop.bill.delay(order) for order in range(4)]
    suffering += [shop.bill.delay(order, tenant="acme") for order in range(4, 8)]
    shop.wait(lambda: shop.waiting("tenants:acme") == len(suffering), "the tenant's tasks to wait")
    healthy = [shop.bill.delay(order, "other") for order in range(20)]
    shop.wait_done(*healthy)
    shop.wait(
        lambda: shop.tenants.child("other").snapshot().calls == len(healthy), "the store to know the other tenant"
    )
    assert suffering[0].info["breaker"] == "tenants:acme"
    assert shop.waiting("tenants") == 0
    assert shop.tenants.snapshot().active_children == 1

    with pytest.raises(ConfigurationError, match="key '' of breaker 'tenants'"):
        shop.bill.delay(1, tenant="").get(timeout=60)

    assert breakers(shop, "isolate", "tenants:*") == "tenants:acme is FORCED_OPEN\ntenants:other is FORCED_OPEN\n"
    shop.wait(lambda: shop.waiting("tenants:acme") == len(suffering), "the trials to wait again")
    worker.stop()
    shop.set_health("tenants-acme", "up")
    assert len(breakers(shop, "deferred", "tenants:*", "--id").split()) == len(suffering)
    assert breakers(shop, "reset", "tenants:acme") == "tenants:acme is CLOSED\n"
    shop.broker.delete(*shop.broker.scan_iter("resilient:*"))  # nor has the store, now
    shop.worker()  # which has never seen the tenant
    shop.wait_done(*suffering)
    assert shop.tenants.snapshot().calls == 0


def test_few_hosts_may_be_open_at_once(shop: Shop) -> None:
    shop.worker()
    for host in "abc":
        shop.set_health(f"hosts-{host}", "down")

    def states() -> list[str]:
        return [str(shop.hosts.child(host).snapshot().state) for host in "ab"]

    calls = [shop.fetch.delay(host) for host in "abaa"]
    shop.wait(lambda: states() == ["OPEN", "CLOSED"], "the first that fails three times to open")
    calls += [shop.fetch.delay("b") for _ in range(2)]
    shop.wait(lambda: shop.hosts.child("b").snapshot().failures == 3, "both to have failed")
    assert states() == ["OPEN", "CLOSED"]
    with pytest.raises(ConnectionError):
        shop.fetch.delay("c").get(timeout=60)
    shop.wait(lambda: shop.hosts.snapshot().calls == 1, "the parent to count: two keys are all there may be")
    shop.hosts.child("a").reset()
    for call in calls:
        call.get(timeout=60, propagate=False)
        call.forget()
