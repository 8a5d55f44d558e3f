"""Breakers in Flower: pages, the JSON API, who may do what, and input that means harm."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from celery import Celery
from celery.events.state import State
from prometheus_client import REGISTRY

from resilient_tasks import Breaker, BreakerPolicy, Resilience
from resilient_tasks.core.model import child_name
from resilient_tasks.errors import StoreError
from resilient_tasks.flower import flower_internals
from resilient_tasks.flower.application import FlowerWithBreakers, Receiver
from resilient_tasks.flower.service import Executor, NoAnswerError
from resilient_tasks.prometheus import register
from resilient_tasks.store.local import LocalStore
from resilient_tasks.testing import Clock
from tests.support.flower_site import flower_site
from workers.processes import wait_until

ANN = ("ann", "secret")
NASTY = "</td><script>alert(1)</script>\"'&\x1b[2J"

Serve = Callable[..., httpx.Client]


@pytest.fixture
def serve(app: Celery) -> Iterator[Serve]:
    """Serve Flower with some options; without others, as one in which ann has logged in."""
    with ExitStack() as sites:

        def serve(user: tuple[str, str] | None = ANN, **chosen: Any) -> httpx.Client:
            client = sites.enter_context(flower_site(app, **{"basic_auth": [":".join(ANN)], **chosen}))
            if user is not None:
                client.auth = user
            return client

        yield serve


@pytest.fixture
def site(serve: Serve, clock: Clock) -> httpx.Client:
    return serve()


# --- seeing --------------------------------------------------------------------------------------------


def test_the_api_shows_what_the_store_knows(site: httpx.Client, payments: Breaker) -> None:
    payments.trip(reason=NASTY, actor="ann@desk")
    wait_until(lambda: site.get("/api/breakers/payments").json()["breaker"]["state"] == "OPEN", timeout=60)
    everything = site.get("/api/breakers").json()
    assert everything["problem"] == ""
    assert everything["age"] < 60
    [listed] = everything["breakers"]
    assert (listed["name"], listed["state"], listed["retry_after"]) == ("payments", "OPEN", 10.0)
    assert (listed["reason"], listed["actor"]) == (NASTY, "ann@desk")
    assert site.get("/api/breakers/payments").json()["breaker"] == listed
    assert site.get("/breakers", params={"json": 1}).json()["breakers"] == [listed]
    assert site.get("/breakers/payments", params={"json": 1}).json()["breaker"] == listed


@pytest.mark.parametrize("address", ["/breakers", "/breakers/payments", "/workers"])
def test_every_page_leads_to_the_breakers(site: httpx.Client, address: str) -> None:
    if address == "/workers":
        address = "/broker/none"  # any page of Flower's own: an error page needs no worker
    page = site.get(address)
    assert 'href="/breakers"' in page.text
    assert page.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("name", ["gateway", "gateway:acme"])
def test_a_breakers_page_says_what_it_is_whom_to_call_and_what_uses_it(
    serve: Serve, app: Celery, resilience: Resilience, clock: Clock, name: str
) -> None:
    policy = BreakerPolicy(open_duration=7)
    runbook = "https://wiki.example/gateway?a=1&b=%22"
    resilience.breaker("gateway", policy, description=f"call Ann {NASTY}", runbook=runbook)

    @app.task(breaker="gateway", name="shop.pay")
    def pay() -> None: ...

    page = serve().get(f"/breakers/{name}").text
    assert "call Ann &lt;/td&gt;&lt;script&gt;" in page
    assert f'href="{runbook.replace("&", "&amp;")}"' in page
    assert "<dd>shop.pay</dd>" in page
    assert "<dt>open_duration</dt><dd>7</dd>" in page
    assert "<script>alert" not in page


def test_durations_are_those_of_runs_that_succeeded_lately() -> None:
    flower = SimpleNamespace(events=SimpleNamespace(state=State()))
    for clock, (at, runtime) in enumerate([(100.0, 9.0), *((1000.0, float(number)) for number in range(100))]):
        event = {"hostname": "w@h", "uuid": str(clock), "timestamp": at, "local_received": at, "clock": clock}
        flower.events.state.event({**event, "type": "task-received", "name": "shop.pay"})
        flower.events.state.event({**event, "type": "task-succeeded", "runtime": runtime})
    assert flower_internals.run_times(flower, ["shop.pay"], 900) == {"runs": 100, "p50": 50, "p95": 95}
    assert flower_internals.run_times(flower, ["shop.other"], 900) == {"runs": 0}


def test_how_long_a_breakers_tasks_run_is_what_flower_knows_of_each_of_them(
    app: Celery, serve: Serve, resilience: Resilience, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowerWithBreakers, "purge_offline_worker_metrics", lambda _: None)
    resilience.breaker("gateway")
    runtime = flower_internals.events.get_prometheus_metrics().runtime
    for name in ("pay", "refund"):

        @app.task(breaker="gateway", name=f"shop.{name}")
        def task() -> None: ...

        runtime.labels("w@h", f"shop.{name}").observe(0.3)
    runtime.labels("other@h", "shop.pay").observe(7)
    runtime.labels("w@h", "shop.unguarded").observe(7)
    text = serve().get("/metrics").text
    name = "celery_breaker_task_runtime_seconds"
    assert f'{name}_count{{breaker="gateway",worker="w@h"}} 2.0\n' in text
    assert f'{name}_sum{{breaker="gateway",worker="w@h"}} 0.6\n' in text
    assert f'{name}_bucket{{breaker="gateway",le="0.25",worker="w@h"}} 0.0\n' in text
    assert f'{name}_bucket{{breaker="gateway",le="0.5",worker="w@h"}} 2.0\n' in text
    assert f'{name}_count{{breaker="gateway",worker="other@h"}} 1.0\n' in text
    runtime.clear()


def test_pages_let_only_our_own_scripts_run(site: httpx.Client) -> None:
    page = site.get("/breakers/payments")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "<script>" not in page.text
    for script in ("list.js", "one.js", "outages.js", "common.js", "elements.js", "chart.js", "breakers.css"):
        assert site.get(f"/breakers-static/{script}").status_code == 200


def test_a_store_that_is_away_is_reported_and_what_it_said_is_shown(
    serve: Serve, resilience: Resilience, payments: Breaker
) -> None:
    store = _Frozen()
    resilience.use_store(store)
    site = serve()
    assert store.was_read.wait(60), "Flower reads although no page is open"
    store.frozen = True
    answers = [site.get("/api/breakers").json() for _ in range(2)]
    assert [answer["breakers"][0]["state"] for answer in answers] == ["CLOSED"] * 2
    site.get("/healthcheck").raise_for_status()
    store.thawed.set()


class _Frozen(LocalStore):
    """A store that answers nothing once it is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = False
        self.thawed, self.was_read = threading.Event(), threading.Event()

    def _thaw(self) -> None:
        if self.frozen:
            self.thawed.wait(60)
            raise StoreError("the store was frozen")

    def read(self, specs: Any) -> Any:
        self._thaw()
        snapshots = super().read(specs)
        self.was_read.set()
        return snapshots

    def command(self, *args: Any, **kwargs: Any) -> Any:
        self._thaw()
        return super().command(*args, **kwargs)


