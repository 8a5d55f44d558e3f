"""What Flower's pages and its JSON API have in common: who may, what was asked, and what could not be done."""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.client import responses
from typing import Any

from tornado import web

from resilient_tasks.errors import BreakerOpenError, DeadLetterError, StoreError
from resilient_tasks.flower import seams
from resilient_tasks.flower.desk import Desk
from resilient_tasks.flower.errands import NoAnswerError

logger = logging.getLogger("resilient_tasks")

#: Fewest and most tasks per second that may be asked for.
SLOWEST, FASTEST = 0.01, 100_000.0

# nothing that somebody has written into a name, an argument or a reason runs as a script, whatever else fails
_SAFE = "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"


class Page(seams.BaseHandler):
    """A page in Flower's navigation, behind Flower's login."""

    def initialize(self, desk: Desk) -> None:
        """Remember who knows all about breakers."""
        self.desk = desk

    def set_default_headers(self) -> None:
        """Let the browser run our own scripts only."""
        super().set_default_headers()
        self.set_header("Content-Security-Policy", _SAFE)


class Api(seams.BaseApiHandler):
    """A part of the JSON API: under the rules of Flower's own, and none but people on our own pages may write."""

    def initialize(self, desk: Desk) -> None:
        """Remember who knows all about breakers."""
        self.desk = desk

    def prepare(self) -> None:
        """Find out whether the user may do that."""
        super().prepare()
        if not self.current_user:
            raise web.HTTPError(HTTPStatus.UNAUTHORIZED, "log in first")
        if self.request.method == "POST":
            if seams.is_foreign(self):
                raise web.HTTPError(HTTPStatus.FORBIDDEN, "requests from other sites are refused")
            if seams.is_read_only(self):
                raise web.HTTPError(HTTPStatus.FORBIDDEN, "Flower is read-only")

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Say what is wrong as JSON."""
        if status_code == HTTPStatus.UNAUTHORIZED and self.application.options.basic_auth:
            self.set_header("WWW-Authenticate", 'Basic realm="flower"')
        error = kwargs.get("exc_info", (None, None, None))[1]
        said = error.log_message % error.args if isinstance(error, web.HTTPError) and error.log_message else None
        self.finish({"error": said or responses.get(status_code, "error")})

    @property
    def words(self) -> dict[str, Any]:
        """What was sent, as a form or as a JSON object."""
        if self.request.headers.get("Content-Type", "").startswith("application/json"):
            return _object(self.request.body)
        return {name: seams.raw_argument(self, name) for name in self.request.arguments}

    @property
    def reason(self) -> str:
        """Why, as somebody has put it."""
        reason = self.words.get("reason") or ""
        if not isinstance(reason, str):
            raise web.HTTPError(HTTPStatus.BAD_REQUEST, f"reason={reason!r}: allowed is a text")
        return reason

    @property
    def rate(self) -> float | None:
        """Tasks per second; None if nobody has said."""
        asked = self.words.get("rate")
        if asked in (None, ""):
            return None
        try:
            rate = math.nan if isinstance(asked, bool) else float(asked)
        except (TypeError, ValueError, OverflowError):
            rate = math.nan
        if SLOWEST <= rate <= FASTEST:
            return rate
        allowed = f"a number of tasks per second from {SLOWEST:g} to {FASTEST:,.0f}"
        raise web.HTTPError(HTTPStatus.BAD_REQUEST, f"rate={asked!r}: allowed is {allowed}")

    @property
    def task_ids(self) -> list[str]:
        """Which tasks: one ``id``, or several, divided by commas or as a JSON array."""
        asked = self.words.get("id")
        ids = asked.split(",") if isinstance(asked, str) else asked
        if not ids or not isinstance(ids, list) or not all(isinstance(each, str) and each for each in ids):
            raise web.HTTPError(HTTPStatus.BAD_REQUEST, f"id={asked!r}: allowed are ids of tasks")
        return ids


def check_defined(desk: Desk, name: str) -> None:
    """Fail with the nearest name if there is no breaker of this one."""
    if not desk.defines(name):
        near = difflib.get_close_matches(name, desk.names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise web.HTTPError(HTTPStatus.NOT_FOUND, f"no breaker is named {name!r}{hint}")


async def look_at(desk: Desk, name: str) -> dict[str, Any]:
    """Return what a page and the API tell of one breaker, and how new that is."""
    look = await desk.watch.look()
    told = look.breakers.get(name)
    if told is None and look.read_at is not None:
        with failures_told(desk):
            told = await desk.read(name)
    return {"breaker": told, **look.freshness()}


@contextmanager
def failures_told(desk: Desk) -> Iterator[None]:
    """Turn what could not be done into an answer for whoever asked."""
    try:
        yield
    except BreakerOpenError as error:
        advice = "its tasks would be deferred again; reset it first"
        raise web.HTTPError(HTTPStatus.CONFLICT, f"{error}: {advice}") from error
    except DeadLetterError as error:
        raise web.HTTPError(HTTPStatus.NOT_FOUND, str(error)) from error
    except (StoreError, NoAnswerError) as error:
        raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    except desk.broker_errors as error:
        logger.warning("the broker is away: %s", error)
        said = f"the broker is away: {type(error).__name__}"  # its text may hold more than everybody should see
        raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, said) from error


def _object(body: bytes) -> dict[str, Any]:
    try:
        sent = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        sent = None
    if isinstance(sent, dict):
        return sent
    raise web.HTTPError(HTTPStatus.BAD_REQUEST, "the body is no JSON object")
