"""The Celery application: where the broker is, which dependencies there are, when their breakers open."""

from __future__ import annotations

import os

from celery import Celery

from resilient_tasks import Resilience

# Every environment variable that this project reads, and its default.
ENVIRONMENT = {
    "CELERY_BROKER_URL": "redis://localhost:6379/0",
    "CELERY_RESULT_BACKEND": "redis://localhost:6379/1",
    "PAYMENTS_URL": "http://localhost:8001/payments",
    "ACCOUNTS_URL": "http://localhost:8002/accounts",
    "MAIL_URL": "http://localhost:8003/mail",
}


def setting(name: str) -> str:
    """Return an environment variable or its default."""
    return os.environ.get(name, ENVIRONMENT[name])


app = Celery(
    "workers",
    broker=setting("CELERY_BROKER_URL"),
    backend=setting("CELERY_RESULT_BACKEND"),
    include=["workers.tasks"],
)
app.conf.update(
    broker_connection_retry_on_startup=True,
    result_extended=True,  # Flower and the drill want to know a result's task
    result_expires=3600,
    task_send_sent_event=True,
    task_time_limit=30,
    task_track_started=True,
    worker_prefetch_multiplier=1,  # a message that no process can start yet stays where all workers see it
)

resilience = Resilience(app)

# The README's policy, which is the default one, with a time from which a call counts as slow.
payments = resilience.breaker(
    "payments",
    failure_rate_threshold=0.5,
    minimum_calls=10,
    window=30,
    open_duration=10,
    slow_call_duration=1,
    description="The payment provider. Owner: team checkout, #checkout-oncall",
    runbook="https://wiki.example/payments-is-down",
)
accounts = resilience.breaker("accounts", slow_call_duration=1)
mail = resilience.breaker("mail", slow_call_duration=1)
