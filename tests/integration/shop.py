"""The Celery project that the integration tests run. Its dependencies are up or down by a key in Redis."""

from __future__ import annotations

import json
import os
import time
from typing import Any

import redis
import tenacity
from celery import Celery

from resilient_tasks import Resilience, cached, constant
from resilient_tasks.core.model import State
from resilient_tasks.worker import compensation, maintenance
from tests.integration.trials import visit
from tests.support import long_timeouts  # noqa: F401 - for this process

SIDE: Any = redis.Redis.from_url(os.environ["SHOP_SIDE_URL"], decode_responses=True)  # tests look over its shoulder


class DependencyDownError(ConnectionError):
    """What calling a dependency that is down raises."""


app = Celery("shop", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    broker_transport_options=json.loads(os.environ.get("SHOP_TRANSPORT_OPTIONS", "{}")),
    result_extended=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    beat_schedule={"early": {"task": "shop.ping", "schedule": 3600.0}},
)
resilience = Resilience(app, tick_interval=0.25)
maintenance.DECLARING, maintenance.ABANDONED_AFTER = 0.5, 3.0  # a test cannot wait for ten minutes
compensation.HELD_AT_MOST = float(os.environ.get("SHOP_HELD_AT_MOST", compensation.HELD_AT_MOST))
QUICK: dict[str, Any] = {
    "consecutive_failures": 3,
    "open_duration": 0.5,
    "open_multiplier": 1.0,
    "open_jitter": 0.0,
    "ramp": 0.0,
    "window": 600.0,  # what a test counts is still there when it looks, however slow the machine
}

payments = resilience.breaker("payments", **QUICK)
accounts = resilience.breaker("accounts", **QUICK)
probed = resilience.breaker("probed", **QUICK)
sluggish = resilience.breaker("sluggish", minimum_calls=4, slow_call_duration=1.0, open_duration=60.0)
tolerant = resilience.breaker("tolerant", **{**QUICK, "consecutive_failures": None, "minimum_calls": 1000})
knocked = resilience.breaker("knocked", **QUICK)
narrow = resilience.breaker("narrow", **QUICK, max_deferred=2)
tenants = resilience.breaker("tenants", **QUICK)
hosts = resilience.breaker("hosts", **{**QUICK, "open_duration": 30}, max_open_ratio=0.5, max_keys=2)
hanging = resilience.breaker("hanging", slow_call_duration=1, open_duration=60.0)
limited = resilience.breaker("limited", slow_call_duration=1, minimum_calls=100)
alone = resilience.breaker("alone", **QUICK, max_concurrency_per_worker=1)
blocking = resilience.breaker("blocking", **QUICK, max_deferred=2, overflow="block")


def call(dependency: str) -> str:
    """Call a dependency as a client library would."""
    SIDE.incr(f"calls:{dependency}")
    wait_until_healthy(dependency)
    health = SIDE.get(f"health:{dependency}") or "up"
    if health != "up":
        raise DependencyDownError(f"{dependency} is {health}")
    return "ok"


def wait_until_healthy(dependency: str) -> None:
    """Hang for as long as the dependency does."""
    while SIDE.get(f"health:{dependency}") == "hang":
        time.sleep(0.05)


@app.task(bind=True, breaker=payments)
def charge(self, order: int, *, dependency: str = "payments") -> int:
    SIDE.rpush("runs:charge", self.request.id)
    call(dependency)
    return order


@app.task(bind=True, breaker="payments")
def describe(self, *args, **kwargs) -> dict:
    """Return what a task can see of its own message."""
    call("payments")
    request = self.request
    return {
        "id": request.id,
        "args": request.args,
        "kwargs": request.kwargs,
        "headers": request.headers,
        "priority": request.delivery_info["priority"],
        "queue": request.delivery_info["routing_key"],
        "expires": request.expires,
        "reply_to": request.reply_to,
        "correlation_id": request.correlation_id,
        "parent_id": request.parent_id,
        "root_id": request.root_id,
        "retries": request.retries,
        "group": request.group,
        "stamps": request.stamps,
        "timelimit": request.timelimit,
    }


