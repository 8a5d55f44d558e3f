"""``FlowerWithBreakers``: Flower, with our handlers before its own."""

from __future__ import annotations

import logging
from importlib import resources
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from tornado import web

from resilient_tasks.flower import api, pages, seams
from resilient_tasks.flower.desk import Desk
from resilient_tasks.flower.receiver import SoundReceiver
from resilient_tasks.monitor.metrics import UP
from resilient_tasks.prometheus import register
from resilient_tasks.worker.runtime import find_runtime

logger = logging.getLogger("resilient_tasks")

_NAME = r"([^/]+)"


class FlowerWithBreakers(seams.Flower):
    """Flower as ``flower.command`` makes it, with what is ours; without, if the app has no ``Resilience``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        seams.events.EventReceiver = SoundReceiver
        templates = kwargs["template_loader"] = seams.Templates(kwargs["template_path"])
        super().__init__(*args, **kwargs)
        self.executor.submit(templates.warm_up)
        runtime = find_runtime(self.capp)
        if runtime is None:
            raise SystemExit(f"app {self.capp.main!r} has no Resilience: name the app that has, as in celery -A proj")
        desk = Desk(runtime)
        self.io_loop.add_callback(desk.watch.start)
        handlers = _handlers(desk)
        if not _are_registered():
            registry = CollectorRegistry()
            register(self.capp, registry)
            handlers.append(web.url(r"/metrics", pages.Metrics, {"registry": registry}))
        self.add_handlers(".*", seams.prefixed(handlers, self.options))


def _are_registered() -> bool:
    """Whether breakers are among Flower's own metrics already, because somebody has added them to its registry."""
    return any(REGISTRY.restricted_registry([UP]).collect())


def _handlers(desk: Desk) -> list[web.url]:
    ours = {"desk": desk}
    static = str(resources.files("resilient_tasks.flower") / "static")
    return [
        web.url(r"/breakers", pages.Breakers, ours, name="breakers"),
        web.url(r"/breakers-static/(.+)", web.StaticFileHandler, {"path": static}, name="breakers-static"),
        web.url(rf"/breakers/{_NAME}", pages.Breaker, ours),
        web.url(rf"/breakers/{_NAME}/(history|deferred|dead)", pages.Part, ours),
        web.url(r"/outages", pages.Outages, ours, name="outages"),
        web.url(r"/broker", pages.Broker, ours),
        web.url(r"/api/breakers", api.Breakers, ours),
        web.url(rf"/api/breakers/{_NAME}", api.Breaker, ours),
        web.url(rf"/api/breakers/{_NAME}/{_NAME}", api.Steering, ours),
        web.url(rf"/api/breakers/{_NAME}/{_NAME}/{_NAME}", api.Tasks, ours),
        web.url(r"/api/queues/length", pages.QueueLengths, ours),
    ]
