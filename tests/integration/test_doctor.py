"""The doctor on real deployments: a sound one, one with as much wrong as can be, and one that is not there."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner

from resilient_tasks import Resilience, cli
from resilient_tasks.operations import doctor
from resilient_tasks.worker.context import TICK_TASK, runtime_of
from tests.chaos.stack import faketime_library
from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import PROJECT

Findings = dict[str, list[dict[str, Any]]]


def examined(app: Celery, *, timeout: float = 2.0) -> tuple[int, Findings]:
    """Return the exit code of ``doctor``, and its findings by check; workers have so long to answer."""
    context = CLIContext(app=app, no_color=True, workdir=None)
    result = CliRunner().invoke(cli.breakers, ["doctor", "--json", "--timeout", str(timeout)], obj=context)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    findings: Findings = {}
    for finding in json.loads(result.stdout):
        findings.setdefault(finding["check"], []).append(finding)
    return result.exit_code, findings


def wait_for_findings(shop: Shop, app: Celery, exit_code: int, *expected: tuple[str, str, str]) -> Findings:
    """Return what is found as soon as all workers answer in time: checks, levels and parts of what is said."""
    looks: list[tuple[int, Findings]] = []

    def are_there() -> bool:
        looks.append(examined(app))
        code, findings = looks[-1]
        return code == exit_code and all(what in said(findings, check, level) for check, level, what in expected)

    try:
        shop.wait(are_there, "the findings")
    except TimeoutError:
        raise AssertionError(looks[-1]) from None
    return looks[-1][1]


def said(findings: Findings, check: str, level: str) -> str:
    return "\n".join(finding["what"] for finding in findings.get(check, []) if finding["level"] == level)


def test_what_is_sound_and_what_is_broken(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = shop.worker()
    shop.wait(lambda: shop.resilience.fleet.ledger.last_tick_age(runtime_of(shop.app).tick_scope) is not None, "a tick")
    wait_for_findings(
        shop, shop.app, 0,
        ("workers", "ok", "1 worker answered"), ("policies", "ok", "all is well"), ("acks_late", "warning", "early"),
        ("ticks", "warning", "beat sends no ticks, last seen: never"),
    )  # fmt: skip
    shop.app.tasks[TICK_TASK].delay()  # as beat sends it with a scheduler that is not Celery's own

    other = shop.worker(
        env={"RESILIENT_TASKS_BREAKERS__PAYMENTS__WINDOW": "7", "RESILIENT_TASKS_NAMESPACE": "elsewhere"}
    )
    plain = [sys.executable, "-m", "celery", "-b", shop.server.url(0), "worker", "-P", "solo", "-Q", "plain"]
    command = [*plain, "-n", "plain@x", "-l", "INFO", "--without-mingle"]
    shop.program(command, directory=PROJECT).wait_for_output("plain@x ready.", timeout=TIMEOUT)
    shop.broker.config_set("maxmemory-policy", "allkeys-lru")
    monkeypatch.setitem(shop.app.conf, "result_expires", 0.001)
    shop.payments.isolate()
    shop.resilience.fleet.ledger.add_deferred("payments:acme", "a")
    shop.wait(lambda: sender_age(shop) is not None, "the worker to report the tick")
    try:
        node = other.node
        findings = wait_for_findings(
            shop, shop.app, 1,
            ("maxmemory-policy", "warning", "the broker has maxmemory-policy allkeys-lru"),
            ("control queue", "error", f"{node} does not consume resilient.control: it takes them from elsewhere.cont"),
            ("policies", "warning", f"{node} declares breaker payments otherwise: window"),
            ("versions", "error", "worker plain@x runs without the library"),
            ("result_expires", "error", "longer than results are kept"), ("ticks", "ok", "beat was seen"),
        )  # fmt: skip
    finally:
        shop.broker.config_set("maxmemory-policy", "noeviction")
    assert sound.node not in said(findings, "versions", "error")


def test_code_that_defines_one_breaker_more_than_the_workers_finds_their_ticks(shop: Shop) -> None:
    shop.worker()
    shop.wait(lambda: shop.resilience.fleet.ledger.last_tick_age(runtime_of(shop.app).tick_scope) is not None, "a tick")
    newer = Celery("newer", broker=shop.app.conf.broker_url, backend=shop.app.conf.result_backend, set_as_current=False)
    resilience = Resilience(newer, tick_interval=0.25, store_timeout=20)
    for name in [*shop.resilience.breakers, "stock", "guarded_in_a_web_process"]:
        resilience.breaker(name)

    @newer.task(name="restock", breaker="stock", shared=False)
    def restock() -> None: ...

    missing = "tasks name breaker stock, which no worker defines that answers: restock"
    findings = wait_for_findings(
        shop, newer, 0,
        ("workers", "ok", "1 worker answered"), ("ticks", "warning", "beat sends no ticks"),
        ("undefined breakers", "warning", missing),
    )  # fmt: skip
    assert said(findings, "undefined breakers", "warning") == missing
    resilience.fleet.close()


def test_exceptions_that_no_rule_knows_are_found(shop: Shop) -> None:
    class DeclinedError(Exception):
        pass

    def call() -> None:
        raise DeclinedError

    payments = shop.resilience["payments"]
    with pytest.raises(DeclinedError):
        payments.call(call)
    assert shop.resilience.fleet.reporter.flush(TIMEOUT)
    found = said(examined(shop.app, timeout=0.2)[1], "undecided exceptions", "warning")
    assert found == "calls of payments end with exceptions that no rule knows: DeclinedError"
    context = CLIContext(app=shop.app, no_color=True, workdir=None)
    shown = CliRunner().invoke(cli.breakers, ["show", "payments"], obj=context).stdout
    assert re.search(r"not counted +DeclinedError: no rule knows it", shown)


def sender_age(shop: Shop) -> float | None:
    return shop.resilience.fleet.ledger.tick_sender_age(runtime_of(shop.app).tick_scope)


def test_beat_is_seen_alive_while_nothing_is_due(shop: Shop) -> None:
    shop.beat()
    shop.wait(lambda: sender_age(shop) is not None, "beat to look")
    assert shop.broker.llen("resilient.control") == 0


def test_a_clock_that_is_fast_is_found(shop: Shop) -> None:
    library = faketime_library()
    if library is None:
        pytest.skip("faketime is not installed")
    clock = {"LD_PRELOAD": str(library), "FAKETIME": "+150", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    worker = shop.worker(pool="threads", env=clock)
    findings = wait_for_findings(shop, shop.app, 0, ("clocks", "warning", worker.node))
    found = said(findings, "clocks", "warning")
    assert re.fullmatch(rf"the clock of worker {worker.node} is 2 min [23]\d s ahead of the store's", found)


def test_with_all_workers_dead_it_finds_what_they_have_left(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "UNSEEN", 0.0)
    shop.resilience.fleet.ledger.declare(["former"])
    shop.broker.lpush("resilient.deferred.former", "a", "b")
    code, findings = examined(shop.app, timeout=0.5)
    assert (code, said(findings, "workers", "error")) == (1, "no worker answers")
    assert said(findings, "ticks", "error") == "ticks do not complete, the last: never"
    undefined = "2 tasks wait for breaker former, which no process defines"
    assert said(findings, "undefined breakers", "warning") == undefined


def test_with_nothing_there_it_says_so() -> None:
    app = Celery("nowhere", broker="redis://localhost:1/0", set_as_current=False)
    Resilience(app).breaker("payments")
    code, findings = examined(app)
    assert code == 1
    assert "Connection refused" in said(findings, "store", "error")
    assert "refused" in said(findings, "broker", "error")
    assert said(findings, "workers", "unknown") == "could not be found out"
    assert said(findings, "prefetch", "ok") == "all is well"
