"""The pages and the JSON API, and Flower's own pages of queues and metrics with ours among them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import responses
from importlib import resources
from typing import Annotated, Any

from prometheus_client import CollectorRegistry, generate_latest
from pydantic import Field
from tornado import web

from resilient_tasks.core.model import Verb, did_you_mean
from resilient_tasks.errors import BreakerOpenError, ConfigurationError, DeadLetterError, StoreError
from resilient_tasks.flower import flower_internals
from resilient_tasks.flower.service import TASK_ACTIONS, NoAnswerError, Service
from resilient_tasks.validation import parse

logger = logging.getLogger("resilient_tasks")

_Rate = Annotated[float, Field(ge=0.01, le=100_000, description="a number of tasks per second from 0.01 to 100,000")]
_Reason = Annotated[str, Field(description="a text")]
RESUME = "resume"

# text that a user has written into a name, an argument or a reason runs as no script, whatever else fails
_CONTENT_SECURITY_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)


class _Shared:
    """What the pages and the API have in common; a mixin of Flower's handlers."""

    service: Service

    def initialize(self, service: Service) -> None:
        self.service = service

    def check_defined(self, name: str) -> None:
        """Fail with the nearest name if there is no breaker of this one."""
        if not self.service.defines(name):
            hint = did_you_mean(name, self.service.names)
            raise web.HTTPError(HTTPStatus.NOT_FOUND, f"no breaker is named {name!r}{hint}")

    @contextmanager
    def errors_answered(self) -> Iterator[None]:
        try:
            yield
        except ConfigurationError as error:
            raise web.HTTPError(HTTPStatus.BAD_REQUEST, str(error)) from error
        except BreakerOpenError as error:
            advice = "its tasks would be deferred again; reset it first"
            raise web.HTTPError(HTTPStatus.CONFLICT, f"{error}: {advice}") from error
        except DeadLetterError as error:
            raise web.HTTPError(HTTPStatus.NOT_FOUND, str(error)) from error
        except (StoreError, NoAnswerError) as error:
            raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
        except self.service.broker_errors as error:
            logger.warning("the broker is unavailable: %s", error)
            message = f"the broker is unavailable: {type(error).__name__}"  # its text may hold a password
            raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, message) from error


class _Json:
    """Answers errors as JSON; a mixin of Flower's handlers."""

    def write_error(self: Any, status_code: int, **kwargs: Any) -> None:
        if status_code == HTTPStatus.UNAUTHORIZED and self.application.options.basic_auth:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        error = kwargs.get("exc_info", (None, None, None))[1]
        text = error.log_message % error.args if isinstance(error, web.HTTPError) and error.log_message else None
        self.finish({"error": text or responses.get(status_code, "error")})


async def _write_look(handler: Any, name: str | None, *, required: bool) -> None:
    """Answer with all breakers or with one, and the age of that state; unless ``required`` with none as well."""
    service: Service = handler.service
    if name is not None:
        handler.check_defined(name)
    look = await service.watch.look()
    if required and look.read_at is None:
        raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, look.problem or "the store does not answer")
    if name is None:
        handler.set_header("Content-Type", "application/json; charset=UTF-8")
        handler.write(look.as_json())
        return
    breaker = look.breakers.get(name)
    if breaker is None and look.read_at is not None:
        with handler.errors_answered():
            breaker = await service.read(name)
    handler.write({"breaker": breaker, **look.freshness()})


# --- the JSON API ---------------------------------------------------------------------------------------


class _Api(_Json, _Shared, flower_internals.BaseApiHandler):
    """Under the rules of Flower's own API; only requests from our own pages, or from no page, may write."""

    def prepare(self) -> None:
        super().prepare()
        if not self.current_user:
            raise web.HTTPError(HTTPStatus.UNAUTHORIZED, "log in first")
        if self.request.method == "POST":
            if flower_internals.is_foreign(self):
                raise web.HTTPError(HTTPStatus.FORBIDDEN, "requests from other sites are refused")
            if flower_internals.is_read_only(self):
                raise web.HTTPError(HTTPStatus.FORBIDDEN, "Flower is read-only")

    @property
    def sent(self) -> dict[str, Any]:
        if not self.request.headers.get("Content-Type", "").startswith("application/json"):
            return {name: flower_internals.raw_argument(self, name) for name in self.request.arguments}
        try:
            sent = json.loads(self.request.body or b"{}")
        except (ValueError, RecursionError):
            sent = None
        if not isinstance(sent, dict):
            raise web.HTTPError(HTTPStatus.BAD_REQUEST, "the body is no JSON object")
        return sent

    @property
    def reason(self) -> str:
        return str(parse("reason", _Reason, self.sent.get("reason") or ""))

    @property
    def rate(self) -> float | None:
        """Tasks per second; None if not given."""
        given = self.sent.get("rate")
        return None if given in (None, "") else float(parse("rate", _Rate, given))

    @property
    def task_ids(self) -> list[str]:
        """Which tasks: one ``id``, or several, separated by commas or as a JSON array."""
        given = self.sent.get("id")
        ids = given.split(",") if isinstance(given, str) else given
        if ids and isinstance(ids, list) and all(isinstance(each, str) and each for each in ids):
            return ids
        raise web.HTTPError(HTTPStatus.BAD_REQUEST, f"id={given!r}: allowed are ids of tasks")


