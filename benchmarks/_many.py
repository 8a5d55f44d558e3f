"""A Celery project with a thousand breakers and no tasks, for pages and scrapes that show all of them."""

from __future__ import annotations

import os

from celery import Celery

from resilient_tasks import Resilience

COUNT = 1_000

app = Celery("many", broker=os.environ["BENCH_BROKER"])
resilience = Resilience(app)
for number in range(COUNT):
    resilience.breaker(f"dependency-{number:04}")