@app.task(breaker="accounts", fallback=[cached(max_age=3600)], on_open="fail")
def balance(account: int) -> int:
    call("accounts")
    return account * 100


@app.task(breaker="accounts", fallback=constant("n/a"))
def nickname(account: int) -> str:
    call("accounts")
    return f"nick-{account}"


@app.task(breaker="accounts", on_open="fail")
def strict(account: int) -> int:
    call("accounts")
    return account


@app.task(breaker="probed")
def ship(order: int) -> int:
    call("probed")
    return order


@probed.probe
def probe() -> None:
    call("probed")


@app.task(breaker="knocked")
def knock(order: int) -> int:
    visit(SIDE.get("service"), "knocked", caller=os.getpgrp())
    return order


@app.task(bind=True, breaker="tolerant", max_attempts=2)
def poison(self, dependency: str) -> str:
    SIDE.rpush("runs:poison", self.request.id)
    return call(dependency)


@app.task(bind=True, breaker="tolerant", max_attempts=1)
def fragile(self, *args, dependency: str) -> list:
    """A task whose first failure is its last; returns what it sees of its message."""
    call(dependency)
    return [self.request.id, self.request.headers, self.request.delivery_info["priority"], self.request.reply_to]


@app.task(bind=True, breaker="sluggish", time_limit=30)
def dawdle(self) -> None:
    SIDE.rpush("runs:dawdle", time.time())
    wait_until_healthy("sluggish")


@app.task(breaker="hanging")
def ask() -> None:
    wait_until_healthy("hanging")


@app.task(breaker="hanging")
def ask_inside() -> None:
    """The call alone is guarded, not what the task does besides."""
    with hanging.guard():
        wait_until_healthy("hanging")


@app.task(breaker="limited", time_limit=2.5, on_failure="raise")
def ask_quickly() -> None:
    wait_until_healthy("hanging")


@app.task
def ask_unguarded() -> None:
    """A task without a breaker, in which a call is guarded."""
    with hanging.guard():
        wait_until_healthy("hanging")


@app.task(bind=True, breaker="alone")
def one_by_one(self) -> None:
    SIDE.rpush("runs:one_by_one", self.request.id)
    wait_until_healthy("alone")


@app.task(breaker="tolerant")
def linger() -> None:
    wait_until_healthy("lingering")


@app.task(breaker="tolerant")
def antidote() -> str:
    return call("tolerant")


@app.task(breaker="payments", defer_for=1.5)
def urgent() -> str:
    return call("payments")


@app.task(bind=True, breaker=[payments, "accounts"])
def transfer(self, order: int) -> int:
    """A task of two dependencies; it guards the call of the second itself."""
    SIDE.rpush("runs:transfer", self.request.id)
    call("payments")
    accounts.call(call, "accounts")
    return order


@app.task(bind=True, breaker="tenants", breaker_key="tenant")
def bill(self, order: int, tenant: str = "acme") -> int:
    SIDE.rpush("runs:bill", self.request.id)
    call(f"tenants-{tenant}")
    return order


@app.task(breaker="hosts", breaker_key="host", on_failure="raise")
def fetch(host: str) -> str:
    return call(f"hosts-{host}")


@app.task(breaker="narrow")
def squeeze() -> str:
    return call("narrow")


@app.task(bind=True, breaker="blocking")
def haul(self) -> str:
    SIDE.rpush("runs:haul", self.request.id)
    return call("blocking")


@app.task(bind=True, breaker="blocking", acks_late=False)
def haul_early(self) -> str:
    """The same, acknowledged before it runs."""
    SIDE.rpush("runs:haul", self.request.id)
    return call("blocking")


