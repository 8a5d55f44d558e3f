"""Forged messages by the hundred: the worker keeps serving, and healthy tasks in between all finish.

``FUZZ_MESSAGES=10000 pytest tests/integration/test_fuzz.py`` sends that many, new ones each time; by default it
sends the same few hundred each time.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from kombu import Producer

from tests.integration.conftest import TIMEOUT, Shop
from tests.integration.forgeries import damaged_messages, garbage, published_messages, raw_messages

BATCH = 10
BY_DEFAULT = 300
MESSAGES = int(os.environ.get("FUZZ_MESSAGES", "0"))

batches = st.lists(raw_messages() | published_messages() | damaged_messages() | garbage, min_size=BATCH, max_size=BATCH)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_forged_messages_disturb_no_other_task(shop: Shop, pool: str) -> None:
    shop.beat()
    worker = shop.worker(pool=pool)
    sent = 0

    @settings(
        max_examples=(MESSAGES or BY_DEFAULT) // BATCH // 2,
        derandomize=not MESSAGES,
        phases=[Phase.generate],  # each example needs a living worker: nothing to shrink with once it has died
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(batches, st.booleans())
    def send(batch: list[Any], is_open: bool) -> None:  # noqa: FBT001 - drawn
        nonlocal sent
        if is_open:
            shop.open("payments")
        for message in batch:
            _send(shop, message)
        sent += len(batch)
        charged, pong = shop.charge.delay(7), shop.ping.delay()
        assert pong.get(timeout=TIMEOUT) == "pong", "a healthy task of no breaker"
        shop.close("payments")
        assert charged.get(timeout=TIMEOUT) == 7, "a healthy task, deferred if the breaker was open"
        assert worker.running

    send()
    print(f"{sent} forged messages")
    assert sent >= (MESSAGES or BY_DEFAULT) // 2 - BATCH
    assert worker.running


def _send(shop: Shop, message: str | dict[str, Any]) -> None:
    if isinstance(message, str):
        shop.broker.lpush("celery", message)
        return
    with shop.app.connection_for_write() as connection:
        Producer(connection).publish(message.pop("body"), routing_key="celery", **message)
