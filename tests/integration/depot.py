"""The Celery project of the tests on other brokers: one queue behind a topic exchange, as the environment says."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import redis
from celery import Celery
from kombu import Exchange, Queue

from resilient_tasks import Resilience
from tests.integration import cloud  # noqa: F401 - its brokers are found by their schemes
from tests.support import long_timeouts  # noqa: F401 - for this process

SIDE = redis.Redis.from_url(os.environ["DEPOT_SIDE_URL"], decode_responses=True)
QUEUE = os.environ["DEPOT_QUEUE"]

app = Celery("depot", broker=os.environ["DEPOT_BROKER_URL"], backend=os.environ["DEPOT_BACKEND_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_default_queue=QUEUE,
    task_default_exchange=f"to-{QUEUE}",
    task_default_exchange_type="topic",
    task_default_routing_key="work.here",
    task_queues=[
        Queue(
            QUEUE,
            Exchange(f"to-{QUEUE}", "topic"),
            routing_key="work.#",
            queue_arguments=json.loads(os.environ["DEPOT_QUEUE_ARGUMENTS"]),
        )
    ],
    worker_prefetch_multiplier=1,
    **json.loads(os.environ["DEPOT_CONF"]),
)
resilience = Resilience(app, tick_interval=0.25)
scarce = resilience.breaker("scarce", max_concurrency=2)
shared_out = resilience.breaker("shared_out", max_concurrency_per_worker=1)
payments = resilience.breaker("payments", consecutive_failures=3, open_duration=0.5, open_jitter=0.0, ramp=0.0)


@app.task(bind=True, name="charge", breaker=payments)
def charge(self: Any, order: int) -> list[Any]:
    SIDE.rpush("runs", self.request.id)
    if SIDE.get("health") == "down":
        raise ConnectionError("down")
    info = self.request.delivery_info
    return [order, info["priority"], self.request.headers, self.request.reply_to]


@app.task(bind=True, name="occupy", breaker=scarce)
def occupy(self: Any, order: int) -> int:
    """Be in flight for a while, and return who was in flight then: runs by their worker's process group."""
    return _occupy("scarce", f"{os.getpgrp()}:{self.request.id}", order)


@app.task(bind=True, name="serve", breaker=shared_out)
def serve(self: Any, order: int) -> int:
    return _occupy(f"shared_out by {os.getpgrp()}", self.request.id, order)


def _occupy(what: str, run: str, order: int) -> int:
    SIDE.rpush(f"begun:{what}", order)
    SIDE.sadd(f"in flight:{what}", run)
    SIDE.lpush(f"seen in flight:{what}", SIDE.scard(f"in flight:{what}"))
    while SIDE.exists("hold"):
        time.sleep(0.01)
    time.sleep(0.1)
    SIDE.srem(f"in flight:{what}", run)
    return order


@app.task(name="ping")
def ping() -> str:
    return "pong"
