"""A producer that knows the library, on both brokers: what it learns at once, and what becomes of what it defers."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import pytest
from celery import Celery, Task, chain, chord
from kombu import Queue

from resilient_tasks import Breaker, BreakerOpenError, Resilience
from tests.integration.depots import messages_in
from tests.integration.post_office import ABROAD, TIMEOUT, PostOffice


class Website(NamedTuple):
    """A process of the project that sends its tasks, which Celery shares among all apps, and runs none."""

    app: Celery
    payments: Breaker

    def task(self, name: str) -> Task:
        return self.app.tasks[name]


@pytest.fixture
def _shared_tasks_of_one_test() -> None:
    """Leave the tasks of the project shared among its processes."""


@pytest.fixture
def website(post: PostOffice) -> Iterator[Website]:
    app = post.producer()
    resilience = Resilience(
        app, store_url=post.env["RESILIENT_TASKS_STORE_URL"], namespace="post", gate_producers=True
    )  # fmt: skip
    payments = resilience.breaker("payments", post.project.payments.policy)
    app.task(_never, name="balance", breaker=payments, fallback=_estimate, shared=False, typing=False)
    yield Website(app, payments)
    resilience.fleet.close()
    app.close()


def _never(*_: object) -> None:
    raise AssertionError("a website runs no task")


def _estimate(account: int) -> int:
    return account * 100


def test_a_website_learns_at_once_that_a_dependency_is_down(post: PostOffice, website: Website) -> None:
    assert website.payments.accepting
    assert website.task("charge").apply_async((1,), on_open="fail").get(timeout=TIMEOUT) == 1
    website.payments.isolate(reason="test")
    assert not website.payments.accepting
    with pytest.raises(BreakerOpenError):
        website.task("charge").apply_async((2,), on_open="fail")
    assert website.task("balance").apply_async((3,), on_open="fallback").get() == 300
    post.close("payments")
    post.wait(lambda: website.payments.accepting, "the website to see that it is back")
    assert len(post.runs()) == 1


def _workflows(website: Website, expires: datetime) -> list[Any]:
    charge, describe = website.task("charge"), website.task("describe")
    options = {"priority": 3, "headers": {"x-trace": "abc"}, "reply_to": "replies", "expires": expires}
    return [
        charge.delay(1),
        describe.apply_async((1, "two"), {"three": [3]}, queue=ABROAD, **options),
        chain(charge.s(2), website.task("collect").s(), charge.s()).apply_async(),
        chord([charge.s(order) for order in range(3)], website.task("charge_all").s()).apply_async(),
    ]


def test_tasks_of_a_gated_website_wait_at_once_and_are_resumed_like_any_other(
    post: PostOffice, website: Website
) -> None:
    expires = datetime.now(timezone.utc) + timedelta(hours=1)
    straight = [result.get(timeout=TIMEOUT) for result in _workflows(website, expires)]
    post.side.delete("runs:charge")

    website.payments.isolate(reason="test")
    charged, described, chained, total = results = _workflows(website, expires)
    at_once = [charged, described, chained.parent.parent, *total.parent.results]
    assert {result.state for result in at_once} == {"DEFERRED"}, "no worker had to do anything"
    assert charged.info["breaker"] == "payments"
    post.wait(lambda: post.waiting("payments") == len(at_once), "all to be in the index")
    post.close("payments")
    deferred = [result.get(timeout=TIMEOUT) for result in results]
    assert [deferred[0], *deferred[2:]] == [straight[0], *straight[2:]]
    mine = {"id", "root_id", "correlation_id", "origin", "properties"}
    seen, expected = (
        {name: value for name, value in one.items() if name not in mine} for one in (deferred[1], straight[1])
    )
    assert seen == expected
    assert len(post.runs()) == len(set(post.runs())) == 6


def test_what_expires_while_it_waits_never_runs(post: PostOffice, website: Website) -> None:
    website.payments.isolate(reason="test")
    result = website.task("charge").apply_async((1,), expires=0.5)
    lasting = website.task("charge").delay(2)
    post.wait_state("REVOKED", [result])
    post.close("payments")
    assert lasting.get(timeout=TIMEOUT) == 2
    assert post.runs() == [lasting.id]


def test_of_several_tasks_with_one_key_only_the_latest_runs(post: PostOffice, website: Website) -> None:
    website.payments.isolate(reason="test")
    stale = [website.task("sync").delay("acme", 1), post.task("sync", "acme", 2).apply_async()]
    post.wait_state("DEFERRED", stale)
    other = website.task("sync").delay("zeta", 1)
    follower = website.task("sync").apply_async(("acme", 3), link=post.task("note", "synced"))
    revoked = website.task("sync").delay("zeta", 2)
    latest = website.task("sync").delay("acme", version=4)
    revoked.revoke()
    post.wait_state("REVOKED", [revoked])
    post.close("payments")
    assert [result.get(timeout=TIMEOUT) for result in (other, follower, latest)] == [1, 3, 4]
    post.wait_state("IGNORED", stale)
    assert [result.info for result in stale] == [{"breaker": "payments", "ran": latest.id}] * 2
    assert sorted(post.runs("sync")) == sorted([other.id, follower.id, latest.id])
    post.wait(lambda: post.waiting("payments") == 0, "the index to be empty")


def test_resumed_tasks_keep_their_order_in_each_queue_and_priority(post: PostOffice, website: Website) -> None:
    exchange, arguments = post.project.EXCHANGE, {"x-max-priority": 10}
    left, right = (
        Queue(name, exchange, routing_key=f"{name}.#", queue_arguments=arguments) for name in ("left", "right")
    )
    website.payments.isolate(reason="test")
    superseded = [website.task("sync").apply_async(("acme", version), queue=left) for version in range(12)][:-1]
    for order in range(24):  # into queues that no worker empties
        website.task("charge").apply_async((order,), queue=(left, right)[order % 2], priority=3 * (order % 3 == 0))
    post.wait(lambda: post.waiting("payments") == 36, "all to be in the index")
    post.wait(lambda: messages_in(post.client, "post.deferred.payments") == [36], "all to lie on the broker")
    assert [post.operator.deferred.resume("payments", limit=9, force=True) for _ in range(3)] == [9, 9, 7]
    post.wait_state("IGNORED", superseded)
    for remainder, queue in enumerate((left, right)):
        arrived = _take_all(post, queue.name)
        assert sorted(arrived) == list(range(remainder, 24, 2))
        for urgent in (True, False):
            in_line = [order for order in arrived if (order % 3 == 0) is urgent]
            assert in_line == sorted(in_line)


def _take_all(post: PostOffice, queue: str) -> list[int]:
    with post.client.connection_for_read() as connection:
        channel = connection.default_channel
        raw = iter(lambda: channel.basic_get(queue, no_ack=True), None)
        orders = [channel.message_to_python(message).payload[0][0] for message in raw]
    return [order for order in orders if isinstance(order, int)]
