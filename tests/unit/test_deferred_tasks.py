"""Ending a task that waits: its result first, so that nothing is dropped unnoticed."""

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
from resilient_tasks.worker.deferral import keeps_place
from resilient_tasks.worker.deferred_tasks import PAGE, SMALLEST_PAGE, DeferredTasks, Resumer
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


@pytest.mark.parametrize(("limit", "options", "most"), [
    (1, {}, 1 + SMALLEST_PAGE), (100, {}, 100 + SMALLEST_PAGE), (PAGE, {}, PAGE), (1, {"only": ["an-id"]}, PAGE),
    (1, {"unfailed_first": True}, PAGE),
])  # fmt: skip
def test_no_more_is_read_than_free_slots_need(
    app: Celery, tasks: DeferredTasks, monkeypatch: pytest.MonkeyPatch, limit: int, options: dict[str, Any], most: int
) -> None:
    asked: list[int] = []

    def transfer_all(*_: Any, most: int, **__: Any) -> list[list[Move]]:
        asked.append(most)
        return []

    monkeypatch.setattr(tasks, "transfer_all", transfer_all)
    breaker = runtime_of(app).breaker("payments")
    Resumer(runtime_of(app), tasks).release(breaker, breaker.cached_state.snapshot, limit, **options)
    assert asked == [most]


@pytest.mark.parametrize(("before", "after", "keeps"), [
    (Envelope(), Envelope(), False),  # it is new
    (Envelope(resumed=7), Envelope(), True),
    (Envelope(resumed=7, attempted_at=1.0, not_before=2.0), Envelope(attempted_at=1.0, not_before=2.0), True),
    (Envelope(resumed=7, attempted_at=1.0), Envelope(attempted_at=3.0), False),  # it has failed
    (Envelope(resumed=7), Envelope(not_before=9.0), False),  # it has to wait
])  # fmt: skip
def test_a_resumed_task_that_is_refused_keeps_its_place(before: Envelope, after: Envelope, *, keeps: bool) -> None:
    assert keeps_place(before, after) is keeps


def test_pages_grow_until_there_is_enough(tasks: DeferredTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[tuple[int, int]] = []

    def transfer(*_: Any, start: int, most: int) -> tuple[int, list[Move]]:
        pages.append((start, most))
        return (most, []) if len(pages) < 4 else (0, [])

    monkeypatch.setattr(tasks, "transfer", transfer)
    assert len(list(tasks.transfer_all("payments", lambda _: [], enough=lambda: False, most=100))) == 4
    assert pages == [(0, 100), (100, 200), (300, 400), (700, PAGE)]


def test_a_revoked_task_waits_for_its_result_to_be_writable(app: Celery, tasks: DeferredTasks, entry: Entry) -> None:
    backend = app.tasks["waiting-charge"].backend
    backend.away = True
    assert tasks.end(entry, TaskRevokedError("revoked")) is None
    backend.away = False
    assert tasks.end(entry, TaskRevokedError("revoked")) == Move(entry, None)
    assert backend.get_state("a-revoked-id") == "REVOKED"
