"""A deferred task is the same task: everything it carries comes through."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

import pytest
from celery import chain, chord, group

from tests.integration.conftest import Shop


@pytest.fixture
def closed_and_open(shop: Shop):
    """Return what a task sees when it is never deferred; leaves the breaker open."""
    shop.beat()
    shop.worker()
    return shop


def _release(shop: Shop, results: list) -> list:
    for result in results:
        shop.wait_state(result, "DEFERRED")
    shop.close("payments")
    return [result.get(timeout=60) for result in results]


def test_what_a_task_sees_of_its_message(closed_and_open: Shop) -> None:
    shop = closed_and_open
    options = {
        "args": (1, "two"),
        "kwargs": {"three": [3]},
        "priority": 3,
        "headers": {"x-trace": "abc"},
        "expires": datetime.now(timezone.utc) + timedelta(hours=1),
        "reply_to": "somebody",
        "time_limit": 100,
        "soft_time_limit": 90,
        "stamped_headers": ["tenant"],
        "tenant": "acme",
    }
    straight = shop.describe.apply_async(**options).get(timeout=60)
    shop.open("payments")
    deferred = shop.describe.apply_async(**options)
    seen = _release(shop, [deferred])[0]
    own = {"id", "root_id", "correlation_id"}
    assert seen["id"] == seen["root_id"] == seen["correlation_id"] == deferred.id
    assert {k: v for k, v in seen.items() if k not in own} == {k: v for k, v in straight.items() if k not in own}


def test_chain(closed_and_open: Shop) -> None:
    shop = closed_and_open
    shop.open("payments")
    result = chain(shop.charge.s(7), shop.collect.s()).delay()
    shop.wait_state(result.parent, "DEFERRED")
    shop.close("payments")
    assert result.get(timeout=60) == 7


def test_group_and_chord(closed_and_open: Shop) -> None:
    shop = closed_and_open
    shop.open("payments")
    parts = group(shop.charge.s(order) for order in range(4)).delay()
    whole = chord([shop.charge.s(order) for order in range(10, 14)], shop.collect.s()).delay()
    shop.wait(lambda: shop.waiting("payments") == 8, "all to wait")
    shop.close("payments")
    assert parts.get(timeout=60) == [0, 1, 2, 3]
    assert sorted(whole.get(timeout=60)) == [10, 11, 12, 13]


def test_links_fire_once_and_only_for_the_end(closed_and_open: Shop) -> None:
    shop = closed_and_open
    shop.open("payments")
    good = shop.charge.apply_async((5,), link=shop.note.s("linked"), link_error=shop.note.si("error"))
    _release(shop, [good])
    shop.wait(shop.notes, "the link")
    assert shop.notes() == [["5", "linked"]]


def test_an_expired_task_does_not_run(closed_and_open: Shop) -> None:
    shop = closed_and_open
    shop.open("payments")
    result = shop.charge.apply_async((5,), expires=1.0)
    shop.wait_state(result, "DEFERRED")
    expiry = datetime.now(timezone.utc) + timedelta(seconds=1.2)
    shop.wait(lambda: datetime.now(timezone.utc) > expiry, "it to expire")
    shop.close("payments")
    shop.wait_state(result, "REVOKED")
    assert shop.runs("charge") == []


def test_eta_is_kept_and_the_gate_asked_when_it_is_due(closed_and_open: Shop) -> None:
    shop = closed_and_open
    shop.open("payments")
    result = shop.charge.apply_async((5,), countdown=1.0)
    shop.wait_state(result, "DEFERRED")
    shop.close("payments")
    assert result.get(timeout=60) == 5


@pytest.mark.parametrize("restart", [False, True])
def test_revoked_while_deferred(shop: Shop, *, restart: bool) -> None:
    worker = shop.worker()
    shop.open("payments")
    doomed, spared = shop.charge.delay(1), shop.charge.delay(2)
    shop.wait(lambda: shop.waiting("payments") == 2, "both to wait")
    shop.app.control.revoke(doomed.id)
    shop.wait(lambda: shop.resilience.fleet.ledger.revoked([doomed.id]), "the revoke to be kept")
    if restart:
        worker.stop()
        shop.worker()
    shop.close("payments")
    assert spared.get(timeout=60) == 2
    shop.wait_state(doomed, "REVOKED")
    assert shop.runs("charge") == [spared.id]
