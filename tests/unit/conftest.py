"""An app and its breaker in memory; a module may define its own instead."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery
from kombu.transport import redis

from resilient_tasks import Breaker, Resilience
from resilient_tasks.testing import Clock, in_memory


@pytest.fixture(autouse=True)
def _channels_of_kombu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that starts a worker's bootsteps changes for the whole process how messages are taken."""
    monkeypatch.setattr(redis.Transport, "Channel", redis.Channel)
    monkeypatch.setattr(redis.SentinelTransport, "Channel", redis.SentinelChannel)


@pytest.fixture
def app() -> Celery:
    return Celery("tasks", broker="memory://", backend="cache+memory://", set_as_current=False)


@pytest.fixture
def resilience(app: Celery) -> Resilience:
    return Resilience(app)


@pytest.fixture
def payments(resilience: Resilience) -> Breaker:
    return resilience.breaker("payments", consecutive_failures=3, open_jitter=0)


@pytest.fixture
def clock(resilience: Resilience, payments: Breaker) -> Iterator[Clock]:
    with in_memory(resilience) as clock:
        yield clock
