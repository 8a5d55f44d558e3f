"""The Celery project of the tests on other brokers: one queue behind a topic exchange, as the environment says."""

from __future__ import annotations

import json
import os
from typing import Any

import redis
from celery import Celery
from kombu import Exchange, Queue

from resilient_tasks import Resilience

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
payments = resilience.breaker("payments", consecutive_failures=3, open_duration=0.5, open_jitter=0.0, ramp=0.0)


@app.task(bind=True, name="charge", breaker=payments)
def charge(self: Any, order: int) -> list[Any]:
    SIDE.rpush("runs", self.request.id)
    if SIDE.get("health") == "down":
        raise ConnectionError("down")
    info = self.request.delivery_info
    return [order, info["priority"], self.request.headers, self.request.reply_to]


@app.task(name="ping")
def ping() -> str:
    return "pong"