@pytest.mark.parametrize("prefix", ["", "/tasks"])
def test_flowers_metrics_are_followed_by_ours(
    serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setattr(FlowerWithBreakers, "purge_offline_worker_metrics", lambda _: None)
    text = serve(url_prefix=prefix).get(f"{prefix}/metrics").text
    assert text.startswith("# HELP python_gc_objects_collected_total ")
    assert text.count("\ncelery_breaker_up 0.0\n") == 1  # one in memory keeps no history


def test_breakers_that_are_registered_already_are_not_shown_twice(
    app: Celery, serve: Serve, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FlowerWithBreakers, "purge_offline_worker_metrics", lambda _: None)
    collector = register(app)
    try:
        assert serve().get("/metrics").text.count("\ncelery_breaker_up ") == 1
    finally:
        REGISTRY.unregister(collector)


def test_a_store_that_keeps_no_history_is_an_error(site: httpx.Client) -> None:
    for address in ("/outages", "/breakers/payments/history"):
        answer = site.get(address)
        assert (answer.status_code, "keeps no history" in answer.text) == (503, True)
    assert site.get("/outages?breaker=unknown").status_code == 404


def test_a_store_that_was_never_there_is_no_empty_table(
    serve: Serve, resilience: Resilience, payments: Breaker
) -> None:
    store = _Frozen()
    store.frozen = True
    store.thawed.set()
    resilience.use_store(store)
    site = serve()
    answer = site.get("/api/breakers")
    assert (answer.status_code, answer.json()) == (503, {"error": "the store was frozen"})
    assert site.get("/breakers").status_code == 200
    seen = site.get("/breakers", params={"json": 1}).json()
    assert (seen["breakers"], seen["read_at"], seen["problem"]) == ([], None, "the store was frozen")
    verb = site.post("/api/breakers/payments/trip")
    assert (verb.status_code, verb.json()) == (503, {"error": "the store was frozen"})


# --- steering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "state"),
    [("trip", "OPEN"), ("isolate", "FORCED_OPEN"), ("disable", "DISABLED"), ("shadow", "SHADOW"), ("reset", "CLOSED")],
)
def test_a_verb_is_carried_out_in_the_users_name(site: httpx.Client, payments: Breaker, verb: str, state: str) -> None:
    payments.isolate() if verb == "reset" else None
    answer = site.post(f"/api/breakers/payments/{verb}", json={"reason": NASTY})
    assert answer.json()["breaker"]["state"] == state
    snapshot = payments.snapshot()
    assert (str(snapshot.state), snapshot.actor) == (state, "ann")
    assert "<script>alert(1)</script>" in snapshot.reason
    assert site.get("/api/breakers/payments").json()["breaker"]["state"] == state


