"""The metrics of ``docs/metrics.md`` for OpenTelemetry, from any one process of the fleet.

    from resilient_tasks.telemetry import observe

    observe(app)

One process is enough, and more than one is wrong where a backend adds up what several report: everything is read from
the shared store. Traces need no call: spans know their breakers wherever opentelemetry-api is installed. Needs the
extra ``resilient_tasks[otel]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

from resilient_tasks.monitor.metrics import HEALTH, METRICS, Metric, Subject
from resilient_tasks.monitor.readings import PATIENCE, Readings
from resilient_tasks.worker.runtime import runtime_of
from resilient_tasks.worker.subjects import read_subjects

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["observe"]

_Observe = Callable[[CallbackOptions], Iterator[Observation]]


def observe(app: Celery, meter: Meter | None = None, *, patience: float = PATIENCE) -> None:
    """Make instruments of all metrics: observable gauges, and observable counters of the totals.

    Args:
        app: the Celery app that the ``Resilience`` was initialised with.
        meter: of which provider; ``None``: the global one's.
        patience: longest time in seconds that a collection may wait for the store.

    Raises:
        ConfigurationError: the app has no ``Resilience``.
    """
    readings = Readings(partial(read_subjects, runtime_of(app)), patience)
    meter = meter or get_meter("resilient_tasks")
    for name, text in HEALTH.items():
        meter.create_observable_gauge(name, [_health(name, readings)], description=text)
    for metric in METRICS:
        create = meter.create_observable_counter if metric.is_counter else meter.create_observable_gauge
        create(metric.name, [_of_all(metric, readings)], description=metric.text)


def _health(name: str, readings: Readings[list[Subject]]) -> _Observe:
    def observations(_: CallbackOptions) -> Iterator[Observation]:
        yield Observation(readings.latest().health()[name])

    return observations


def _of_all(metric: Metric, readings: Readings[list[Subject]]) -> _Observe:
    def observations(_: CallbackOptions) -> Iterator[Observation]:
        for subject in readings.latest().content or ():
            for value, labels in metric.points(subject):
                yield Observation(value, metric.labelled(subject, labels))

    return observations
