"""One shop in three forms, for ``benchmarks.comparison``: what ``COMPARED`` says guards the calls of its payments."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import httpx
import pybreaker
import redis
from celery import Celery

from resilient_tasks import Resilience

PLAIN, PYBREAKER, OURS = SYSTEMS = ("autoretry_for", "pybreaker", "resilient_tasks")
RETRIES: dict[str, Any] = {"retry_backoff": True, "max_retries": 5}

system = os.environ.get("COMPARED", PLAIN)
broker = os.environ.get("COMPARED_BROKER", "redis://localhost:6379")
url = os.environ.get("COMPARED_URL", "http://localhost:8001/")

app = Celery("shop", broker=f"{broker}/0", backend=f"{broker}/1")
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, task_time_limit=30)

ask: Callable[[], Any]
options: dict[str, Any]


@lru_cache
def client() -> httpx.Client:
    """One for each process: to make one takes longer than a call."""
    return httpx.Client(timeout=5)


def post() -> None:
    client().post(url).raise_for_status()


if system == OURS:  # the policy of the README
    payments = Resilience(app).breaker(
        "payments", failure_rate_threshold=0.5, minimum_calls=10, window=30, open_duration=10, slow_call_duration=1
    )
    ask, options = post, {"breaker": payments}
elif system == PYBREAKER:  # the values of its own README, but for the shared storage and the time that it is open
    storage = pybreaker.CircuitRedisStorage(pybreaker.STATE_CLOSED, redis.Redis.from_url(f"{broker}/2"))
    breaker = pybreaker.CircuitBreaker(fail_max=5, reset_timeout=10, state_storage=storage)
    ask = lambda: breaker.call(post)  # noqa: E731 - one of three
    options = {"autoretry_for": (httpx.HTTPError, pybreaker.CircuitBreakerError), **RETRIES}
else:
    ask, options = post, {"autoretry_for": (httpx.HTTPError,), **RETRIES}


@app.task(name="charge", **options)
def charge() -> None:
    ask()


@app.task(name="mail")
def mail() -> None:
    time.sleep(0.02)
