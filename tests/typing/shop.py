"""What users write, as type checkers see it."""

from __future__ import annotations

from celery import Celery
from typing_extensions import assert_type

from resilient_tasks import Breaker, BreakerPolicy, Resilience, ResilientTask, cached, constant
from resilient_tasks.typed import shared_task

app = Celery("shop", task_cls=ResilientTask)
resilience = Resilience(app, namespace="shop")
payments: Breaker = resilience.breaker("payments", failure_rate_threshold=0.5, window=30, failures=KeyError)
policy = BreakerPolicy(window=5, ignore=(KeyError,), concurrency="adaptive")


@app.task(breaker=payments)
def charge(order_id: int) -> str:
    return str(order_id)


@app.task(breaker="payments", fallback=[cached(max_age=3600), constant(0)], on_open="fail")
def balance(account_id: int) -> int:
    return account_id


@shared_task(breaker="payments")
def refund(order_id: int) -> float:
    return float(order_id)


@shared_task(bind=True, breaker=payments, on_open="fail")
def bound(self: ResilientTask, order_id: int) -> None: ...


class MyTask(ResilientTask):
    abstract = True


@payments
def fetch(url: str) -> bytes:
    return url.encode()


@payments
async def afetch(url: str) -> bytes:
    return url.encode()


@payments.probe
def ping() -> None: ...


@payments.probe(timeout=5, active=True)
def pong() -> None: ...


def use() -> None:
    charge.apply_async(args=(1,), on_open="fail")
    balance.apply_async((1,), on_open="fallback", countdown=3)
    refund.delay(1)
    refund.apply_async((1,), on_open="fail")
    assert_type(refund(1), float)
    bound.delay(2)
    assert_type(fetch("x"), bytes)
    assert_type(payments.call(len, "abc"), int)
    assert_type(payments.call(fetch, url="x"), bytes)
    with payments.guard():
        pass


async def ause() -> None:
    assert_type(await afetch("x"), bytes)
    assert_type(await payments.call(afetch, "x"), bytes)
    async with payments.guard():
        pass