class BreakersApi(_Api):
    """``GET /api/breakers`` and ``GET /api/breakers/NAME``."""

    async def get(self, name: str | None = None) -> None:
        await _write_look(self, name, required=True)


class VerbApi(_Api):
    """``POST /api/breakers/NAME/VERB``, on tasks ``.../deferred/resume``, ``.../dead/replay`` and ``.../drop``."""

    async def post(self, name: str, verb: str) -> None:
        self.check_defined(name)
        actor = flower_internals.user_of(self)
        with self.errors_answered():
            if verb in TASK_ACTIONS:
                self.write({"done": await self.service.act_on_tasks(name, verb, self.task_ids, actor)})
            elif verb == RESUME:
                resumed = await self.service.resume(name, self.rate, actor)
                if resumed is None:
                    self.set_status(HTTPStatus.ACCEPTED)
                self.write({"resumed": resumed})
            elif verb in set(Verb):
                self.write({"breaker": await self.service.command(name, Verb(verb), self.reason, actor)})
            else:
                allowed = ", ".join(map(str, [*Verb, RESUME, *TASK_ACTIONS]))
                raise web.HTTPError(HTTPStatus.NOT_FOUND, f"no command is {verb!r}; allowed are {allowed}")


# --- pages ----------------------------------------------------------------------------------------------


class _Page(_Shared, flower_internals.BaseHandler):
    """A page in Flower's navigation, behind Flower's login."""

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Content-Security-Policy", _CONTENT_SECURITY_POLICY)

    def show(self, template: str, **values: Any) -> None:
        may_act = flower_internals.api_is_open(self) and not flower_internals.is_read_only(self)
        self.render(f"breakers/{template}", may_act=may_act, **values)


class BreakersPage(_Page):
    """``/breakers`` and ``/breakers/NAME``; with ``json`` what the page shows, as Flower's own pages ask for it."""

    @web.authenticated
    async def get(self, name: str | None = None) -> None:
        if flower_internals.raw_argument(self, "json"):
            await _write_look(self, name, required=False)
        elif name is None:
            self.show("list.html")
        else:
            self.check_defined(name)
            policy, tasks = self.service.about(name)
            self.show("one.html", name=name, policy=policy, tasks=tasks)


class BreakerPart(_Json, _Page):
    """What pages load when needed: ``/breakers/NAME/history``, ``.../deferred`` and ``.../dead``, ``/dead-letters``.

    ``search`` finds tasks by id, name, arguments and reason.
    """

    @web.authenticated
    async def get(self, name: str | None = None, part: str = "") -> None:
        if name is not None:
            self.check_defined(name)
        search = flower_internals.raw_argument(self, "search") if "search" in self.request.arguments else None
        with self.errors_answered():
            read = self.service.dead_letters() if name is None else self.service.part(name, part, search)
            self.write(await read)


class OutagesPage(_Page):
    """``/outages``, of all breakers; ``/outages?breaker=NAME``, of one."""

    @web.authenticated
    async def get(self) -> None:
        name = flower_internals.raw_argument(self, "breaker") or None
        if name is not None:
            self.check_defined(name)
        with self.errors_answered():
            self.show("outages.html", name=name, outages=await self.service.outages(name))


class _OurQueues(_Shared):
    """Adds the deferred and dead-letter queues to those that Flower asks the broker about."""

    def get_active_queue_names(self) -> list[str]:
        theirs: list[str] = super().get_active_queue_names()  # type: ignore[misc]  # a mixin of Flower's handlers
        return sorted({*theirs, *self.service.queues})


class BrokerPage(_OurQueues, flower_internals.BrokerView):
    """Flower's ``/broker``."""


class QueueLengths(_OurQueues, flower_internals.GetQueueLengths):
    """Flower's ``/api/queues/length``."""


class Metrics(flower_internals.Metrics):
    """Flower's ``/metrics``, with ours behind its own."""

    def initialize(self, registry: CollectorRegistry) -> None:
        self.registry = registry

    async def get(self) -> None:
        await super().get()
        self.write(await asyncio.to_thread(generate_latest, self.registry))


def routes(service: Service) -> list[web.url]:
    ours, name = {"service": service}, r"([^/]+)"
    static = str(resources.files("resilient_tasks.flower") / "static")
    return [
        web.url(r"/breakers", BreakersPage, ours, name="breakers"),
        web.url(r"/breakers-static/(.+)", web.StaticFileHandler, {"path": static}, name="breakers-static"),
        web.url(rf"/breakers/{name}", BreakersPage, ours),
        web.url(rf"/breakers/{name}/(history|deferred|dead)", BreakerPart, ours),
        web.url(r"/dead-letters", BreakerPart, ours),
        web.url(r"/outages", OutagesPage, ours, name="outages"),
        web.url(r"/broker", BrokerPage, ours),
        web.url(r"/api/breakers", BreakersApi, ours),
        web.url(rf"/api/breakers/{name}", BreakersApi, ours),
        web.url(rf"/api/breakers/{name}/([^/]+(?:/[^/]+)?)", VerbApi, ours),
        web.url(r"/api/queues/length", QueueLengths, ours),
    ]