@pytest.mark.parametrize("key", ["acme", "a b/<script>alert(1)</script>", "naïve ☃"])
def test_a_child_is_a_breaker_like_any_other(site: httpx.Client, payments: Breaker, key: str) -> None:
    name = child_name("payments", key)
    address = f"/api/breakers/{quote(name, safe='')}"
    assert site.get(address).json()["breaker"]["state"] == "CLOSED"
    assert site.post(f"{address}/isolate", json={"reason": "test"}).json()["breaker"]["name"] == name
    states = {each["name"]: each["state"] for each in site.get("/api/breakers").json()["breakers"]}
    assert states == {"payments": "CLOSED", name: "FORCED_OPEN"}
    assert site.get(f"/breakers/{quote(name, safe='')}").status_code == 200
    assert "<script>alert" not in site.get(f"/breakers/{quote(name, safe='')}").text


@pytest.mark.parametrize(
    "name", ["payments:", "payments:a b", "payments:a:b", "payments:{x}", "unknown:acme", ":", ":x"]
)
def test_a_child_that_cannot_be_is_unknown(site: httpx.Client, name: str) -> None:
    assert site.get(f"/api/breakers/{quote(name, safe='')}").status_code == 404


def test_a_reason_may_come_as_a_form(site: httpx.Client, payments: Breaker) -> None:
    site.post("/api/breakers/payments/isolate", data={"reason": "<b> & co"}).raise_for_status()
    assert payments.snapshot().reason == "<b> & co"


def test_the_workers_policy_stays(site: httpx.Client, payments: Breaker, resilience: Resilience) -> None:
    site.post("/api/breakers/payments/trip").raise_for_status()
    assert payments.snapshot().retry_after == 10.0


# --- who may -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["/breakers", "/breakers/payments", "/breakers/payments/dead", "/api/breakers"])
@pytest.mark.parametrize("auth", [None, ("ann", "wrong")])
def test_nothing_is_shown_without_logging_in(
    serve: Serve, clock: Clock, address: str, auth: tuple[str, str] | None
) -> None:
    answer = serve(auth).get(address)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")
    assert "payments" not in answer.text


