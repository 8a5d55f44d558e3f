"""The JSON API: ``/api/breakers``, ``/api/breakers/NAME`` and what can be done to a breaker and its tasks."""

from __future__ import annotations

from http import HTTPStatus

from tornado import web

from resilient_tasks.core.model import Verb
from resilient_tasks.flower import seams
from resilient_tasks.flower.handlers import Api, check_defined, failures_told, look_at

RESUME = "resume"
NO_ANSWER = "the store does not answer"


class Breakers(Api):
    """``GET /api/breakers``."""

    async def get(self) -> None:
        """Return all breakers."""
        look = await self.desk.watch.look()
        if look.read_at is None:
            raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, look.problem or NO_ANSWER)
        self.set_header("Content-Type", "application/json; charset=UTF-8")
        self.write(look.as_json())


class Breaker(Api):
    """``GET /api/breakers/NAME``."""

    async def get(self, name: str) -> None:
        """Return one breaker."""
        check_defined(self.desk, name)
        told = await look_at(self.desk, name)
        if told["breaker"] is None:
            raise web.HTTPError(HTTPStatus.SERVICE_UNAVAILABLE, told["problem"] or NO_ANSWER)
        self.write(told)


class Steering(Api):
    """``POST /api/breakers/NAME/VERB``."""

    async def post(self, name: str, verb: str) -> None:
        """Carry out an operator's verb."""
        check_defined(self.desk, name)
        with failures_told(self.desk):
            if verb == RESUME:
                await self._resume(name)
            elif verb in set(Verb):
                self.write({"breaker": await self.desk.command(name, Verb(verb), self.reason, seams.user_of(self))})
            else:
                allowed = ", ".join([*map(str, Verb), RESUME])
                raise web.HTTPError(HTTPStatus.NOT_FOUND, f"no verb is {verb!r}; allowed are {allowed}")

    async def _resume(self, name: str) -> None:
        resumed = await self.desk.resume(name, self.rate, seams.user_of(self))
        if resumed is None:
            self.set_status(HTTPStatus.ACCEPTED)
        self.write({"resumed": resumed})


class Tasks(Api):
    """``POST /api/breakers/NAME/deferred/resume``, ``.../deferred/drop``, ``.../dead/replay`` and ``.../dead/drop``."""

    async def post(self, name: str, kind: str, verb: str) -> None:
        """Do something to the tasks whose ids are given."""
        check_defined(self.desk, name)
        deeds = {
            "deferred/resume": self.desk.resume_deferred,
            "deferred/drop": self.desk.drop_deferred,
            "dead/drop": self.desk.drop_dead,
            "dead/replay": self.desk.replay_dead,
        }
        deed = deeds.get(f"{kind}/{verb}")
        if deed is None:
            raise web.HTTPError(HTTPStatus.NOT_FOUND, f"no verb is {kind}/{verb}; allowed are {', '.join(deeds)}")
        with failures_told(self.desk):
            self.write({"done": await deed(name, self.task_ids, seams.user_of(self))})
