"""The pages: all breakers, one breaker; and Flower's own Broker page with our queues."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from tornado import web

from resilient_tasks.core.model import Verb
from resilient_tasks.flower import seams
from resilient_tasks.flower.api import RESUME
from resilient_tasks.flower.handlers import Page, check_defined, failures_told, look_at

VERBS = {
    Verb.TRIP: "Open it as if it had tripped: it heals by itself.",
    Verb.ISOLATE: "Refuse all calls, probes too, until reset.",
    Verb.DISABLE: "Admit all calls and count nothing, until reset.",
    Verb.SHADOW: "Admit all calls, count, and tell when it would have opened, until reset.",
    Verb.RESET: "Close it, with an empty window.",
    RESUME: "Send the waiting tasks back to their queues now, without the workers' slow start.",
}


class _BreakersPage(Page):
    def show(self, template: str, **values: Any) -> None:
        """Render one of our templates."""
        may_act = seams.api_is_open(self) and not seams.is_read_only(self)
        self.render(f"breakers/{template}", verbs=VERBS, may_act=may_act, **values)

    @property
    def wants_json(self) -> bool:
        """Whether the page asks for its own data, as Flower's own pages do."""
        return bool(seams.raw_argument(self, "json"))


class Breakers(_BreakersPage):
    """``/breakers``."""

    @web.authenticated
    async def get(self) -> None:
        """Show all breakers."""
        if self.wants_json:
            self.set_header("Content-Type", "application/json; charset=UTF-8")
            self.write((await self.desk.watch.look()).as_json())
        else:
            self.desk.watch.expect_looks()  # the page is about to ask
            self.show("list.html")


class Breaker(_BreakersPage):
    """``/breakers/NAME``."""

    @web.authenticated
    async def get(self, name: str) -> None:
        """Show one breaker."""
        check_defined(self.desk, name)
        if self.wants_json:
            self.write(await look_at(self.desk, name))
        else:
            self.show("one.html", name=name)


class Part(_BreakersPage):
    """``/breakers/NAME/history``, ``.../deferred`` and ``.../dead``: what a breaker's page loads when it is needed."""

    @web.authenticated
    async def get(self, name: str, part: str) -> None:
        """Return a part of the page as JSON."""
        check_defined(self.desk, name)
        parts = {"history": self.desk.history, "deferred": self.desk.deferred, "dead": self.desk.dead}
        try:
            with failures_told(self.desk):
                self.write(await parts[part](name))
        except web.HTTPError as error:
            self.set_status(error.status_code)
            self.write({"error": error.log_message})


class Outages(_BreakersPage):
    """``/outages``, of all breakers; ``/outages?breaker=NAME``, of one."""

    @web.authenticated
    async def get(self) -> None:
        """Tell of outages, the newest first."""
        name = seams.raw_argument(self, "breaker") or None
        if name is not None:
            check_defined(self.desk, name)
        with failures_told(self.desk):
            self.show("outages.html", name=name, outages=await self.desk.outages(name))


class _OurQueues:
    """Adds the deferred and dead-letter queues to those that Flower asks the broker about."""

    def initialize(self, desk: Any) -> None:
        self.desk = desk

    def get_active_queue_names(self) -> list[str]:
        theirs: list[str] = super().get_active_queue_names()  # type: ignore[misc]  # a mixin of Flower's handlers
        return sorted({*theirs, *self.desk.queues})


class Broker(_OurQueues, seams.BrokerView):
    """Flower's ``/broker``."""


class QueueLengths(_OurQueues, seams.GetQueueLengths):
    """Flower's ``/api/queues/length``."""


class Metrics(seams.Metrics):
    """Flower's ``/metrics``, with ours behind its own."""

    def initialize(self, registry: CollectorRegistry) -> None:
        """Remember where ours are."""
        self.registry = registry

    async def get(self) -> None:
        """Send the metrics of tasks, workers and breakers."""
        await super().get()
        self.write(await asyncio.to_thread(generate_latest, self.registry))
