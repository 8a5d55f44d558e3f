"""``celery breakers``, on breakers in memory: what it prints, with which exit code, and what it leaves alone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from resilient_tasks import Breaker, Resilience
from resilient_tasks.cli import breakers
from resilient_tasks.cli.common import plain_lines, print_table, printable, rich_table
from resilient_tasks.monitor.report import duration
from resilient_tasks.store.local import LocalStore
from resilient_tasks.testing import Clock
from tests.support.doubles import FlakyStore

pytestmark = pytest.mark.usefixtures("clock")  # breakers are in memory
NASTY = "[red]a\x1b[2Jb\nc\u202ed"
LIGHT = {"resilient_tasks.cli", "resilient_tasks.errors"}

Run = Callable[..., Result]


@pytest.fixture
def run(app: Celery) -> Run:
    def run(*args: str, user_input: str | None = None) -> Result:
        context = CLIContext(app=app, no_color=True, workdir=None)
        return CliRunner().invoke(breakers, args, obj=context, input=user_input)

    return run


@pytest.fixture
def accounts(resilience: Resilience) -> Breaker:
    return resilience.breaker("accounts")


# --- seeing --------------------------------------------------------------------------------------------


def test_what_is_not_closed_comes_first(run: Run, accounts: Breaker, payments: Breaker, clock: Clock) -> None:
    payments.isolate(reason="maintenance", actor="ann@desk")
    clock.advance(75)
    result = run("list")
    assert result.exit_code == 0
    header, first, second = result.output.splitlines()
    assert header.split()[:3] == ["BREAKER", "STATE", "FOR"]
    assert first.split()[:2] == ["payments", "FORCED_OPEN"]
    assert first.endswith("maintenance  ann@desk")
    assert "1 min 15 s" in first
    assert second.split()[:2] == ["accounts", "CLOSED"]


def test_for_programs_it_is_json(run: Run, payments: Breaker) -> None:
    payments.trip(reason="[red]\x1b")
    [listed] = json.loads(run("list", "--json").output)
    assert (listed["name"], listed["state"], listed["retry_after"]) == ("payments", "OPEN", 10.0)
    assert listed["reason"] == "[red]\x1b"
    assert json.loads(run("show", "payments", "--json").output) == {**listed, "estimate": None}


@pytest.mark.parametrize(
    ("verb", "elapsed", "state", "code"),
    [
        ("reset", 0, "CLOSED", 0),
        ("disable", 0, "DISABLED", 0),
        ("shadow", 0, "SHADOW", 0),
        ("trip", 0, "OPEN", 10),
        ("isolate", 0, "FORCED_OPEN", 10),
        ("trip", 11, "HALF_OPEN", 11),
    ],
)
def test_the_exit_code_of_show_is_that_of_the_state(
    run: Run, payments: Breaker, clock: Clock, verb: str, elapsed: float, state: str, code: int
) -> None:
    getattr(payments, verb)(reason="test")
    clock.advance(elapsed)
    result = run("show", "payments")
    assert (result.exit_code, payments.state) == (code, state)
    assert re.search(rf"state +{state}\n", result.output)


def test_show_says_whom_to_call(run: Run, resilience: Resilience, clock: Clock) -> None:
    resilience.breaker("gateway", description="call Ann", runbook="https://wiki.example/gateway")
    shown = run("show", "gateway").output
    assert re.search(r"description +call Ann\n", shown)
    assert re.search(r"runbook +https://wiki\.example/gateway\n", shown)


def test_show_counts_how_often_shadow_would_have_opened(run: Run, payments: Breaker, clock: Clock) -> None:
    assert "would have opened" not in run("show", "payments").output
    payments.shadow()
    assert re.search(r"would have opened +0 times", run("show", "payments").output)
    for _ in range(5):
        with pytest.raises(ConnectionError):
            payments.call(refuse)
    clock.settle()
    assert re.search(r"would have opened +1 time\n", run("show", "payments").output)


def test_watch_goes_on_when_the_store_is_away(
    run: Run, resilience: Resilience, payments: Breaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)
    payments.isolate()
    waits = iter([lambda: setattr(store, "is_unavailable", True), lambda: None])

    def sleep(seconds: float) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        assert seconds == 5.0
        step = next(waits, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    monkeypatch.setattr("time.sleep", sleep)
    result = run("watch", "--interval", "5")
    assert result.exit_code == 0
    assert result.output.count("the store is unavailable; last read: 2") == 2
    assert result.output.count("FORCED_OPEN") == 3


# --- steering ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "state"),
    [("trip", "OPEN"), ("isolate", "FORCED_OPEN"), ("disable", "DISABLED"), ("shadow", "SHADOW"), ("reset", "CLOSED")],
)
def test_a_verb_moves_several_breakers(run: Run, accounts: Breaker, payments: Breaker, verb: str, state: str) -> None:
    payments.disable() if verb == "trip" else payments.trip()
    result = run(verb, "accounts", "payments", "--reason", "a test")
    assert result.exit_code == 0
    assert result.output == f"accounts is {state}\npayments is {state}\n"
    assert payments.snapshot().reason == "a test"
    assert "@" in payments.snapshot().actor


def test_an_unknown_name_gets_the_nearest_and_nothing_is_done(run: Run, payments: Breaker) -> None:
    result = run("trip", "payments", "paymnets")
    assert result.exit_code == 2
    assert "no breaker is named 'paymnets'; did you mean 'payments'?" in result.output
    assert payments.snapshot().state == "CLOSED"
    result = run("isolat", "payments")
    assert (result.exit_code, "isolate" in result.output) == (2, True)


def test_a_name_like_no_other_gets_all_that_there_are_or_some_of_very_many(
    run: Run, resilience: Resilience, accounts: Breaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run("show", f"zzz{NASTY}")
    assert result.exit_code == 2
    assert "defined: accounts, payments" in result.output
    assert "\x1b" not in result.output
    monkeypatch.setattr("resilient_tasks.cli.common.MOST_NAMED", 2)
    for name in ("aa", "bb", "cc"):
        resilience.breaker(name)
    assert "defined: aa, accounts, and 3 more" in run("show", "zzz").output


def test_a_probe_that_no_worker_runs_is_due(run: Run, payments: Breaker, clock: Clock) -> None:
    payments.trip()
    assert re.search(r"next probe +in 10 s", run("show", "payments").output)
    clock._now += 60  # no worker looks after it meanwhile
    assert re.search(r"next probe +due", run("show", "payments").output)


def test_an_operators_checkout_does_not_replace_the_workers_policy(
    run: Run, resilience: Resilience, clock: Clock
) -> None:
    workers = LocalStore(clock)
    resilience.use_store(workers)
    other = Resilience(Celery("workers", broker="memory://", set_as_current=False))
    other.use_store(workers)
    theirs = other.breaker("payments", consecutive_failures=3, open_duration=200, open_jitter=0)
    other.fleet.store.advance(theirs._dependency.spec)  # as a worker's tick does
    run("trip", "payments")
    assert json.loads(run("show", "payments", "--json").output)["retry_after"] == 200


# --- what goes wrong -----------------------------------------------------------------------------------


def test_an_app_without_breakers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = CLIContext(app=Celery("bare", set_as_current=False), no_color=True, workdir=None)
    result = CliRunner().invoke(breakers, ["list"], obj=bare)
    assert result.exit_code == 1
    assert (
        result.output
        == "Error: app 'bare' has no Resilience: name the app that has, as in celery -A proj breakers ...\n"
    )


@pytest.mark.parametrize("command", [("list",), ("show", "payments"), ("trip", "payments"), ("resume", "payments")])
def test_a_store_that_is_away_is_one_line_and_an_exit_code(
    run: Run, resilience: Resilience, clock: Clock, command: Sequence[str]
) -> None:
    store = FlakyStore(clock)
    store.is_unavailable = True
    resilience.use_store(store)
    result = run(*command)
    assert result.exit_code == 69
    assert result.output.splitlines()[-1] == "Error: the cable is pulled"


@pytest.mark.parametrize("command", [("deferred", "payments"), ("dead", "list"), ("drop", "payments", "--yes")])
def test_a_broker_that_is_away_is_one_line_and_an_exit_code(app: Celery, run: Run, command: Sequence[str]) -> None:
    app.conf.broker_url = "redis://:hunter2@127.0.0.1:1/0"
    result = run(*command)
    assert result.exit_code == 69
    assert result.output.startswith("Error: the broker is unavailable: ")
    assert len(result.output.splitlines()) == 1
    assert "hunter2" not in result.output


def test_there_is_no_negative_rate(run: Run) -> None:
    assert {run("resume", "payments", "--rate", rate).exit_code for rate in ("-1", "0", "nan", "inf", "fast")} == {2}


# --- on the terminal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, ""), (-3, "0 s"), (0.4, "0 s"), (59.6, "1 min"), (75, "1 min 15 s"), (3600, "1 h"), (90061, "1 d 1 h")],
)
def test_durations_in_two_units(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


def test_what_others_wrote_is_shown_and_not_obeyed() -> None:
    assert printable(NASTY) == "[red]a\\x1b[2Jb\\nc\\u202ed"
    assert list(plain_lines(("A", "B"), [(NASTY, "x")])) == [f"A{' ' * 23}  B", f"{printable(NASTY)}  x"]


def test_a_terminal_gets_a_table_without_markup(run: Run, payments: Breaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resilient_tasks.cli.common.is_rich", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    payments.isolate(reason="[red]\x1b[2J")
    output = run("list").output
    assert "FORCED_OPEN" in output
    assert "[red]\\x1b[2J" in output
    assert "\x1b[2J" not in output


@pytest.mark.parametrize("width", [60, 80])
def test_on_a_narrow_terminal_names_and_states_stay_whole(
    run: Run, payments: Breaker, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setattr("resilient_tasks.cli.common.is_rich", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    payments.child("a-customer").isolate(
        reason="the provider asked for patience, until six in the morning", actor="ann@desk"
    )
    output = run("list").output
    assert "payments:a-customer" in output
    assert "FORCED_OPEN" in output
    assert "FAILED" not in output  # no call was made: the column would be empty
    assert max(map(len, output.splitlines())) <= width


def test_celery_itself_imports_nothing_heavy_of_ours() -> None:
    script = "import resilient_tasks.cli, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "click" in loaded
    assert {"celery", "redis", "rich", "pydantic_settings"} & set(loaded) == set()
    assert {name for name in loaded if name.startswith("resilient_tasks.")} <= LIGHT


def test_rich_is_imported_for_terminals_only() -> None:
    code = f"import {print_table.__module__} as m, sys; m.print_table(['A'], [['b']]); print('rich' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "A\nb\nFalse\n"


def test_a_states_cell_has_its_colour() -> None:
    table: Any = rich_table(["STATE"], [["OPEN"], ["[b]x"]])
    assert [(cell.plain, str(cell.style)) for cell in table.columns[0].cells] == [("OPEN", "bold red"), ("[b]x", "")]


# --- children ------------------------------------------------------------------------------------------


def test_evidence_is_shown_before_it_opens_a_breaker(run: Run, resilience: Resilience, clock: Clock) -> None:
    mail = resilience.breaker("mail", minimum_calls=10)
    for _ in range(7):
        with suppress(ConnectionError):
            mail.call(refuse)
    clock.advance(0)
    assert re.search(r"^mail +CLOSED .*7 of 10", run("list").output, flags=re.MULTILINE)
    assert re.search(r"^evidence +7 of 10$", run("show", "mail").output, flags=re.MULTILINE)


def refuse() -> None:
    raise ConnectionRefusedError


def test_children_are_listed_when_there_is_something_to_show(run: Run, payments: Breaker) -> None:
    for key in ("acme", "other"):
        payments.child(key).call(int)
    assert len(run("list").output.splitlines()) == 2
    payments.child("acme").trip(reason="bad credential")
    header, first, _ = run("list").output.splitlines()
    assert header.startswith("BREAKER")
    assert first.split()[:2] == ["payments:acme", "OPEN"]
    assert [line.split()[0] for line in run("list", "payments:*").output.splitlines()[1:]] == [
        "payments:acme",
        "payments:other",
    ]
    assert run("show", "payments:acme").exit_code == 10


def test_a_wildcard_means_all_children(run: Run, payments: Breaker) -> None:
    for key in ("acme", "other"):
        payments.child(key).call(int)
    result = run("isolate", "payments:*", "--reason", "maintenance")
    assert result.output.splitlines() == ["payments:acme is FORCED_OPEN", "payments:other is FORCED_OPEN"]
    assert payments.snapshot().state == "CLOSED"
    assert run("reset", "payments", "payments:*", "payments:acme").output.count("CLOSED") == 3


def test_a_key_is_taken_as_it_is_typed(run: Run) -> None:
    assert run("trip", "payments:api:80").output == "payments:api%3A80 is OPEN\n"
    assert run("show", "payments:api%3A80").exit_code == 10
    result = run("trip", f"payments:{100 * 'a'}")
    assert result.exit_code == 2
    assert "allowed is text or an integer" in result.output
    assert "no breaker is named 'unknown:a'" in run("trip", "unknown:a").output


@pytest.mark.parametrize("command", [("show",), ("report",), ("dead", "list", "--breaker")])
def test_where_one_breaker_is_wanted_a_wildcard_is_none(run: Run, command: Sequence[str]) -> None:
    result = run(*command, "payments:*")
    assert result.exit_code == 2
    assert "'payments:*' means all children of payments: name one breaker" in result.output


def test_alert_rules_and_the_dashboard_are_written(run: Run, tmp_path: Path) -> None:
    result = run("monitoring", str(tmp_path / "watched"))
    assert (result.exit_code, result.output.partition(":")[0]) == (0, f"written to {tmp_path / 'watched'}")
    assert {"alerts.yml", "grafana"} <= {path.name for path in (tmp_path / "watched").iterdir()}
