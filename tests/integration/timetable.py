"""A Celery project whose beat keeps its schedule in a database, as ``TIMETABLE_SCHEDULER`` says."""

from __future__ import annotations

import os

import django
from celery import Celery
from django.conf import settings

from resilient_tasks import Resilience
from tests.support import long_timeouts  # noqa: F401 - for this process

settings.configure(
    USE_TZ=True,
    INSTALLED_APPS=["django_celery_beat"],
    DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["TIMETABLE_DATABASE"]}},
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
django.setup()

app = Celery("timetable", broker=os.environ["TIMETABLE_URL"])
app.conf.update(
    beat_schedule={"own": {"task": "own", "schedule": 3600.0}},
    beat_scheduler=os.environ["TIMETABLE_SCHEDULER"],
    broker_connection_retry_on_startup=True,
    redbeat_redis_url=os.environ["TIMETABLE_URL"],
)
resilience = Resilience(app, tick_interval=0.5)
payments = resilience.breaker("payments", open_duration=0.5, open_jitter=0.0, trial_successes=1, ramp=0.0)
payments.probe(lambda: None)