@app.task(
    bind=True,
    breaker="payments",
    autoretry_for=(DependencyDownError,),
    retry_backoff=False,
    default_retry_delay=0,
    max_retries=1,
)
def insistent(self) -> int:
    SIDE.rpush("runs:insistent", self.request.id)
    call("tolerant-elsewhere")
    return self.request.retries


@app.task(bind=True, breaker="payments", max_retries=1, default_retry_delay=0)
def persistent(self, how: str) -> list[Any]:
    """Retry in one of the ways that Celery offers."""
    SIDE.rpush("runs:persistent", self.request.id)
    is_not_ready = False
    try:
        call("payments")
    except DependencyDownError as exc:
        if how == "with the exception":
            raise self.retry(exc=exc) from exc
        if how == "while it is handled":
            self.retry(countdown=0)
        if how == "with other arguments":
            self.retry(args=("with the exception",), exc=exc)
        if how != "for another reason":
            raise
        is_not_ready = True
    if is_not_ready:
        self.retry(exc=ValueError("not yet"))
    return [how, self.request.retries]


@app.task(bind=True, breaker="payments", autoretry_for=(Exception,), retry_backoff=True, max_retries=0)
def doomed(self) -> int:
    SIDE.rpush("runs:doomed", self.request.id)
    call("payments")
    return self.request.retries


@app.task(bind=True, breaker="tolerant", autoretry_for=(Exception,), max_retries=0)
def doomed_inside(self) -> int:
    with payments.guard():
        call("payments")
    return self.request.retries


@app.task(
    breaker="tolerant", retrying=tenacity.Retrying(stop=tenacity.stop_after_attempt(3), wait=tenacity.wait_none())
)
def stubborn(key: str) -> int:
    tries = SIDE.incr(key)
    if tries < 3:
        raise DependencyDownError("not yet")
    return tries


@app.task(breaker="tolerant")
def inner() -> str:
    """A guarded call inside the body, of another dependency than the task's own."""
    with payments.guard():
        return call("payments")


@app.task(breaker="tolerant", time_limit=2, max_attempts=3)
def overrun() -> str:
    SIDE.incr("runs:overrun")
    call("overrun")
    return "in time"


@app.task(bind=True, breaker="tolerant", acks_late=False)
def early(self) -> str:
    """A task that is acknowledged before it runs."""
    SIDE.rpush("runs:early", self.request.id)
    return call("early")


@app.task(breaker="tolerant", on_failure="raise")
def reckless(dependency: str) -> str:
    """A task that leaves its failures to Celery, and returns which process runs it."""
    SIDE.rpush("pids", os.getpid())
    return call(dependency)


@app.task(
    breaker="payments",
    autoretry_for=(DependencyDownError,),
    retry_backoff=False,
    default_retry_delay=0,
    max_retries=9,
)
def poisoned() -> str:
    return call("poison")


@app.task(bind=True, breaker="payments", max_retries=2)
def retried(self) -> int:
    """A task that uses up all the retries that it has."""
    if self.request.retries < self.max_retries:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task
def watch() -> None:
    """Keep a pool process busy until it knows that payments refuses everything, and return when that was."""
    SIDE.rpush("watching", os.getpid())
    while payments.state is not State.FORCED_OPEN:
        time.sleep(0.001)
    SIDE.rpush("obeyed", time.time())


@app.task(ignore_result=True)
def tally() -> None:
    """A task without a breaker that needs no result backend."""
    SIDE.incr("tally")


@app.task
def ping() -> str:
    SIDE.incr("runs:ping")
    return "pong"


@app.task
def hang() -> None:
    """A task without a breaker that occupies its pool slot."""
    SIDE.incr("hanging")
    wait_until_healthy("hang")


@app.task
def collect(values: list) -> list:
    return values


@app.task
def note(*args: object) -> None:
    SIDE.rpush("notes", json.dumps([str(arg) for arg in args]))


app.conf.beat_schedule = {"late": {"task": "shop.ping", "schedule": 3600.0}}
