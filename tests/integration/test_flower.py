"""Breakers in a real Flower, beside stock Flower: states of tasks, verbs, dead letters, a restart in mid-outage."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from resilient_tasks.flower import service
from resilient_tasks.worker.envelope import Envelope
from tests.integration.conftest import MODULE, NEVER_LATE, TIMEOUT, Shop
from tests.integration.test_bad_messages import message
from tests.support.browser import Browser, chromium_binary
from tests.support.flower_site import flower_site
from workers.processes import LOCALHOST, PROJECT, Program, celery_command, free_port, start_program, wait_until

ANN = ("ann", "secret")
DOCS = Path(__file__).parents[2] / "docs" / "flower.md"
NASTY = "</td><img src=x onerror=alert(1)><script>alert(2)</script>"


class Site:
    """A running Flower."""

    def __init__(self, program: Program, url: str) -> None:
        self.program = program
        self.url = url
        self.client = httpx.Client(base_url=url, auth=ANN, timeout=TIMEOUT)

    def get(self, address: str) -> Any:
        """Return what an address answers as JSON, as soon as it does: the machine may stop it for a moment."""

        def answers() -> list[Any]:
            response = self.client.get(address)
            return [] if response.status_code == httpx.codes.SERVICE_UNAVAILABLE else [response.raise_for_status()]

        return wait_until(answers, timeout=TIMEOUT, what=f"an answer to {address}")[0].json()

    def post(self, address: str, **fields: Any) -> httpx.Response:
        """Send fields to an address."""
        return self.client.post(address, json=fields)

    def count(self, state: str, ids: list[str]) -> int:
        """Return how many tasks Flower shows in a state."""
        return len(set(ids) & set(self.get(f"/api/tasks?state={state}")))

    def stop(self) -> None:
        """Stop it."""
        self.client.close()
        self.program.stop()


def start_flower(shop: Shop, directory: Path, *command: str) -> Site:
    """Start a Flower in a directory and wait until it listens to events."""
    port = free_port()
    arguments = celery_command(MODULE, *command, f"--address={LOCALHOST}", f"--port={port}", "--basic-auth=ann:secret")
    soon = {"RESILIENT_TASKS_STORE_TIMEOUT": "3"}  # a store that is frozen is noticed
    environment = {**shop.env, **soon, "PYTHONPATH": str(PROJECT)}
    program = start_program(arguments, name=f"flower{port}", directory=directory, env=environment, cwd=directory)
    site = Site(program, f"http://{LOCALHOST}:{port}")
    program.wait_ready(lambda: _answers(site), timeout=TIMEOUT)
    with shop.app.connection_for_write() as connection, shop.app.events.Dispatcher(connection) as dispatcher:

        def has_received() -> bool:
            dispatcher.send("task-received", uuid=site.url, name="test")
            return site.count("RECEIVED", [site.url]) == 1

        program.wait_ready(has_received, timeout=TIMEOUT)
    return site


def _answers(site: Site) -> bool:
    try:
        return site.client.get("/healthcheck").is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def ours(_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = start_flower(_shop, tmp_path_factory.mktemp("flower"), "breakers", "flower")
    yield site
    site.stop()


def add_messages(shop: Shop, queue: str, envelope: Envelope, *ids: str) -> None:
    """Put messages with such an envelope into a queue of payments, the first of them at its head."""
    messages = [message(id=task_id, argsrepr=f"({NASTY!r},)", **envelope.write({})) for task_id in ids]
    shop.broker.lpush(f"resilient.{queue}.payments", *messages)


WAITING = Envelope(breaker="payments", origin="celery", since=1.0, reason=NASTY)


# --- states of tasks -----------------------------------------------------------------------------------


def test_the_states_of_tasks_are_right_at_every_step_in_stock_flower_and_in_ours(
    shop: Shop, ours: Site, tmp_path: Path
) -> None:
    plain = start_flower(shop, tmp_path, "flower")

    def both(ids: list[str], state: str) -> None:
        for site in (plain, ours):
            shop.wait(lambda: site.count(state, ids) == len(ids), f"all to be {state}")  # noqa: B023 - called here

    try:
        shop.worker(env=NEVER_LATE)  # a call that hangs would leave no slot to those of its breaker
        shop.set_health("slow", "hang")
        shop.open("payments")
        burst = [shop.charge.delay(order) for order in range(400)]
        long, revoked = shop.charge.delay(1, dependency="slow"), shop.charge.delay(2)
        shop.wait(lambda: shop.waiting("payments") == 402, "all to wait")
        both([task.id for task in (*burst, long, revoked)], "DEFERRED")
        expired, dead = shop.charge.apply_async((3,), expires=1), shop.urgent.delay()
        shop.app.control.revoke(revoked.id)
        both([revoked.id, expired.id], "REVOKED")
        both([dead.id], "FAILURE")
        shop.close("payments")
        shop.wait_done(*burst)
        both([task.id for task in burst], "SUCCESS")
        both([long.id], "STARTED")
        shop.set_health("slow", "up")
        both([long.id], "SUCCESS")
        durations = ours.get("/breakers/payments/history")["durations"]
        assert durations["runs"] >= 401
        assert durations["p50"] <= durations["p95"]
        runs = re.findall(r'\ncelery_breaker_task_runtime_seconds_count\{breaker="payments",.*\} (\d+)', metrics(ours))
        assert sum(map(int, runs)) >= 401
    finally:
        plain.stop()


def test_prometheus_gets_metrics_of_breakers_behind_those_of_flower(shop: Shop, ours: Site) -> None:
    shop.wait(lambda: "\ncelery_breaker_up 1.0\n" in metrics(ours), "the store to be read")
    assert '\ncelery_breaker_state{breaker="payments",state="CLOSED"} 1.0\n' in metrics(ours)
    assert "\nflower_events_total" in metrics(ours) or "# HELP flower_events_total " in metrics(ours)


def metrics(site: Site) -> str:
    """Return what Prometheus would read."""
    return site.client.get("/metrics").raise_for_status().text


def test_invalid_events_do_not_stop_others(shop: Shop, ours: Site) -> None:
    with shop.app.connection_for_write() as connection:
        events = shop.app.events.Dispatcher(connection, hostname="worker@somewhere")
        invalid: list[Any] = [
            {},
            [],
            5,
            {"type": "task-deferred", "uuid": [1]},
            {"type": "worker-online", "clock": "x"},
        ]
        for event in invalid:
            events.producer.publish(event, routing_key="task.deferred", exchange=events.exchange.name)
        events.send("task-received", uuid="valid", name="shop.charge", args="()", kwargs="{}")
        events.send("task-deferred", uuid="valid")
    shop.wait(lambda: ours.count("DEFERRED", ["valid"]) == 1, "the event after them to be received")


# --- steering ------------------------------------------------------------------------------------------


def test_deferred_and_dead_tasks_are_listed_resumed_dropped_and_replayed(shop: Shop, ours: Site) -> None:
    add_messages(shop, "deferred", WAITING, *"abc")
    add_messages(shop, "dead", WAITING.dead_letter(2.0, "made up"), *"xyz")
    waiting = ours.get("/breakers/payments/deferred")
    assert (waiting["count"], [task["task_id"] for task in waiting["tasks"]]) == (3, ["a", "b", "c"])
    assert waiting["tasks"][0]["args"] == f"({NASTY!r},)"
    found = ours.get("/breakers/payments/dead?search=MADE+up")
    assert (found["count"], found["ids"], len(found["tasks"])) == (3, ["x", "y", "z"], 3)
    assert ours.get("/breakers/payments/dead?search=nothing+like+it")["ids"] == []
    assert ours.get("/breakers/payments/deferred?search=")["ids"] == ["a", "b", "c"]
    assert ours.get("/dead-letters")["payments"] == 3
    assert ours.post("/api/breakers/payments/deferred/drop", id="a").json() == {"done": ["a"]}
    assert ours.post("/api/breakers/payments/deferred/resume", id="b,unknown").json() == {"done": ["b"]}
    assert ours.post("/api/breakers/payments/resume").json() == {"resumed": 1}
    assert ours.post("/api/breakers/payments/dead/replay", id="x,y").json() == {"done": ["x", "y"]}
    missing = ours.post("/api/breakers/payments/dead/drop", id=["z", "unknown"])
    assert missing.status_code == 404
    assert "unknown" in missing.json()["error"]
    assert ours.get("/breakers/payments/dead") == {"count": 0, "tasks": []}
    assert shop.broker.llen("celery") == 4
    log = ours.get("/breakers/payments/history")["transitions"]
    assert {entry["actor"] for entry in log} == {"ann"}
    assert [entry["reason"] for entry in log] == [
        "1 dead letter dropped",
        "2 dead letters replayed",
        "1 task resumed",
        "1 task resumed",
        "1 task dropped",
    ]


def test_what_an_open_breaker_holds_is_not_resumed(shop: Shop, ours: Site) -> None:
    shop.open("payments")
    add_messages(shop, "deferred", WAITING, *"abc")
    refused = ours.post("/api/breakers/payments/resume")
    assert (refused.status_code, "would be deferred again" in refused.json()["error"]) == (409, True)
    shop.close("payments")
    assert ours.post("/api/breakers/payments/resume", rate=50).json() == {"resumed": 3}


def test_the_past_is_shown_with_reasons_and_who(shop: Shop, ours: Site) -> None:
    shop.payments.isolate(reason=NASTY, actor="ann@desk")
    with shop.accounts.guard():
        pass
    shop.close("payments")
    past = ours.get("/breakers/payments/history")
    assert [entry["state"] for entry in past["transitions"]] == ["CLOSED", "FORCED_OPEN"]
    assert (past["transitions"][1]["reason"], past["transitions"][1]["actor"]) == (NASTY, "ann@desk")
    assert past["state"] == "CLOSED"
    shop.wait(lambda: ours.get("/breakers/accounts/history")["minutes"], "a call to be counted")
    [minute] = ours.get("/breakers/accounts/history")["minutes"]
    assert (minute["SUCCESS"], minute["refused"]) == (1, 0)


def test_outages_are_shown_and_when_waiting_tasks_will_be_done(shop: Shop, ours: Site) -> None:
    shop.payments.isolate(reason=NASTY, actor="ann@desk")
    shop.resilience.fleet.ledger.add_deferred("payments", "a")
    shop.wait(lambda: ours.get("/api/breakers/payments")["breaker"]["estimate"], "an estimate")
    estimate = ours.get("/api/breakers/payments")["breaker"]["estimate"]
    assert (estimate["waiting"], estimate["done_in"]) == (1, None)
    page = ours.client.get("/outages", params={"breaker": "payments"}).text
    assert "ann@desk" in page
    assert "1 waiting, oldest" in page
    assert "&lt;script&gt;alert(2)" in page
    assert "<script>alert" not in page
    assert 'href="/breakers/payments"' in ours.client.get("/outages").text


def test_deferred_and_dead_letter_queues_are_on_flowers_broker_page(shop: Shop, ours: Site) -> None:
    add_messages(shop, "deferred", WAITING, *"abc")
    lengths = {queue["name"]: queue["messages"] for queue in ours.get("/api/queues/length")["active_queues"]}
    assert lengths["resilient.deferred.payments"] == 3
    assert lengths["resilient.dead.payments"] == 0
    assert "resilient.deferred.payments" in ours.client.get("/broker").text


def test_a_flower_killed_in_mid_outage_shows_when_it_is_back_what_has_happened_and_nothing_twice(
    shop: Shop, ours: Site, tmp_path: Path
) -> None:
    [line] = [line for line in DOCS.read_text().splitlines() if line.startswith("import ")]
    tmp_path.joinpath("flowerconfig.py").write_text(line)
    shop.worker()
    shop.tolerant.isolate(reason="maintenance", actor="ann@desk")
    tasks = [shop.antidote.delay() for _ in range(3)]
    shop.wait(lambda: shop.waiting("tolerant") == 3, "all to wait")
    killed = start_flower(shop, tmp_path, "flower")
    before = _shown(shop, killed)
    killed.program.kill()
    killed.client.close()
    tasks.append(shop.antidote.delay())
    shop.wait(lambda: shop.waiting("tolerant") == 4, "one more to wait")
    again = start_flower(shop, tmp_path, "flower")
    try:
        assert _shown(shop, again) == before
        for site in (again, ours):
            shop.wait(lambda: _counted(site)["deferred"] == 4, "all to be counted once")  # noqa: B023 - called here
        shop.close("tolerant")
        shop.wait_done(*tasks)
        shop.wait(lambda: again.count("SUCCESS", [task.id for task in tasks]) == 4, "all to have succeeded")
        for site in (again, ours):
            wanted = {"deferred": 4, "resumed": 4, "now": 0}
            shop.wait(lambda: _counted(site) == wanted, "the end to be counted once")  # noqa: B023 - called here
        log = again.get("/breakers/tolerant/history")["transitions"]
        assert [entry["state"] for entry in log] == ["CLOSED", "FORCED_OPEN"]
    finally:
        again.stop()


def _shown(shop: Shop, site: Site) -> tuple[Any, ...]:
    shop.wait(lambda: site.get("/api/breakers/tolerant")["breaker"]["state"] == "FORCED_OPEN", "Flower to read it")
    breaker = site.get("/api/breakers/tolerant")["breaker"]
    assert breaker["outage"]["opened"] == breaker["since"]
    return tuple(
        breaker[name] for name in ("state", "since", "epoch", "reason", "actor", "calls", "openings", "outage")
    )


def _counted(site: Site) -> dict[str, float]:
    """Return what Prometheus would count of a breaker that no other test uses: some is reported when a test is over."""
    lines = [line for line in site.client.get("/metrics").text.splitlines() if not line.startswith("#")]
    values = dict(line.rsplit(" ", 1) for line in lines)
    assert len(values) == len(lines), "a series is there twice"
    names = {"deferred": "deferrals_total", "resumed": "resumed_tasks_total", "now": "deferred_tasks"}
    return {key: float(values[f'celery_breaker_{name}{{breaker="tolerant"}}']) for key, name in names.items()}


def test_resuming_goes_on_at_the_rate_that_was_asked_for_last(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    add_messages(shop, "deferred", WAITING, *"abcd")
    with flower_site(shop.app, basic_auth=[":".join(ANN)]) as site:
        site.auth = ANN
        monkeypatch.setattr(service, "TIMEOUT", 0.1)
        slow = site.post("/api/breakers/payments/resume", json={"rate": 0.01})
        assert (slow.status_code, slow.json()) == (202, {"resumed": None})
        shop.wait(lambda: shop.waiting("payments") == 3, "the first to be resumed")
        monkeypatch.setattr(service, "TIMEOUT", TIMEOUT)
        assert site.post("/api/breakers/payments/resume").json() == {"resumed": 3}


# --- what people see -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(ours: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if chromium_binary() is None:
        pytest.skip("Chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    browser.log_in(*ANN)
    yield browser
    browser.close()


@pytest.fixture
def shots(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("screenshots")
    return lambda name: directory / f"{name}.png"


def see_on_all_screens(browser: Browser, shots: Callable[[str], Path], page: str, *, height: int = 1000) -> None:
    """Save a page as telephones and desktops show it, light and dark; nothing is cut or needs scrolling sideways."""
    for width in (390, 1400):
        with browser.as_wide_as(width):
            assert browser.run(f"document.documentElement.scrollWidth <= {width}")
            assert browser.run(CUT) == []
        for scheme in ("light", "dark"):
            browser.prefer(scheme)
            browser.wait(f"document.documentElement.dataset.bsTheme === '{scheme}'")
            browser.screenshot(shots(f"{page}-{width}-{scheme}"), width=width, height=height)


# texts that do not fit into their place, and are not shown beyond it
CUT = """[...document.querySelectorAll("#breakers-page *, #breaker-page *, #outages-page *")].filter((each) =>
    each.checkVisibility() && each.scrollWidth > each.clientWidth + 1 && each.tagName !== "INPUT"
    && ["hidden", "clip"].includes(getComputedStyle(each).overflowX) && !each.classList.contains("visually-hidden")
).map((each) => each.outerHTML.slice(0, 200))"""


@pytest.mark.chromium
def test_a_person_sees_what_is_open_and_isolates_a_breaker_by_click(
    shop: Shop, ours: Site, browser: Browser, shots: Callable[[str], Path]
) -> None:
    add_messages(shop, "deferred", WAITING, *"abc")
    add_messages(shop, "dead", WAITING.dead_letter(2.0, "made up"), *"xy")
    browser.open(f"{ours.url}/breakers")
    row = 'tr[data-breaker="payments"]'
    browser.wait(f"document.querySelector('{row}') && document.querySelector('#live-status').innerText === 'Live'")
    assert browser.text(".nav-link.active") == "Breakers"
    browser.click(f"{row} button")
    browser.wait("document.activeElement.id === 'act-reason'")
    browser.write(f"{NASTY} maintenance")
    assert browser.text("#act-go") == "Isolate payments"
    browser.click("#act-go")
    browser.wait(f"document.querySelector('{row} .reason').innerText.includes('(ann)')")
    assert f"{NASTY} maintenance (ann)" in browser.text(f"{row} .reason")
    assert "FORCED_OPEN" in browser.text(row)
    assert shop.payments.snapshot().actor == "ann"
    assert browser.text("#breakers-table tbody tr").startswith("payments")
    browser.wait(f"document.querySelector('{row} .text-end [href*=dead]')?.innerText === '2'")
    assert browser.text("#count-dead") == "2"
    see_on_all_screens(browser, shots, "breakers")
    assert browser.fits(480)
    browser.click('[data-column="name"] button')
    names = "[...document.querySelectorAll('#breakers-table tbody tr')].map((row) => row.dataset.breaker)"
    assert browser.run(names) == sorted(shop.resilience.breakers)
    browser.click('[data-column="name"] button')
    assert browser.run(names) == sorted(shop.resilience.breakers, reverse=True)
    shop.close("payments")
    browser.wait(f"document.querySelector('{row}').innerText.includes('CLOSED')")
    assert browser.complaints == []


# where the first calls of a breaker that is so old are in its chart, which may show an hour
LEFTMOST = """import("/breakers-static/chart.js").then(({{draw}}) => {{
    const svg = document.querySelector("#chart");
    draw(svg, {{minutes: [{{at: {at}, SUCCESS: 5}}], transitions: [], state: "CLOSED", now: 3610}});
    return Number(svg.querySelector(".bar-SUCCESS")?.getAttribute("x") ?? 0);
}})"""


@pytest.mark.chromium
def test_a_person_sees_one_breaker_and_drops_its_tasks_by_click(
    shop: Shop, ours: Site, browser: Browser, shots: Callable[[str], Path]
) -> None:
    add_messages(shop, "deferred", WAITING, "a", NASTY)
    add_messages(shop, "dead", WAITING.dead_letter(2.0, NASTY), *"xyz")
    shop.open("payments")
    browser.open(f"{ours.url}/breakers/payments#deferred")
    browser.wait("document.querySelectorAll('#dead tbody tr').length === 3")
    browser.wait("document.querySelectorAll('#deferred tbody tr').length === 2")
    assert NASTY in browser.text("#deferred tbody")
    browser.wait("document.querySelector('#state').innerText === 'FORCED_OPEN'")
    browser.wait("document.querySelector('#log tbody').innerText.includes('FORCED_OPEN')")
    browser.wait("document.querySelectorAll('#chart .band-FORCED_OPEN').length === 2")
    see_on_all_screens(browser, shots, "breaker", height=2200)
    assert browser.fits(480)
    offered = "[...document.querySelectorAll('.breaker-verbs button:not([hidden])')].map((each) => each.dataset.verb)"
    assert browser.run(offered) == ["trip", "disable", "shadow", "reset"]
    assert browser.run("getComputedStyle(document.querySelector('#deferred [data-verb=resume]')).display") == "none"
    assert browser.run(LEFTMOST.format(at=3480)) == browser.run(LEFTMOST.format(at=3120)) == 49
    assert browser.run(LEFTMOST.format(at=0)) < browser.run(LEFTMOST.format(at=60)) == 49
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", browser.text("#log time"))
    assert browser.run("document.querySelector('#log time').title").endswith(" UTC")
    browser.click('#dead tr[data-task="x"] [data-verb="replay"]')
    browser.wait("document.querySelectorAll('#dead tbody tr').length === 2")
    assert shop.broker.llen("celery") == 1
    assert browser.complaints == []


@pytest.mark.chromium
def test_a_person_finds_dead_letters_selects_them_all_and_drops_or_replays_them(
    shop: Shop, ours: Site, browser: Browser
) -> None:
    ids = [f"{number:03}" for number in range(450)]
    add_messages(shop, "dead", WAITING.dead_letter(2.0, "made up"), *ids)
    add_messages(shop, "dead", WAITING.dead_letter(2.0, "its worker was killed"), *"xyz")
    browser.open(f"{ours.url}/breakers/payments")
    browser.wait("document.querySelectorAll('#dead tbody tr').length === 100")
    assert browser.run("document.querySelector('#dead [data-bulk=drop]').disabled")
    browser.click("#dead [type=search]")
    browser.write("KILLED")
    browser.click("#dead [type=submit]")
    browser.wait("document.querySelectorAll('#dead tbody tr').length === 3")
    browser.click("#dead .all")
    assert browser.text("#dead [data-bulk=drop]") == "Drop 3 dead letters"
    browser.click("#dead [data-bulk=drop]")
    browser.wait("document.activeElement.id === 'sure-go'")
    assert browser.text("#sure-go") == "Drop 3 dead letters"
    browser.click("#sure-go")
    browser.wait("document.querySelector('#dead .task-count').innerText.startsWith('0 OF 450')")
    browser.wait("document.querySelector('.modal-backdrop') === null")
    browser.run("document.querySelector('#dead [type=search]').value = ''")
    browser.click("#dead [type=submit]")
    browser.wait("document.querySelectorAll('#dead tbody tr').length === 100")
    browser.click("#dead .all")
    browser.click("#dead .every")
    browser.wait("document.querySelector('#dead [data-bulk=replay]').innerText === 'Replay 450 dead letters'")
    browser.click("#dead [data-bulk=replay]")
    browser.wait("document.activeElement.id === 'sure-go'")
    browser.click("#sure-go")
    browser.wait("document.querySelector('#dead table').hidden")
    assert shop.broker.llen("celery") == 450
    assert shop.broker.llen("resilient.dead.payments") == 0
    assert browser.complaints == []


@pytest.mark.chromium
def test_a_person_reads_about_outages_what_has_happened_and_no_zeros(
    shop: Shop, ours: Site, browser: Browser, shots: Callable[[str], Path]
) -> None:
    shop.payments.isolate(reason=NASTY, actor="ann@desk")
    shop.close("payments")
    browser.open(f"{ours.url}/outages")
    browser.wait("document.querySelector('#outages-page time') !== null")
    assert NASTY in browser.text("#outages-page dl")
    assert browser.run(
        "[...document.querySelectorAll('#outages-page dd')].every((each) => !['0', '0 s'].includes(each.innerText))"
    )
    see_on_all_screens(browser, shots, "outages")
    assert browser.complaints == []


@pytest.mark.chromium
def test_a_person_sees_that_what_is_shown_is_old_while_the_store_is_frozen(
    shop: Shop, ours: Site, browser: Browser
) -> None:
    browser.open(f"{ours.url}/breakers")
    browser.wait("document.querySelector('#live-status').innerText === 'Live'")
    shop.server.program.freeze()
    try:
        browser.wait("document.querySelector('#live-status').innerText === 'Old'")
        browser.wait("document.querySelector('#old-data').innerText.includes('is unavailable')")
        assert ours.client.get("/healthcheck").text == "OK"
        assert browser.text("#breakers-table tbody tr")
        verb = ours.post("/api/breakers/payments/trip")
        assert (verb.status_code, "is unavailable" in verb.json()["error"]) == (503, True)
    finally:
        shop.server.program.thaw()
    browser.wait("document.querySelector('#live-status').innerText === 'Live'")
