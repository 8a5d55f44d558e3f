"""Breakers for prometheus-client, as any one process of the fleet can tell of them.

``celery -A proj breakers exporter`` serves them by itself, and Flower with breakers in its ``/metrics``. A process that
has a ``/metrics`` of its own adds them with one line::

    from resilient_tasks.prometheus import register

    register(app)

One process is enough: everything is read from the shared store, so several would tell the same. Needs the extra
``resilient_tasks[metrics]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from resilient_tasks.monitor.metrics import HEALTH, METRICS, Metric, Subject
from resilient_tasks.monitor.readings import PATIENCE, Readings
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.subjects import read_subjects

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["BreakerCollector", "register"]


def register(app: Celery, registry: CollectorRegistry = REGISTRY, *, patience: float = PATIENCE) -> BreakerCollector:
    """Add the breakers of an app to a registry of prometheus-client.

    Args:
        app: the Celery app that the ``Resilience`` was initialised with.
        registry: where to add them.
        patience: longest time in seconds that a scrape may wait for the store; 0 in an event loop. What takes longer
            is told as it was a few seconds ago.

    Raises:
        ConfigurationError: the app has no ``Resilience``.
        ValueError: they are in the registry already.
    """
    collector = BreakerCollector(partial(read_subjects, runtime_of(app)), patience)
    registry.register(collector)
    return collector


class BreakerCollector(Collector):
    """What prometheus-client exposes; made of each reading beforehand, because a scrape should not take long.

    Args:
        read: reads all breakers; first at once, so that they are there by the first scrape.
        patience: longest time in seconds that a scrape may wait for it.
    """

    def __init__(self, read: Callable[[], Sequence[Subject]], patience: float = PATIENCE) -> None:
        self._readings = Readings(lambda: _families(read()), patience)
        self._readings.begin()

    def describe(self) -> Iterator[Family]:
        """Yield all families without values: registering asks for names, and needs no store."""
        yield from (Family(name, text, "gauge") for name, text in HEALTH.items())
        yield from _families(())

    def collect(self) -> Iterator[Family]:
        """Yield all families with the values of the latest reading."""
        reading = self._readings.latest()
        for name, value in reading.health().items():
            family = Family(name, HEALTH[name], "gauge")
            family.add_sample(name, {}, value)
            yield family
        yield from reading.content or ()


def _families(subjects: Sequence[Subject]) -> list[Family]:
    return [_family(metric, subjects) for metric in METRICS]


def _family(metric: Metric, subjects: Sequence[Subject]) -> Family:
    family = Family(metric.name.removesuffix("_total"), metric.text, metric.kind)
    family.samples = list(_samples(metric, subjects))
    return family


def _samples(metric: Metric, subjects: Iterable[Subject]) -> Iterator[Sample]:
    for subject in subjects:
        for value, labels in metric.points(subject):
            yield Sample(metric.name, metric.labelled(subject, labels), value)
