"""``FlowerWithBreakers``: Flower, with our handlers before its own."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample
from tornado import web

from resilient_tasks.flower import flower_internals
from resilient_tasks.flower.handlers import Metrics, routes
from resilient_tasks.flower.service import Service
from resilient_tasks.monitor.events import Throttle
from resilient_tasks.prometheus import PREFIX, UP, register
from resilient_tasks.worker.context import Runtime, find_runtime

logger = logging.getLogger("resilient_tasks")

RUN_TIMES = f"{PREFIX}task_runtime_seconds"

_TEXTS = (
    "name", "args", "kwargs", "result", "exception", "traceback", "eta", "expires", "queue", "exchange", "routing_key",
    "root_id", "parent_id", "state", "sw_ident", "sw_ver", "sw_sys",
)  # fmt: skip
_NUMBERS = ("utcoffset", "pid", "retries", "runtime", "freq", "active", "processed")
_LATEST = 1e12  # seconds or clock ticks; no calendar goes so far
_MOST_LINES, _INTERVAL = 10, 60.0  # in the log


class FlowerWithBreakers(flower_internals.Flower):
    """Flower as ``flower.command`` makes it, with pages, API and metrics of the app's breakers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        flower_internals.events.EventReceiver = Receiver
        templates = kwargs["template_loader"] = flower_internals.Templates(kwargs["template_path"])
        super().__init__(*args, **kwargs)
        self.executor.submit(templates.warm_up)
        runtime = find_runtime(self.capp)
        if runtime is None:
            raise SystemExit(f"app {self.capp.main!r} has no Resilience: name the app that has, as in celery -A proj")
        service = Service(runtime, partial(flower_internals.run_times, self))
        self.io_loop.add_callback(service.watch.run)
        handlers = routes(service)
        if not any(REGISTRY.restricted_registry([UP]).collect()):  # the user has registered them already
            registry = CollectorRegistry()
            register(self.capp, registry)
            registry.register(RunTimes(runtime))
            handlers.append(web.url(r"/metrics", Metrics, {"registry": registry}))
        self.add_handlers(".*", flower_internals.prefixed(handlers, self.options))


class RunTimes(Collector):
    """How long the tasks of each breaker run, made of the same of each task, which Flower learns from events."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        """Yield one histogram, with a series per worker: those of a worker that is forgotten end and never fall."""
        found = defaultdict[tuple[str, tuple[tuple[str, str], ...]], float](float)
        tasks = self._runtime.tasks_by_breaker().items()
        names = [flower_internals.RUN_TIMES + kind for kind in ("_bucket", "_count", "_sum")]
        for sample in (each for family in REGISTRY.restricted_registry(names).collect() for each in family.samples):
            task, name = sample.labels["task"], sample.name.replace(flower_internals.RUN_TIMES, RUN_TIMES)
            others = [label for label in sample.labels.items() if label[0] != "task"]
            for breaker in (breaker for breaker, guarded in tasks if task in guarded):
                found[name, (("breaker", breaker), *others)] += sample.value
        family = Metric(RUN_TIMES, "How long runs of its tasks took that succeeded, by their events.", "histogram")
        family.samples = [Sample(name, dict(labels), value) for (name, labels), value in found.items()]
        yield family


class Receiver(flower_internals.EventReceiver):
    """Celery's receiver, which logs and leaves out invalid events.

    One of them would end the connection on which Flower listens, and events until the next one would be lost.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines = Throttle(_MOST_LINES, _INTERVAL)

    def _receive(self, body: Any, message: Any, **_: Any) -> None:
        for event in body if isinstance(body, list) else [body]:
            if _is_valid(event):
                super()._receive(event, message)
                continue
            for count in self._lines.take_suppressed().values():
                logger.warning("%d more invalid events", count)
            if self._lines.admits(""):
                logger.warning("an event is invalid: %.200r", event)


def _is_valid(event: Any) -> bool:
    """Whether Celery's memory of events, and Flower's pages, can read an event."""
    if not isinstance(event, dict):
        return False
    needed = ("type", "hostname", "uuid") if str(event.get("type")).startswith("task-") else ("type", "hostname")
    return (
        all(isinstance(event.get(field), str) for field in needed)
        and all(_is_number(event.get(field)) for field in ("timestamp", "clock"))
        and all(isinstance(event.get(field), (str, type(None))) for field in _TEXTS)
        and all(event.get(field) is None or _is_number(event[field]) for field in _NUMBERS)
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _LATEST
