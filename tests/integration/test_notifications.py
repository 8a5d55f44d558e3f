"""Who is notified of an outage: signals, the log; and that Sentry does not."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from tests.integration.conftest import Shop

TRACE = "1234567890abcdef1234567890abcdef"
SENDER = f"00-{TRACE}-1234567890abcdef-01"


def received(shop: Shop) -> list[tuple[str, bool, str, object]]:
    """Return what receivers of signals got."""
    return [tuple(json.loads(line)) for line in shop.side.lrange("signals", 0, -1)]


def test_an_outage_is_reported_once_to_all_but_sentry(shop: Shop) -> None:
    worker = shop.worker(arguments=["-I", "tests.integration.listeners"])  # no beat, which might open it unnoticed
    shop.set_health("payments", "down")
    results = [shop.charge.apply_async((number,), headers={"traceparent": SENDER}) for number in range(15)]
    ids = [result.id for result in results]
    shop.wait(lambda: shop.waiting("payments") == 15, "all to wait")
    shop.set_health("payments", "up")
    shop.wait_done(*results)
    shop.wait(lambda: shop.payments.snapshot().state == "CLOSED", "the breaker to close")
    shop.app.send_task("tests.integration.listeners.mistaken")
    shop.wait(lambda: shop.side.llen("sentry"), "a real mistake to be reported")
    worker.stop()

    names = Counter(name for name, *_ in received(shop))
    transitions = [(name, epoch) for name, _, _, epoch in received(shop) if name.startswith("breaker_")]
    assert names["breaker_closed"] == 1
    assert names["breaker_opened"] == names["breaker_half_opened"] >= 1
    assert len(set(transitions)) == len(transitions)
    assert all(sent_by_app and breaker == "payments" for _, sent_by_app, breaker, _ in received(shop))
    for name in "task_deferred", "task_resumed":
        assert {about for signal, _, _, about in received(shop) if signal == name} == set(ids)
    assert names["task_deferred"] == names["task_resumed"]

    check_log([json.loads(line) for line in shop.side.lrange("log", 0, -1)], ids, len(transitions))
    log = worker.output()
    own_lines = len(re.findall(r"Task \S*charge\[.*\] deferred: ", log))
    counted = sum(map(int, re.findall(r"(\d+) more tasks deferred for breaker payments", log)))
    assert (own_lines < names["task_deferred"], own_lines + counted) == (True, names["task_deferred"])
    assert "a receiver does not like" in log

    check_traces([json.loads(span) for span in shop.side.lrange("spans", 0, -1)])

    [reported] = [json.loads(event) for event in shop.side.lrange("sentry", 0, -1)]
    assert reported["exception"]["values"][-1]["value"] == "a real mistake"


def check_log(records: list[dict[str, Any]], ids: list[str], transitions: int) -> None:
    """Each transition is one warning in the whole fleet, and every line about a task has its id."""
    moves = [record for record in records if record["text"].startswith("breaker payments: ")]
    assert [record["event"] for record in moves].count("breaker-closed") == 1
    assert len(moves) == transitions
    assert all((record["level"], record["breaker"]) == ("WARNING", "payments") and record["state"] for record in moves)
    about_tasks = [record for record in records if record["text"].startswith("Task ")]
    assert {record["task_id"] for record in about_tasks} <= set(ids)
    assert {record["task"] for record in about_tasks} == {"tests.integration.shop.charge"}


def check_traces(spans: list[dict[str, Any]]) -> None:
    """All runs are in the sender's trace; resumed ones are linked to a former one, and no deferral is an error."""
    ours = [span for span in spans if span["name"].endswith("shop.charge")]
    by_id = {span["context"]["span_id"]: span for span in ours}
    assert {span["context"]["trace_id"] for span in ours} == {f"0x{TRACE}"}
    assert {span["attributes"]["circuitbreaker.name"] for span in ours} == {"payments"}
    resumed = [span for span in ours if events(span)[:1] == ["task resumed"]]
    first = [by_id[link["context"]["span_id"]] for span in resumed for link in span["links"]]
    assert len(first) == len(resumed) >= 15
    assert all("task deferred" in events(span) for span in first)
    assert {span["name"].partition("/")[0] for span in first} == {"run", "defer"}
    assert not [span for span in ours if span["status"]["status_code"] == "ERROR"]


def events(span: dict[str, Any]) -> list[str]:
    return [event["name"] for event in span["events"]]
