"""Every use of Flower's internals, in one place.

``tests/unit/test_flower_internals.py`` fails when one of them moves. Flower 2.1 and newer.
"""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from flower import command as command
from flower import events as events
from flower.api import BaseApiHandler as BaseApiHandler
from flower.api.tasks import GetQueueLengths as GetQueueLengths
from flower.app import Flower as Flower
from flower.app import rewrite_handler
from flower.events import EventReceiver as EventReceiver
from flower.views import BaseHandler as BaseHandler
from flower.views.broker import BrokerView as BrokerView
from flower.views.monitor import Metrics as Metrics
from tornado import template, web

#: The user where no login is needed.
ANONYMOUS = "flower"

#: Flower's histogram of how long tasks run.
RUN_TIMES = "flower_task_runtime_seconds"

_OURS = "breakers/"
_PAGES = ("list.html", "one.html", "outages.html")
_END_OF_NAVIGATION = "</ul>"


class Templates(template.Loader):
    """Flower's templates, with one more item in the navigation, and ours below ``breakers/``."""

    def resolve_path(self, name: str, parent_path: str | None = None) -> str:  # noqa: ARG002 - all names are absolute
        """Return a template's name: ours extend Flower's, which are in no folder."""
        return name

    def warm_up(self) -> None:
        """Compile our pages, so that the first request need not wait for it."""
        for name in _PAGES:
            self.load(_OURS + name)

    def _create_template(self, name: str) -> template.Template:
        if name.startswith(_OURS):
            return template.Template(_ours(name.removeprefix(_OURS)), name=name, loader=self)
        if name == "navbar.html":
            return template.Template(self._navigation(), name=name, loader=self)
        return super()._create_template(name)

    def _navigation(self) -> str:
        theirs = Path(self.root, "navbar.html").read_text("utf-8")
        return theirs.replace(_END_OF_NAVIGATION, _ours("item.html") + _END_OF_NAVIGATION, 1)


def _ours(name: str) -> str:
    return (resources.files("resilient_tasks.flower") / "templates" / name).read_text("utf-8")


def prefixed(handlers: list[web.url], options: Any) -> list[web.url]:
    """Return handlers as they are reached below Flower's ``url_prefix``."""
    if not options.url_prefix:
        return handlers
    return [rewrite_handler(handler, options.url_prefix) for handler in handlers]


def run_times(flower: Flower, tasks: Sequence[str], since: float) -> dict[str, float]:
    """Return how many runs of tasks have succeeded since, by their events, and percentiles of how long they took."""
    known = (task for name in tasks for task in flower.events.state.tasks_by_type.get(name, ()))
    times = sorted(task.runtime for task in known if task.runtime is not None and (task.succeeded or 0) >= since)
    return {"runs": len(times), **{f"p{each}": times[len(times) * each // 100] for each in (50, 95) if times}}


def is_read_only(handler: Any) -> bool:
    return bool(handler.application.options.read_only)


def api_is_open(handler: Any) -> bool:
    """Whether requests may change something: Flower has no such API unless users log in."""
    try:
        BaseApiHandler.prepare(handler)
    except web.HTTPError:
        return False
    return True


def is_foreign(handler: Any) -> bool:
    """Whether a page of another site makes this request in the user's name, as far as the browser says."""
    site = handler.request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return str(site) not in {"same-origin", "none"}
    origin = handler.request.headers.get("Origin")
    return origin is not None and str(origin).partition("://")[2] != handler.request.host


def user_of(handler: Any) -> str:
    """Return the user who makes a request: the e-mail address or the name of the login."""
    if isinstance(handler.current_user, str):
        return handler.current_user
    if handler.application.options.basic_auth:
        credentials = handler.request.headers.get("Authorization", "").partition(" ")[2]
        try:
            return b64decode(credentials).decode().partition(":")[0] or ANONYMOUS
        except (binascii.Error, UnicodeDecodeError):
            return ANONYMOUS
    return ANONYMOUS


def raw_argument(handler: Any, name: str) -> str:
    """Return an argument as it was sent, "" without one; Flower's own method writes HTML entities into it."""
    return str(web.RequestHandler.get_argument(handler, name, ""))
