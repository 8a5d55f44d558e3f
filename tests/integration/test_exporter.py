"""``celery breakers exporter``, scraped by a test and by a real Prometheus, with the store there and away."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import redis
import yaml
from prometheus_client.parser import text_string_to_metric_families

from resilient_tasks import BreakerOpenError
from resilient_tasks.prometheus import HEALTH
from tests.integration.conftest import TIMEOUT, Shop
from tests.support.board import queries
from workers.processes import LOCALHOST, PROJECT, Server, celery_command, free_port

MONITORING = PROJECT / "resilient_tasks" / "monitoring"
SOON = {"RESILIENT_TASKS_STORE_TIMEOUT": "2"}  # a store that is frozen is noticed after so many seconds
Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        return str(response.read().decode())


def scrape(exporter: str) -> Values:
    """Return all values by name and labels."""
    families = text_string_to_metric_families(get(exporter))
    return {(each.name, frozenset(each.labels.items())): each.value for family in families for each in family.samples}


def value(scraped: Values, name: str, /, **labels: str) -> float | None:
    return scraped.get((f"celery_breaker_{name}", frozenset(labels.items())))


def scrape_until(shop: Shop, exporter: str, expected: float, name: str, /, **labels: str) -> Values:
    """Return the first scrape in which a value is as expected."""
    scrapes: list[Values] = []

    def is_there() -> bool:
        scrapes.append(scrape(exporter))
        return value(scrapes[-1], name, **labels) == expected

    shop.wait(is_there, f"{name} to be {expected}")
    return scrapes[-1]


@pytest.fixture
def store(shop: Shop) -> Server:
    """A store for the exporter alone, which a test may freeze."""
    return shop.server_of_its_own()


@pytest.fixture
def exporter(shop: Shop, store: Server) -> str:
    """URL of an exporter's metrics."""
    command = celery_command(shop.module, "breakers", "exporter", "--port", "0")  # on localhost
    program = shop.program(command, directory=PROJECT, env={"RESILIENT_TASKS_STORE_URL": store.url(), **SOON})
    program.wait_for_output("/metrics", timeout=TIMEOUT)
    [url] = re.findall(r"http://\S+/metrics", program.output())
    return str(url)


def make_history(shop: Shop, store: Server) -> None:
    """Let payments be called and refuse calls."""
    with shop.breaker_in(store) as payments:
        for _ in range(3):
            payments.call(print)
        payments.isolate(reason="test")
        with pytest.raises(BreakerOpenError):
            payments.call(print)


def test_a_scrape_shows_all_breakers_and_that_the_store_is_frozen(shop: Shop, store: Server, exporter: str) -> None:
    make_history(shop, store)
    scraped = scrape_until(shop, exporter, 1, "refusals_total", breaker="payments")
    assert value(scraped, "up") == 1
    assert value(scraped, "calls_total", breaker="payments", outcome="success") == 3
    assert value(scraped, "state", breaker="payments", state="FORCED_OPEN") == 1
    assert value(scraped, "transitions_total", breaker="payments", state="FORCED_OPEN") == 1
    assert value(scraped, "state", breaker="accounts", state="CLOSED") == 1
    assert value(scraped, "task_info", breaker="payments", name=f"{shop.module}.charge") == 1
    store.program.freeze()
    scraped = scrape_until(shop, exporter, 0, "up")
    assert {name for name, _ in scraped} == set(HEALTH)
    store.program.thaw()
    scraped = scrape_until(shop, exporter, 1, "up")
    assert value(scraped, "refusals_total", breaker="payments") == 1
    with redis.Redis.from_url(store.url()) as client:
        client.flushall()
    scraped = scrape_until(shop, exporter, 0, "refusals_total", breaker="payments")
    assert value(scraped, "state", breaker="payments", state="CLOSED") == 1


def test_a_port_that_is_taken_is_reported(shop: Shop, store: Server) -> None:
    command = celery_command(shop.module, "breakers", "exporter", "--port", str(store.port), "--address", LOCALHOST)
    program = shop.program(command, directory=PROJECT)
    assert program.popen.wait(TIMEOUT) == 1
    assert f"cannot listen on {LOCALHOST}:{store.port}: Address already in use" in program.output()


# --- a real Prometheus ----------------------------------------------------------------------------------


@pytest.fixture
def prometheus(shop: Shop, exporter: str, tmp_path: Path) -> Callable[..., Any]:
    """Ask the API of a Prometheus that scrapes the exporter, and has our alert rules."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("Prometheus is not installed")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [exporter.split("/")[2]]
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"{LOCALHOST}:{free_port()}"
    files = ["--config.file=prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    program = shop.program([binary, *files, f"--web.listen-address={address}"], directory=tmp_path)
    program.wait_for_output("Server is ready", timeout=TIMEOUT)

    def ask(path: str, **parameters: str) -> Any:
        answer = json.loads(get(f"http://{address}/api/v1/{path}?{urlencode(parameters)}"))
        assert answer["status"] == "success"
        return answer["data"]

    return ask


@pytest.mark.prometheus
def test_prometheus_answers_every_query_of_the_board_and_knows_the_alerts(
    shop: Shop, store: Server, prometheus: Callable[..., Any]
) -> None:
    make_history(shop, store)

    def ask(query: str) -> list[Any]:
        return list(prometheus("query", query=query)["result"])

    shop.wait(lambda: ask('celery_breaker_state{state="FORCED_OPEN"} == 1'), "Prometheus to have scraped")
    board = json.loads((MONITORING / "grafana" / "dashboards" / "breakers.json").read_text())
    expected = {  # no breaker here has any, no task waits, and Flower is not scraped
        "Answered by fallbacks", "Calls in flight and their limit", "Children that are not CLOSED", "Done in",
        "Durations of runs, 95th percentile",
    }  # fmt: skip
    empty: set[str] = set()

    def are_answered() -> bool:
        empty.clear()
        empty.update(title for title, query in queries(board) if not ask(query))
        return empty <= expected

    shop.wait(are_answered, "answers after a second scrape")
    assert empty == expected
    [group] = prometheus("rules")["groups"]
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}
    assert [rule["lastError"] for rule in group["rules"] if "lastError" in rule] == []