def test_without_any_login_the_api_is_closed_as_flowers_own_is(serve: Serve, payments: Breaker, clock: Clock) -> None:
    site = serve(None, basic_auth=None)
    assert site.get("/breakers").status_code == 200
    assert 'data-allowed="0"' in site.get("/breakers").text
    for answer in (site.get("/api/breakers"), site.post("/api/breakers/payments/trip")):
        assert answer.status_code == 401
        assert "FLOWER_UNAUTHENTICATED_API" in answer.json()["error"]
    assert str(payments.snapshot().state) == "CLOSED"


def test_an_api_that_is_open_to_all_still_knows_other_sites(
    serve: Serve, payments: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_UNAUTHENTICATED_API", "true")
    site = serve(None, basic_auth=None)
    foreign = site.post("/api/breakers/payments/trip", headers={"Origin": "https://evil.example"})
    assert foreign.status_code == 403
    site.post("/api/breakers/payments/trip", headers={"Origin": str(site.base_url).rstrip("/")}).raise_for_status()
    assert (payments.snapshot().actor, str(payments.snapshot().state)) == ("flower", "OPEN")


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"},
     {"Origin": "null"}],
)  # fmt: skip
def test_other_sites_may_not_act_in_the_users_name(
    site: httpx.Client, payments: Breaker, headers: dict[str, str]
) -> None:
    answer = site.post("/api/breakers/payments/trip", headers=headers)
    assert answer.status_code == 403
    assert "error" in answer.json()
    assert str(payments.snapshot().state) == "CLOSED"


def test_a_session_by_cookie_needs_its_token(serve: Serve, payments: Breaker, clock: Clock) -> None:
    site = serve(None, basic_auth=None, auth=".*@example.com")
    assert site.post("/api/breakers/payments/trip").status_code in {401, 403}  # Flower 2.1 knows no such token
    assert site.get("/api/breakers").status_code == 401
    login = site.get("/breakers")
    assert (login.status_code, login.headers["location"].startswith("/login")) == (302, True)


def test_nothing_is_done_in_a_flower_that_is_read_only(serve: Serve, payments: Breaker, clock: Clock) -> None:
    site = serve(read_only=True)
    answer = site.post("/api/breakers/payments/trip")
    assert (answer.status_code, answer.json()["error"]) == (403, "Flower is read-only")
    assert site.post("/api/breakers/payments/dead/drop", json={"id": "a"}).status_code == 403
    assert site.get("/api/breakers").status_code == 200
    assert 'data-allowed="0"' in site.get("/breakers").text
    assert str(payments.snapshot().state) == "CLOSED"


def test_everything_is_below_the_prefix(serve: Serve, payments: Breaker, clock: Clock) -> None:
    site = serve(url_prefix="ops")
    page = site.get("/ops/breakers").text
    assert 'href="/ops/breakers"' in page
    assert 'src="/ops/breakers-static/list.js"' in page
    assert site.get("/ops/breakers-static/list.js").status_code == 200
    assert site.post("/ops/api/breakers/payments/trip").status_code == 200
    assert site.get("/breakers").status_code == 404


# --- bad input -----------------------------------------------------------------------------------------


def test_an_unknown_breaker_is_an_error_with_the_nearest_name(site: httpx.Client) -> None:
    answer = site.get("/api/breakers/paymnets")
    assert answer.status_code == 404
    assert answer.json() == {"error": "no breaker is named 'paymnets'; did you mean 'payments'?"}
    assert site.get("/breakers/paymnets").status_code == 404
    assert site.post("/api/breakers/paymnets/trip").status_code == 404


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a b", "a/b", "naïve ☃", "%", "..", "%ff"])
def test_a_strange_name_is_only_a_name(site: httpx.Client, name: str) -> None:
    address = "".join(f"%{byte:02x}" for byte in name.encode())
    page = site.get(f"/breakers/{address}")
    assert page.status_code == 404
    assert "<script>alert" not in page.text
    assert site.get(f"/api/breakers/{address}").json()["error"].startswith(f"no breaker is named {name!r}")


