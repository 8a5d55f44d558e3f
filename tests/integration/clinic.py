"""The Celery project of the health-check tests: a breaker per kind of probe, all of them checked all the time."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import redis
from celery import Celery

from resilient_tasks import Resilience
from resilient_tasks.checks import (
    all_of,
    any_of,
    command_check,
    consul_check,
    grpc_check,
    heartbeat,
    http_check,
    tcp_check,
)
from tests.support import long_timeouts  # noqa: F401 - for this process

SIDE: Any = redis.Redis.from_url(os.environ["SHOP_SIDE_URL"], decode_responses=True)
SERVICE = os.environ["CLINIC_SERVICE"]  # host:port of an HTTP server whose health the test decides
INTERVAL = 0.5  # seconds

app = Celery("clinic", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True)
resilience = Resilience(app, tick_interval=0.25)
QUICK: dict[str, Any] = {"open_duration": 0.5, "open_multiplier": 1.0, "open_jitter": 0.0, "ramp": 0.0}


def ask(dependency: str) -> None:
    """Check one dependency, as the test has arranged it."""
    SIDE.rpush(f"asked:{dependency}", time.time())
    while SIDE.get(f"health:{dependency}") == "hang":
        time.sleep(0.05)
    if SIDE.get(f"health:{dependency}") == "down":
        raise ConnectionError(f"{dependency} is down")


web = resilience.breaker("web", **QUICK)
host, port = SERVICE.split(":")
is_open, answers = tcp_check(host, int(port)), http_check(f"http://{SERVICE}/health")
web.probe(all_of(is_open, any_of(answers, answers)), interval=2 * INTERVAL, active=True, failures_before_open=2)

thorough = resilience.breaker("thorough", **QUICK)
thorough.probe(
    all_of(
        http_check(f"http://{SERVICE}/ward", expect={204}, method="HEAD", headers={"X-Ward": "7"}),
        grpc_check(os.environ["CLINIC_GRPC"], "clinic.Ward"),
        consul_check("ward", address=f"http://{SERVICE}", token="t0ken"),
        command_check(["test", "-e", os.environ["CLINIC_FILE"]]),
    ),
    successes_before_close=1,  # without an interval, for it starts two programs, which takes a second at times
)

convalescent = resilience.breaker("convalescent", **QUICK)
convalescent.probe(partial(ask, "convalescent"), interval=INTERVAL, successes_before_close=6)

remote = resilience.breaker("remote", **QUICK)
remote.probe(heartbeat(ttl=3), interval=INTERVAL, active=True, failures_before_open=1)

comatose = resilience.breaker("comatose", **QUICK)
comatose.probe(partial(ask, "comatose"), interval=INTERVAL, timeout=0.4, active=True)

lively = resilience.breaker("lively", **QUICK)
lively.probe(partial(ask, "lively"), interval=INTERVAL, active=True, failures_before_open=2)


@app.task(breaker=web)
def treat(number: int) -> int:
    SIDE.incr("treated")
    return number
