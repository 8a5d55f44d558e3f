"""A task that is revoked, or expires, while it is deferred never runs."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from celery import chord
from celery.utils import uuid

from tests.integration.post_office import PostOffice


def _know(post: PostOffice, *names: str) -> None:
    ledger = post.operator.fleet.ledger
    post.wait(lambda: len(ledger.revoked(names)) == len(names), "the ledger to know")


@pytest.mark.parametrize("terminate", [False, True])
def test_revoked_by_id_while_deferred(post: PostOffice, *, terminate: bool) -> None:
    post.open("payments")
    doomed, spared = post.task("charge", 1).apply_async(), post.task("charge", 2).apply_async()
    post.wait_state("DEFERRED", [doomed, spared])
    post.client.control.revoke(doomed.id, terminate=terminate)
    post.wait_state("REVOKED", [doomed])  # before anything is resumed
    assert post.through_an_outage(spared) == [2]
    assert post.runs() == [spared.id]


@pytest.mark.parametrize("terminate", [False, True])
def test_revoked_by_stamp_while_deferred(post: PostOffice, *, terminate: bool) -> None:
    post.open("payments")
    stamp = uuid()
    doomed = post.task("charge", 1).apply_async(stamped_headers=["tenant"], tenant=["others", stamp])
    spared = post.task("charge", 2).apply_async(stamped_headers=["tenant"], tenant="spared")
    post.wait_state("DEFERRED", [doomed, spared])
    post.client.control.revoke_by_stamped_headers({"tenant": [stamp]}, terminate=terminate)
    _know(post, json.dumps(["tenant", stamp]))
    assert post.through_an_outage(spared) == [2]
    post.wait_state("REVOKED", [doomed])
    assert post.runs() == [spared.id]


def test_a_revoke_outlives_every_worker_that_received_it(post: PostOffice) -> None:
    post.open("payments")
    by_id, stamp = post.task("charge", 1).apply_async(), uuid()
    by_stamp = post.task("charge", 2).apply_async(stamped_headers=["tenant"], tenant=stamp)
    post.wait_state("DEFERRED", [by_id, by_stamp])
    post.client.control.revoke(by_id.id)
    post.client.control.revoke_by_stamped_headers({"tenant": stamp})
    _know(post, by_id.id, json.dumps(["tenant", stamp]))
    post.restart()
    post.close("payments")
    post.wait_state("REVOKED", [by_id, by_stamp])
    assert post.runs() == []


def test_a_chord_fails_with_its_revoked_member(post: PostOffice) -> None:
    post.open("payments")
    total = chord([post.task("charge", order) for order in range(2)], post.task("collect")).apply_async()
    post.wait_state("DEFERRED", total.parent.results)
    post.client.control.revoke(total.parent.results[0].id)
    post.wait_state("REVOKED", total.parent.results[:1])
    post.close("payments")
    post.wait_state("FAILURE", [total])
    assert post.runs() == [total.parent.results[1].id]


def test_expired_while_deferred(post: PostOffice) -> None:
    post.open("payments")
    soon = datetime.now(timezone.utc) + timedelta(seconds=15)  # it is refused before
    doomed, spared = post.task("charge", 1).apply_async(expires=soon), post.task("charge", 2).apply_async(expires=600)
    post.wait_state("DEFERRED", [spared])
    post.wait_state("REVOKED", [doomed])  # before anything is resumed
    assert datetime.now(timezone.utc) >= soon
    assert post.through_an_outage(spared) == [2]
    assert post.runs() == [spared.id]
    assert post.operator.dead_letters.show(doomed.id).reason == "expired"