@pytest.mark.parametrize(
    ("method", "address", "status"),
    [
        ("GET", "/api/breakers/payments/trip", 405),
        ("DELETE", "/api/breakers/payments", 405),
        ("POST", "/api/breakers", 405),
        ("POST", "/api/breakers/payments", 405),
        ("POST", "/api/breakers/payments/explode", 404),
        ("POST", "/api/breakers/payments/deferred/replay", 404),
        ("GET", "/api/breakers/%ff", 400),
    ],
)
def test_what_cannot_be_asked_is_answered_in_json(site: httpx.Client, method: str, address: str, status: int) -> None:
    answer = site.request(method, address)
    assert answer.status_code == status
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "rate", [-1, 0, 1e-9, "nan", "inf", 1e300, pytest.param(10**400, id="huge"), "fast", True, [1]]
)
def test_an_absurd_rate_is_refused(site: httpx.Client, rate: Any) -> None:
    answer = site.post("/api/breakers/payments/resume", json={"rate": rate})
    assert answer.status_code == 400
    assert "allowed is a number of tasks per second from 0.01 to 100,000" in answer.json()["error"]


@pytest.mark.parametrize("body", ["[]", "invalid", '"text"', "\xff", pytest.param("[" * 100_000, id="deep")])
def test_a_body_that_is_no_object_is_refused(site: httpx.Client, payments: Breaker, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    answer = site.post("/api/breakers/payments/trip", content=body.encode("latin1"), headers=headers)
    assert (answer.status_code, answer.json()) == (400, {"error": "the body is no JSON object"})
    assert str(payments.snapshot().state) == "CLOSED"


def test_a_reason_that_is_no_text_is_refused(site: httpx.Client) -> None:
    answer = site.post("/api/breakers/payments/trip", json={"reason": {"a": 1}})
    assert (answer.status_code, answer.json()["error"]) == (400, "reason={'a': 1}: allowed is a text")


@pytest.mark.parametrize("ids", [None, "", [], [1], {"a": 1}, [""]])
def test_tasks_are_named_by_their_ids(site: httpx.Client, ids: Any) -> None:
    answer = site.post("/api/breakers/payments/dead/drop", content=json.dumps({"id": ids}),
                       headers={"Content-Type": "application/json"})  # fmt: skip
    assert answer.status_code == 400
    assert "allowed are ids of tasks" in answer.json()["error"]


# --- events ----------------------------------------------------------------------------------------------

EVENT = {
    "type": "task-deferred",
    "hostname": "w@h",
    "uuid": "1",
    "timestamp": 1e9,
    "clock": 5,
    "utcoffset": 0,
    "pid": 1,
}


@pytest.mark.parametrize(
    "invalid",
    [
        None, 5, "text", {}, {"type": "task-deferred"}, {**EVENT, "type": 5}, {**EVENT, "hostname": ["h"]},
        {**EVENT, "uuid": {"a": 1}}, {**EVENT, "clock": "soon"}, {**EVENT, "clock": None},
        {**EVENT, "timestamp": 1e300}, {**EVENT, "timestamp": float("nan")}, {**EVENT, "utcoffset": "x"},
        {**EVENT, "name": [1]}, {**EVENT, "args": {}},
    ],
)  # fmt: skip
def test_flower_receives_no_invalid_events(invalid: Any, caplog: pytest.LogCaptureFixture) -> None:
    received: list[dict[str, Any]] = []
    app = Celery("app", broker="memory://", set_as_current=False)
    with app.connection() as connection:
        receiver = Receiver(connection, handlers={"*": received.append}, app=app)
        for body in (invalid, [dict(EVENT), invalid, dict(EVENT)]):
            receiver._receive(body, None)
    assert [event["uuid"] for event in received] == ["1", "1"]
    assert caplog.text.count("an event is invalid") == 2


def test_a_request_to_a_broker_that_still_owes_an_answer_is_answered_at_once() -> None:
    executor, asked, answers = Executor("broker"), threading.Event(), threading.Event()

    def ask() -> bool:
        asked.set()
        return answers.wait(60)

    async def both() -> None:
        first = asyncio.ensure_future(executor.submit(ask, timeout=60))
        await asyncio.to_thread(asked.wait)
        with pytest.raises(NoAnswerError, match="the broker has not answered for 0 s"):
            await executor.submit(ask, timeout=0)
        answers.set()
        assert await first

    asyncio.run(both())
