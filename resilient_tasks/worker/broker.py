"""Which kind of queues an app's broker offers."""

from __future__ import annotations

from celery import Celery

from resilient_tasks.worker.published_queues import PublishedQueues
from resilient_tasks.worker.queues import Queues
from resilient_tasks.worker.redis_queues import RedisQueues


def open_queues(app: Celery, namespace: str) -> Queues:
    """Return the queues of an app's broker."""
    with app.connection_for_read() as probe:
        is_redis = probe.transport.driver_type == "redis"
    return (RedisQueues if is_redis else PublishedQueues)(app, namespace)
