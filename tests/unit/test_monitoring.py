"""The dashboard, the alert rules and what provisions them: they fit together, and every query is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from resilient_tasks.flower.application import RUN_TIMES
from resilient_tasks.prometheus import HEALTH, METRICS
from tests.support.board import queries

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "resilient_tasks" / "monitoring"
BOARD: dict[str, Any] = json.loads((MONITORING / "grafana" / "dashboards" / "breakers.json").read_text())
ALERTS: list[dict[str, Any]] = yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"][0]["rules"]
DOC = (ROOT / "docs" / "metrics.md").read_text()
QUERIES = {
    **{f"board: {title} {number}": query for number, (title, query) in enumerate(queries(BOARD))},
    **{f"alert: {rule['alert']}": rule["expr"] for rule in ALERTS},
    **{f"doc {number}": query for number, query in enumerate(re.findall(r"```promql\n(.*?)```", DOC, flags=re.DOTALL))},
}
LABELS: dict[str, set[str]] = {
    **{name: set() for name in HEALTH},
    **{metric.name: {"breaker", *metric.labels} for metric in METRICS},
}
FOREIGN = {
    "celery_task_failed_total": {"name"},
    f"{RUN_TIMES}_bucket": {"breaker", "worker", "le"},  # from Flower alone
}
ADDED_BY_PROMETHEUS = {"instance", "job"}


def selectors(query: str) -> list[tuple[str, list[str]]]:
    """Return the metrics that a query asks for, each with the labels that it compares."""
    found: list[tuple[str, list[str]]] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql_parser.VectorSelector):
            found.append((str(node.name), [matcher.name for matcher in node.matchers.matchers]))
        return True

    promql_parser.walk(promql_parser.parse(query), visit)
    return found


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_is_promql_about_metrics_and_labels_that_exist(name: str) -> None:
    known = LABELS | FOREIGN
    asked = selectors(QUERIES[name])
    assert asked
    for metric, labels in asked:
        assert metric in known
        assert set(labels) <= known[metric]
    grouped = {label for group in re.findall(r"\bby \(([^)]*)\)", QUERIES[name]) for label in group.split(", ")}
    assert grouped <= set().union(*known.values()) | ADDED_BY_PROMETHEUS


def test_every_counter_is_asked_for_its_growth() -> None:
    for query in QUERIES.values():
        for counter in re.findall(r"celery_\w+_total", query):
            assert re.search(rf"\b(rate|increase)\({counter}(\{{[^}}]*\}})?\[", query)


def test_the_board_shows_every_metric_that_changes() -> None:
    shown = {metric for query in QUERIES.values() for metric, _ in selectors(query)}
    untold = {"state_timestamp_seconds", "next_trial_timestamp_seconds", "info", "redeliveries_total"}
    assert {*LABELS} - shown <= {f"celery_breaker_{name}" for name in untold}


def test_every_panel_names_the_data_source_that_the_reader_has_chosen() -> None:
    for panel in BOARD["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])


def test_the_documentation_lists_the_alerts() -> None:
    assert re.findall(r"^\| `(\w+)` \| [a-z]", DOC.partition("| alert |")[2], flags=re.MULTILINE) == [
        rule["alert"] for rule in ALERTS
    ]
    assert all(rule["annotations"]["summary"] and rule["labels"]["severity"] for rule in ALERTS)


@pytest.mark.prometheus
def test_the_alerts_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        checked = subprocess.run([promtool, *command], cwd=MONITORING, capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    tested = yaml.safe_load((MONITORING / "alerts_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in ALERTS}


def test_what_compose_mounts_is_there_and_prometheus_asks_the_exporter() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for volume in services["prometheus"]["volumes"] + services["grafana"]["volumes"]:
        assert (ROOT / volume.split(":")[0]).exists()
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    assert (MONITORING / config["rule_files"][0]).exists()
    [target] = config["scrape_configs"][0]["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert f"exporter --port {port}" in services[name]["command"]
