"""The flaky HTTP service: what a caller sees in each health, and what the service counts."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest

from workers.service import running_service

FREE_PORTS = {"admin": 0, "payments": 0, "accounts": 0, "mail": 0}


class Caller:
    """A client of the running service."""

    def __init__(self, ports: dict[str, int], http: httpx.AsyncClient) -> None:
        self.http = http
        self._ports = ports

    def url(self, name: str, path: str) -> str:
        return f"http://127.0.0.1:{self._ports[name]}{path}"

    async def charge(self, order_id: int, timeout: float = 60) -> httpx.Response:
        return await self.http.post(self.url("payments", f"/payments/charges/{order_id}"), timeout=timeout)

    async def make(self, **change: Any) -> httpx.Response:
        return await self.http.put(self.url("admin", "/payments"), json=change)

    async def stats(self) -> dict[str, Any]:
        response = await self.http.get(self.url("admin", "/stats"))
        figures: dict[str, Any] = response.json()["dependencies"]["payments"]
        return figures

    async def stats_when(self, key: str, value: object) -> dict[str, Any]:
        async def poll() -> dict[str, Any]:
            while (figures := await self.stats())[key] != value:
                pass  # the request itself gives way to the others
            return figures

        return await asyncio.wait_for(poll(), timeout=60)


def with_service(scenario: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a test with a service and its caller, the first of its arguments."""

    def test(**given: Any) -> None:
        async def run() -> None:
            async with running_service("127.0.0.1", FREE_PORTS) as ports, httpx.AsyncClient() as http:
                await scenario(Caller(ports, http), **given)

        asyncio.run(run())

    _, *others = inspect.signature(scenario).parameters.values()
    vars(test)["__signature__"] = inspect.Signature(others)
    return test


@with_service
async def test_answers_and_counts_while_up(caller: Caller) -> None:
    answer = await caller.charge(42)
    assert (answer.status_code, answer.json()["id"]) == (200, "42")
    figures = await caller.stats()
    assert (figures["calls"], figures["served"], figures["unique"]) == ({"up": 1}, 1, 1)
    assert figures["arrivals_while_failing"] == []


@with_service
async def test_an_id_served_twice_is_seen(caller: Caller) -> None:
    for order_id in (1, 2, 1):
        await caller.charge(order_id)
    assert (await caller.stats())["repeated"] == {"1": 2}


@with_service
async def test_5xx_answers_503_and_serves_nothing(caller: Caller) -> None:
    await caller.make(health="5xx")
    assert (await caller.charge(1)).status_code == 503
    figures = await caller.stats()
    assert (figures["calls"], figures["served"]) == ({"5xx": 1}, 0)
    assert len(figures["arrivals_while_failing"]) == 1


@with_service
async def test_hang_says_nothing_until_the_caller_gives_up(caller: Caller) -> None:
    await caller.make(health="hang")
    call = asyncio.create_task(caller.charge(1))
    await caller.stats_when("in_flight", 1)
    assert not call.done()
    call.cancel()
    figures = await caller.stats_when("in_flight", 0)
    assert (figures["calls"], figures["most_in_flight"]) == ({"hang": 1}, 1)


@with_service
async def test_refuse_refuses_old_and_new_connections_and_heals(caller: Caller) -> None:
    await caller.charge(1)  # leaves a connection open for reuse
    await caller.make(health="refuse")
    for order_id in (2, 3):
        with pytest.raises(httpx.ConnectError):
            await caller.charge(order_id)
    await caller.make(health="up")
    assert (await caller.charge(4)).status_code == 200
    assert (await caller.stats())["calls"] == {"up": 2}


@with_service
async def test_more_calls_than_it_can_bear_are_denied_at_once(caller: Caller) -> None:
    await caller.make(latency=2, capacity=2)
    answers = await asyncio.gather(*map(caller.charge, range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503, 503]


@with_service
async def test_health_checks_are_counted_separately(caller: Caller) -> None:
    await caller.http.get(caller.url("payments", "/payments/health"))
    figures = await caller.stats()
    assert (figures["probes"], figures["calls"], figures["served"]) == ({"up": 1}, {}, 0)


@pytest.mark.parametrize("change", [{"health": "sick"}, {"latency": "long"}, {"capacity": "high"}])
@with_service
async def test_a_wrong_change_is_answered_with_what_is_allowed(caller: Caller, change: dict[str, str]) -> None:
    answer = await caller.make(**change)
    assert answer.status_code == 400
    assert "up, 5xx, slow, hang, refuse" in answer.json()["error"]
    assert (await caller.stats())["health"] == "up"


@with_service
async def test_an_unknown_dependency_is_answered_with_those_there_are(caller: Caller) -> None:
    answer = await caller.http.put(caller.url("admin", "/fax"), json={})
    assert answer.status_code == 404
    assert "payments, accounts, mail" in answer.json()["error"]
