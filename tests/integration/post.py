"""The Celery project of the fidelity tests: tasks that return what they see of the messages that brought them."""

from __future__ import annotations

import json
import os
import signal
import time
from typing import Any

import redis
from celery import Celery
from celery.app.backends import by_url
from celery.utils.serialization import jsonify
from kombu import Exchange, Queue

from resilient_tasks import Resilience
from tests.support import long_timeouts  # noqa: F401 - for this process

SIDE: Any = redis.Redis.from_url(os.environ["POST_SIDE_URL"], decode_responses=True)
QUEUE, ABROAD = "post", "abroad"
EXCHANGE = Exchange("to-post", "topic")
SETTINGS: dict[str, Any] = {
    "broker_connection_retry_on_startup": True,
    "broker_transport_options": json.loads(os.environ.get("POST_TRANSPORT_OPTIONS", "{}")),
    "result_extended": True,
    "task_default_queue": QUEUE,
    "task_default_exchange": EXCHANGE.name,
    "task_default_exchange_type": EXCHANGE.type,
    "task_default_routing_key": "post.inland",
    "task_queues": [
        Queue(queue, EXCHANGE, routing_key=f"{queue}.#", queue_arguments={"x-max-priority": 10})
        for queue in (QUEUE, ABROAD)
    ],
}

app = Celery("post", broker=os.environ["POST_BROKER_URL"], backend=os.environ["POST_BACKEND_URL"])
app.conf.update(SETTINGS, task_acks_late=True, worker_prefetch_multiplier=1)
resilience = Resilience(app, tick_interval=0.1)
payments = resilience.breaker(
    "payments", consecutive_failures=3, open_duration=0.5, open_jitter=0.0, ramp=0.0, trial_calls=10
)
carrier = resilience.breaker("carrier", minimum_calls=1000, open_duration=0.2, ramp=0.0, trial_calls=10)


def run(task: Any) -> None:
    """Note a run, and fail as the dependency does."""
    SIDE.rpush(f"runs:{task.name}", task.request.id)
    if SIDE.get("health") == "down":
        raise ConnectionError("the dependency is down")


@app.task(bind=True, name="describe", breaker=payments)
def describe(self, *args: object, **kwargs: object) -> dict:
    """Return all that a task can see of its own message."""
    run(self)
    return jsonify({name: value for name, value in vars(self.request).items() if not name.startswith("_")})


@app.task(bind=True, name="charge", breaker=payments)
def charge(self, order: int) -> int:
    run(self)
    return order


@app.task(bind=True, name="charge_early", breaker=payments, acks_late=False)
def charge_early(self, order: int) -> int:
    run(self)
    return order


@app.task(bind=True, name="charge_all", breaker=payments)
def charge_all(self, orders: list[int]) -> int:
    run(self)
    return sum(orders)


@app.task(bind=True, name="charge_soon", breaker=payments, defer_for=0.5)
def charge_soon(self, order: int) -> int:
    run(self)
    return order


@app.task(bind=True, name="ship", breaker=carrier)
def ship(self, order: int) -> int:
    """Need another dependency."""
    run(self)
    return order


@app.task(bind=True, name="describe_once", breaker=carrier, max_attempts=1)
def describe_once(self, *args: object, **kwargs: object) -> dict:
    """Fail for good at the first failure that counts; else return what ``describe`` does."""
    if SIDE.get("health:describe_once") == "down":
        raise ConnectionError("broken")
    return jsonify({name: value for name, value in vars(self.request).items() if not name.startswith("_")})


@app.task(bind=True, name="sync", breaker=payments, coalesce="latest", coalesce_key="account")
def sync(self, account: str, version: int) -> int:
    run(self)
    return version


@app.task(bind=True, name="reject", breaker=payments)
def reject(self, order: int) -> None:
    """Fail for a reason that no breaker minds."""
    run(self)
    raise ValueError(f"there is no order {order}")


@app.task(bind=True, name="delegate")
def delegate(self, order: int) -> None:
    """Be replaced by a guarded task."""
    raise self.replace(charge.s(order))


@app.task(bind=True, name="charge_and_delegate", breaker=payments)
def charge_and_delegate(self, order: int) -> None:
    """Be replaced by another guarded task, once the dependency admits this one."""
    run(self)
    raise self.replace(charge.s(order))


@app.task(bind=True, name="retried", breaker=payments, max_retries=2)
def retried(self) -> list[int]:
    """Use up all the retries that there are."""
    run(self)
    if self.request.retries < self.max_retries:
        raise self.retry(countdown=0)
    return [self.request.retries, self.max_retries]


@app.task(bind=True, name="paced", breaker=payments, rate_limit="2/s")
def paced(self) -> float:
    run(self)
    return time.time()


@app.task(bind=True, name="forgotten", breaker=payments, ignore_result=True)
def forgotten(self, order: int) -> str:
    run(self)
    return "never read"


@app.task(bind=True, name="errors_only", breaker=payments, ignore_result=True, store_errors_even_if_ignored=True)
def errors_only(self, order: int) -> str:
    run(self)
    return "never read"


@app.task(bind=True, name="fragile", breaker=carrier, reject_on_worker_lost=True)
def fragile(self) -> bool:
    """Take the pool process along in the first run."""
    run(self)
    if SIDE.llen("runs:fragile") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return bool(self.request.delivery_info["redelivered"])


@app.task(bind=True, name="slow", breaker=carrier, on_failure="raise")
def slow(self) -> None:
    run(self)
    time.sleep(60)


@app.task(name="collect")
def collect(values: object) -> object:
    return values


@app.task(name="note")
def note(*args: object) -> None:
    SIDE.rpush("notes", json.dumps([str(arg) for arg in args]))


def _on_backend(url: str) -> Any:
    backend, address = by_url(url, app.loader)
    return backend(app=app, url=address)


def _charge_on(backend: str, url: str) -> None:
    @app.task(bind=True, name=f"charge_on_{backend}", breaker=payments, backend=_on_backend(url))
    def charge_on_backend(self: Any, order: int) -> int:
        run(self)
        return order


for _backend, _url in json.loads(os.environ.get("POST_BACKENDS", "{}")).items():
    _charge_on(_backend, _url)
