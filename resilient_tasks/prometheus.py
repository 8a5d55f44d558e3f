"""Breakers for prometheus-client, from any one process of the fleet.

``celery -A proj breakers exporter`` serves them by itself, and Flower with breakers in its ``/metrics``. A process that
has a ``/metrics`` of its own adds them with one line::

    from resilient_tasks.prometheus import register

    register(app)

One process is enough: everything is read from the shared store, so several export the same values. Needs the extra
``resilient_tasks[metrics]``.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry

from resilient_tasks.monitor.metrics import BreakerCollector, Subject
from resilient_tasks.worker.options import options_of
from resilient_tasks.worker.runtime import Runtime, runtime_of

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["BreakerCollector", "register"]

#: Most children of one breaker that have series: each has as many as a breaker.
MOST_CHILDREN = 100


def register(app: Celery, registry: CollectorRegistry = REGISTRY) -> BreakerCollector:
    """Add the breakers of an app to a registry of prometheus-client.

    Each scrape reads the store, which takes about a second for a thousand breakers: in an event loop, call
    ``generate_latest`` in a thread.

    Args:
        app: the Celery app that the ``Resilience`` was initialised with.
        registry: where to add them.

    Returns:
        What was added, for ``registry.unregister``.

    Raises:
        ConfigurationError: the app has no ``Resilience``.
        ValueError: they are in the registry already.
    """
    collector = BreakerCollector(partial(_read, runtime_of(app)))
    registry.register(collector)
    return collector


def _read(runtime: Runtime) -> list[Subject]:
    """Read all breakers of an app from the store, and their first active children."""
    snapshots = runtime.read(MOST_CHILDREN)
    totals = runtime.fleet.history.totals([each.name for each in snapshots])
    estimates = runtime.fleet.history.estimates(snapshots)
    done_in = {name: estimate.done_in for name, estimate in estimates.items()}
    tasks, queue = _tasks_by_breaker(runtime), f"{runtime.settings.namespace}.deferred.{{}}".format
    return [
        Subject(each, totals[each.name], queue(each.name), tasks[each.name], done_in.get(each.name))
        for each in snapshots
    ]


def _tasks_by_breaker(runtime: Runtime) -> dict[str, list[str]]:
    tasks: defaultdict[str, list[str]] = defaultdict(list)
    for name, task in sorted(runtime.app.tasks.items()):
        options = options_of(task)
        for breaker in options.breakers if options is not None else ():
            tasks[breaker].append(name)
    return tasks
