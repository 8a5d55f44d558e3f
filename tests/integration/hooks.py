"""Tasks, plain and guarded, that note each hook, signal and error callback that is called for them."""

from __future__ import annotations

import os
import time
from typing import Any

import redis
from celery import Celery, signals

from resilient_tasks import Resilience, ResilientTask
from tests.support import long_timeouts  # noqa: F401 - for this process

SIDE: Any = redis.Redis.from_url(os.environ["SHOP_SIDE_URL"], decode_responses=True)

app = Celery("hooks", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(task_acks_late=True, broker_connection_retry_on_startup=True)
resilience = Resilience(app, tick_interval=0.25)
payments = resilience.breaker("payments", consecutive_failures=3)
narrow = resilience.breaker("narrow", consecutive_failures=3, max_deferred=1)


def note(task_id: str, hook: str) -> None:
    SIDE.rpush(f"hooks:{task_id}", hook)


class Noting(ResilientTask):
    """Releases locks as celery-once does in ``after_return`` and celery-singleton in ``on_failure``."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, f"on_failure {args} {kwargs} {bool(einfo.traceback)}")
        SIDE.delete(f"singleton:{task_id}")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, f"after_return {status} {args} {kwargs} {einfo}")
        SIDE.delete(f"once:{task_id}")


class Rude(ResilientTask):
    """Has hooks that raise."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_failure")
        raise KeyError("rude")

    def after_return(self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "after_return")
        raise RuntimeError("rude")


class Sleepy(ResilientTask):
    """Has a hook that hangs."""

    abstract = True

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note(task_id, "on_failure")
        time.sleep(3600)


@signals.task_failure.connect
def failed(task_id: str, args: Any, kwargs: Any, exception: Any, einfo: Any, **_: Any) -> None:
    note(task_id, f"task_failure {args} {kwargs} {bool(einfo.traceback)}")


@signals.task_revoked.connect
def revoked(request: Any, **fields: Any) -> None:
    note(request.id, "task_revoked {terminated} {signum} {expired}".format_map(fields))


@app.task
def errback(request: Any, exc: Any, traceback: Any) -> None:
    note(request.id, "errback")


@app.task
def errback_by_id(task_id: str) -> None:
    note(task_id, "errback by id")


@app.task
def body(values: list[Any]) -> list[Any]:
    return values


@app.task(base=Noting, time_limit=1)
def plain(*args: Any, **kwargs: Any) -> None:
    time.sleep(3600)


@app.task(base=Noting, breaker="payments")
def waits(*args: Any, **kwargs: Any) -> None: ...


@app.task(base=Noting, breaker="payments", defer_for=0.5)
def waits_a_second(*args: Any, **kwargs: Any) -> None: ...


@app.task(base=Noting, breaker="narrow")
def finds_no_room(*args: Any, **kwargs: Any) -> None: ...


@app.task(base=Rude, breaker="payments", defer_for=0.5)
def rude() -> None: ...


@app.task(base=Rude, breaker="narrow")
def rude_without_room() -> None: ...


@app.task(base=Sleepy, breaker="payments", defer_for=0.5)
def sleepy() -> None: ...
