"""A task that is revoked while it is deferred never runs."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import chord
from celery.utils import uuid

from tests.integration.post_office import PATIENCE, PostOffice


def _revoke(post: PostOffice, *, terminate: bool) -> list[Any]:
    """Revoke a deferred task by its id and another by its stamp, and return their results."""
    control = post.client.control
    by_id, stamp = post.task("charge", 1).apply_async(), uuid()
    by_stamp = post.task("charge", 2).apply_async(stamped_headers=["tenant"], tenant=["others", stamp])
    post.wait_state("DEFERRED", [by_id, by_stamp])
    control.revoke(by_id.id, terminate=terminate)
    control.revoke_by_stamped_headers({"tenant": [stamp]}, terminate=terminate)
    ledger, names = post.operator.fleet.ledger, [by_id.id, json.dumps(["tenant", stamp])]
    post.wait(lambda: len(ledger.revoked(names)) == 2, "the ledger to know")
    return [by_id, by_stamp]


@pytest.mark.parametrize("restart", [False, True])
def test_revoked_while_deferred(post: PostOffice, *, restart: bool) -> None:
    post.open("payments")
    spared = post.task("charge", 0).apply_async(stamped_headers=["tenant"], tenant="spared")
    revoked = [*_revoke(post, terminate=False), *_revoke(post, terminate=True)]
    if restart:
        post.restart()
    post.close("payments")
    post.wait_state("REVOKED", revoked)
    assert spared.get(timeout=PATIENCE) == 0
    assert post.runs() == [spared.id]


def test_a_chord_fails_with_its_revoked_member(post: PostOffice) -> None:
    post.open("payments")
    total = chord([post.task("charge", order) for order in range(2)], post.task("collect")).apply_async()
    post.wait_state("DEFERRED", total.parent.results)
    post.client.control.revoke(total.parent.results[0].id)
    post.wait(lambda: post.operator.fleet.ledger.revoked([total.parent.results[0].id]), "the ledger to know")
    post.close("payments")
    post.wait_state("FAILURE", [total])
    assert post.runs() == [total.parent.results[1].id]
