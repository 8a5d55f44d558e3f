"""Whatever end a task comes to while it waits, what fires is what Celery fires for a plain task that ends so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.utils import uuid

from tests.integration.conftest import Shop
from tests.integration.test_dead_letters import Events
from tests.integration.test_faults import copies
from workers.processes import Server

CALL: dict[str, Any] = {"args": [1], "kwargs": {"two": 2}}
FAILURE = {
    "on_failure [1] {'two': 2} True", "after_return FAILURE [1] {'two': 2} None", "task_failure [1] {'two': 2} True",
    "errback", "errback by id",
}  # fmt: skip


@pytest.fixture
def shop(_shop: Shop, tmp_path: Path) -> Iterator[Shop]:
    hooked = Shop(_shop.server, tmp_path, "tests.integration.hooks")
    hooked.clear()
    yield hooked
    hooked.stop()


@pytest.fixture
def events(shop: Shop) -> Iterator[Events]:
    events = Events(shop)
    yield events
    events.close()


def hooks(shop: Shop, result: Any) -> list[str]:
    """Return what was called for a task, in order."""
    return list(shop.side.lrange(f"hooks:{result.id}", 0, -1))


def send(shop: Shop, task: Any, **options: Any) -> Any:
    """Send a task that holds two locks, with error callbacks of both kinds."""
    task_id = uuid()
    shop.side.mset({f"once:{task_id}": 1, f"singleton:{task_id}": 1})
    errbacks = [shop.errback.s(), shop.errback_by_id.s()]
    return task.apply_async(**CALL, task_id=task_id, link_error=errbacks, **options)


def event_types(events: Events, result: Any) -> list[str]:
    return [event["type"] for event in events.of(result.id)]


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_failure_fires_what_a_hard_time_limit_does(shop: Shop, events: Events, pool: str) -> None:
    shop.worker(pool=pool)
    shop.open("payments")
    shop.open("narrow")
    first = shop.finds_no_room.delay()
    shop.wait(lambda: shop.waiting("narrow") == 1, "the queue to be full")
    ends = [send(shop, shop.waits_a_second), send(shop, shop.finds_no_room)]
    if pool == "prefork":  # no other pool ends what runs for too long
        plainly = send(shop, shop.plain)
        shop.wait(lambda: set(hooks(shop, plainly)) == FAILURE, "the hooks of a plain task")
    for result in ends:
        shop.wait_state(result, "FAILURE")
        shop.wait(lambda: set(hooks(shop, result)) == FAILURE, f"the hooks: {hooks(shop, result)}")  # noqa: B023
        order = [hook.split()[0] for hook in hooks(shop, result) if not hook.startswith("errback by")]
        assert order == ["errback", "on_failure", "after_return", "task_failure"]
        assert not shop.side.exists(f"once:{result.id}", f"singleton:{result.id}"), "its locks"
        assert events.wait_for("task-failed", result.id)["exception"]
        assert event_types(events, result).count("task-failed") == 1
    shop.wait_state(first, "DEFERRED")


@pytest.mark.parametrize("task", ["waits_a_second", "finds_no_room"])
def test_a_chord_fails_with_its_part(shop: Shop, task: str) -> None:
    shop.worker(pool="threads")
    shop.open("payments")
    shop.open("narrow")
    if task == "finds_no_room":
        shop.finds_no_room.delay()
        shop.wait(lambda: shop.waiting("narrow") == 1, "the queue to be full")
    result = chord([getattr(shop, task).s(), shop.errback_by_id.si("other")])(shop.body.s())
    shop.wait_state(result, "FAILURE")


def test_revoked_and_dropped_and_expired_fire_what_a_plain_task_does(shop: Shop, events: Events) -> None:
    shop.open("payments")
    worker = shop.worker(pool="threads")
    revoked, dropped, expired = (send(shop, shop.waits, expires=expires) for expires in (None, None, 15))
    shop.wait(lambda: shop.waiting("payments") == 3, "all to wait")
    shop.app.control.revoke(revoked.id)
    plainly = shop.plain.apply_async(**CALL, countdown=1, expires=0.5)
    assert shop.resilience.deferred.drop("payments", [dropped.id]) == (dropped.id,)
    for result in (revoked, dropped, expired, plainly):
        shop.wait_state(result, "REVOKED")
        has_expired = result in (expired, plainly)
        shop.wait(lambda: hooks(shop, result) == [f"task_revoked False None {has_expired}"], "the signal")  # noqa: B023
        assert events.wait_for("task-revoked", result.id)["expired"] is has_expired
        assert event_types(events, result).count("task-revoked") == 1
    assert worker.running


def test_hooks_that_raise_do_no_harm(shop: Shop) -> None:
    worker = shop.worker(pool="threads")
    shop.open("payments")
    shop.open("narrow")
    shop.finds_no_room.delay()
    shop.wait(lambda: shop.waiting("narrow") == 1, "the queue to be full")
    for task in (shop.rude, shop.rude_without_room):
        result = task.delay()
        shop.wait_state(result, "FAILURE")
        called = ["on_failure", "after_return", "task_failure [] {} True"]
        shop.wait(lambda: hooks(shop, result) == called, f"all hooks: {hooks(shop, result)}")  # noqa: B023
    shop.wait(lambda: shop.broker.llen("resilient.dead.payments") == 1, "the dead letter")
    shop.wait(lambda: "\nKeyError: 'rude'" in worker.output() and "\nRuntimeError: rude" in worker.output(), "the log")
    fine = send(shop, shop.waits_a_second)
    shop.wait(lambda: set(hooks(shop, fine)) == FAILURE, "the hooks of another task")
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "all to be out of hand")
    assert worker.running


def test_a_hook_that_hangs_holds_up_no_other_task(shop: Shop) -> None:
    worker = shop.worker(pool="threads")
    shop.open("payments")
    hangs = [shop.sleepy.delay() for _ in range(3)]
    fine = shop.waits.delay()
    for result in hangs:
        shop.wait_state(result, "FAILURE")
    shop.close("payments")
    shop.wait_done(fine)
    shop.wait(lambda: shop.broker.llen("resilient.dead.payments") == 3, "the dead letters")
    assert worker.running


def test_a_result_backend_that_is_away_lets_the_refused_task_wait(shop: Shop) -> None:
    backend: Server = shop.server_of_its_own()
    worker = shop.worker(pool="threads", env={"SHOP_BACKEND_URL": backend.url(1)})
    shop.open("narrow")
    shop.finds_no_room.delay()
    shop.wait(lambda: shop.waiting("narrow") == 1, "the queue to be full")
    backend.program.kill()
    result = send(shop, shop.finds_no_room)
    shop.wait(lambda: "cannot be deferred yet: ResultNotWrittenError" in worker.output(), "its end to fail")
    assert copies(shop.broker)[result.id] == 1, "nothing is lost"
    shop.start_again(backend)
    shop.wait(lambda: set(hooks(shop, result)) == FAILURE, "its hooks")
    shop.wait(lambda: shop.broker.hlen("unacked") == 0, "it to be out of hand")
