"""Service A of the textbook: a Celery project that calls service B, and has other things to do."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import Any

from celery import Celery

from resilient_tasks import Resilience, cached
from resilient_tasks.checks import http_check
from tests.support import long_timeouts  # noqa: F401 - for this process

B = os.environ["TEXTBOOK_B_URL"]
OTHER_SOURCE = {"1": "1 from the other source"}

app = Celery("textbook", broker=os.environ["TEXTBOOK_BROKER_URL"], backend=os.environ["TEXTBOOK_BACKEND_URL"])
app.conf.update(broker_connection_retry_on_startup=True, worker_prefetch_multiplier=1)
resilience = Resilience(app, tick_interval=0.25)
b = resilience.breaker("b", consecutive_failures=3, open_duration=0.5, open_multiplier=1.0, ramp=0.0)
b.probe(http_check(f"{B}/health"), timeout=0.5)


def other_source(item: str) -> str:
    """Know some of what B knows."""
    return OTHER_SOURCE[item]


@app.task(breaker=b, fallback=[other_source, cached(max_age=3600)], on_open="fail")
def look_up(item: str) -> Any:
    """Ask service B."""
    with urllib.request.urlopen(f"{B}/items/{item}", timeout=3) as response:
        return json.load(response)["answer"]


@app.task
def other_api(number: int) -> int:
    """Do something that does not need B."""
    return number
