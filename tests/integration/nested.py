"""Tasks whose bodies call guarded code: nested, in threads, and with refusals wrapped in other exceptions."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import redis
import tenacity
from celery import Celery

from resilient_tasks import BreakerOpenError, Resilience, constant
from tests.support import long_timeouts  # noqa: F401 - for this process

app = Celery("nested", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True)
resilience = Resilience(app)
side = redis.Redis.from_url(os.environ["SHOP_SIDE_URL"], decode_responses=True)

orders = resilience.breaker("orders")
payments = resilience.breaker("payments", open_duration=1, trial_calls=1, ramp=0.1)
narrow = resilience.breaker("narrow", max_concurrency=2)
mail = resilience.breaker("mail")


@payments
def token() -> str:
    return "token"


@payments
def charge() -> str:
    return token()


def call_narrow() -> str:
    with narrow.guard():
        time.sleep(0.05)
    return "done"


def send() -> str:
    with mail.guard():
        return "sent"


def in_threads(fn: Callable[[], str]) -> str:
    with ThreadPoolExecutor(2) as pool:
        return {future.result() for future in [pool.submit(fn), pool.submit(fn)]}.pop()


@app.task(breaker=orders)
def order() -> str:
    return charge()


@app.task(breaker=payments)
def charge_in_threads() -> str:
    return in_threads(charge)


@app.task(breaker=narrow)
def narrow_in_threads() -> str:
    side.incr("runs of narrow_in_threads")
    return in_threads(call_narrow)


@app.task(breaker=orders)
def send_in_group() -> str:
    async def one() -> str:
        return send()

    async def main() -> str:
        (result,) = await asyncio.gather(one())
        return result

    try:
        return asyncio.run(main())
    except BreakerOpenError as refusal:
        if sys.version_info >= (3, 11):
            raise ExceptionGroup("some parts have failed", [ValueError("another"), refusal]) from None  # noqa: F821
        raise


@app.task(breaker=orders)
def send_again_and_again() -> str:
    return tenacity.retry(stop=tenacity.stop_after_attempt(2))(send)()


@app.task(breaker=orders)
def send_with_an_error_of_its_own() -> str:
    try:
        return send()
    except BreakerOpenError as refusal:
        raise RuntimeError("the order was not sent") from refusal


@app.task(breaker=orders, fallback=constant("later"))
def send_or_later() -> str:
    try:
        return send()
    except BreakerOpenError:
        raise RuntimeError("the order was not sent")  # noqa: B904 - wrapped as its context


@app.task(breaker=payments)
def refused_inside() -> None:
    side.incr("runs of refused_inside")
    raise BreakerOpenError("payments", "AT_CAPACITY", 0.0)
