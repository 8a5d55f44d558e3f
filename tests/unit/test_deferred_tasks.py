"""Ending a task that waits: its result first, so that nothing is dropped of which nobody learns."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.backends.cache import CacheBackend
from celery.exceptions import TaskRevokedError

from resilient_tasks import Resilience
from resilient_tasks.worker.celery_internals import Events
from resilient_tasks.worker.context import runtime_of
from resilient_tasks.worker.deferred_tasks import DeferredTasks
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Entry, Move


class SometimesAway(CacheBackend):
    """A result backend that may be unavailable."""

    away = False

    def mark_as_revoked(self, *args: Any, **kwargs: Any) -> Any:
        if self.away:
            raise ConnectionError("the result backend is unavailable")
        return super().mark_as_revoked(*args, **kwargs)


@pytest.fixture
def app() -> Celery:
    app = Celery("deferred", broker="memory://", set_as_current=False)
    Resilience(app, store_url="redis://127.0.0.1:1").breaker("payments")

    @app.task(name="waiting-charge", shared=False, breaker="payments", backend=SometimesAway(app, url="memory://"))
    def charge() -> None: ...

    app.finalize()
    return app


@pytest.fixture
def tasks(app: Celery) -> DeferredTasks:
    return DeferredTasks(runtime_of(app), Events(app))


@pytest.fixture
def entry() -> Entry:
    body = json.dumps([[], {}, {}])
    message = SimpleNamespace(
        headers={"id": "a-revoked-id", "task": "waiting-charge"}, body=body, payload=json.loads(body), delivery_info={},
        properties={}, content_type="application/json", content_encoding="utf-8",
    )  # fmt: skip
    return Entry(message, Envelope(breaker="payments"))


def test_a_revoked_task_waits_for_its_result_to_be_writable(app: Celery, tasks: DeferredTasks, entry: Entry) -> None:
    backend = app.tasks["waiting-charge"].backend
    backend.away = True
    assert tasks.end(entry, TaskRevokedError("revoked")) is None
    backend.away = False
    assert tasks.end(entry, TaskRevokedError("revoked")) == Move(entry, None)
    assert backend.get_state("a-revoked-id") == "REVOKED"
