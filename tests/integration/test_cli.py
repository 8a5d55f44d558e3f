"""``celery breakers`` as people run it, with workers alive and dead, on both brokers."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from celery import chord
from celery.bin.base import CLIContext
from click.testing import CliRunner, Result

from resilient_tasks import cli
from resilient_tasks.breaker import this_user
from resilient_tasks.worker.envelope import Envelope
from tests.integration.conftest import Shop
from tests.integration.post_office import MODULE, TIMEOUT, PostOffice
from tests.integration.test_bad_messages import message
from tests.integration.test_dead_letters import Events
from tests.support import forks
from workers.processes import PROJECT, celery_command

Celery = Callable[..., "subprocess.CompletedProcess[str]"]


def run(module: str, env: dict[str, str], *args: str, user_input: str = "") -> subprocess.CompletedProcess[str]:
    """Run one ``celery`` command to its end."""
    return forks.run(celery_command(module, *args), env=env, text=user_input)


@pytest.fixture
def breakers(post: PostOffice) -> Celery:
    def breakers(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return run(MODULE, post.env, "breakers", *args, **options)

    return breakers


# --- deferred tasks, on both brokers ---------------------------------------------------------------------


def test_with_all_workers_dead_tasks_are_listed_dropped_and_resumed(post: PostOffice, breakers: Celery) -> None:
    post.open("payments")
    results = [post.task("charge", number).apply_async() for number in range(4)]
    ids = [result.id for result in results]
    post.wait_state("DEFERRED", results)
    post.wait_until_deferred(4)
    post.worker.stop()
    listed = json.loads(breakers("deferred", "payments", "--json").stdout)
    assert {task["task_id"] for task in listed} == set(ids)
    assert {(task["task"], task["breaker"], task["origin"], task["attempts"]) for task in listed} == {
        ("charge", "payments", "post", 0)
    }
    refused = breakers("resume", "payments")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "would be deferred again" in refused.stderr
    dropped = breakers("drop", "payments", "--id", ids[0], "--id", "unknown", "--yes")
    assert (dropped.returncode, dropped.stdout) == (1, "1 task dropped\n")
    assert "unknown" in dropped.stderr
    assert results[0].state == "REVOKED"
    post.close("payments")
    assert breakers("resume", "payments", "--rate", "50").stdout == "3 tasks resumed for payments\n"
    logged = post.operator.fleet.history.transitions("payments")
    by_hand = [entry.reason for entry in logged if entry.state == entry.previous]
    assert by_hand[:2] == ["3 tasks resumed", "1 task dropped"], "the latest; the history is that of all tests here"
    assert post.operator.deferred.list("payments") == ()
    post.restart()
    assert [result.get(timeout=TIMEOUT) for result in results[1:]] == [1, 2, 3]
    assert sorted(post.runs()) == sorted(ids[1:])


def test_forced_to_resume_an_open_breaker_defers_its_tasks_again_once(post: PostOffice, breakers: Celery) -> None:
    post.open("payments")
    result = post.task("charge", 1).apply_async()
    post.wait_until_deferred(1)
    assert breakers("resume", "payments", "--force").stdout == "1 task resumed for payments\n"
    post.wait_until_deferred(1)
    assert post.through_an_outage(result) == [1]


def test_a_process_that_waits_for_a_dropped_task_is_notified(post: PostOffice, breakers: Celery) -> None:
    post.open("payments")
    members = [post.task("charge", number) for number in range(2)]
    whole = chord(members, post.task("charge_all")).apply_async()
    post.wait_until_deferred(2)
    assert "2 tasks dropped" in breakers("drop", "payments", user_input="y\n").stdout
    post.wait_state("REVOKED", whole.parent.results)
    post.wait_state("FAILURE", [whole])
    post.close("payments")
    assert post.runs() == []


# --- in this process, which takes less time --------------------------------------------------------------


def here(shop: Shop, *args: str, user_input: str | None = None) -> Result:
    """Run a command of ``celery breakers`` in this process."""
    context = CLIContext(app=shop.app, no_color=True, workdir=None)
    return CliRunner().invoke(cli.breakers, args, obj=context, input=user_input)


def add_messages(shop: Shop, queue: str, envelope: Envelope, *ids: str) -> None:
    """Put messages with such an envelope into a queue of payments, the first of them at its head."""
    messages = [message(id=task_id, argsrepr="('\x1b[2J',)", **envelope.write({})) for task_id in ids]
    shop.broker.lpush(f"resilient.{queue}.payments", *messages)


def test_deferred_tasks_are_listed_as_far_as_wanted(shop: Shop) -> None:
    add_messages(shop, "deferred", Envelope(breaker="payments", origin="celery", since=5.0, reason="\x1b[2J"), *"abc")
    some = here(shop, "deferred", "payments", "--id", "--limit", "2")
    assert some.stdout == "a\nb\n"
    assert some.stderr == "2 of 3 waiting tasks; --limit shows more\n"
    table = here(shop, "deferred", "payments").output
    assert [line.split()[0] for line in table.splitlines()] == ["ID", *"abc"]
    assert "\\x1b[2J" in table
    assert "\x1b" not in table


def test_nothing_to_resume_is_no_error(shop: Shop) -> None:
    empty = here(shop, "resume", "payments")
    assert (empty.exit_code, empty.output) == (0, "nothing was there to resume for payments\n")


def test_nothing_is_dropped_before_it_is_confirmed(shop: Shop) -> None:
    add_messages(shop, "deferred", Envelope(breaker="payments", origin="celery"), "a")
    kept = here(shop, "drop", "payments", user_input="n\n")
    assert (kept.exit_code, shop.waiting("payments")) == (1, 1)
    assert "Drop 1 task waiting for payments, never to run?" in kept.output
    assert "1 task dropped" in here(shop, "drop", "payments", user_input="y\n").output
    assert (shop.app.AsyncResult("a").state, shop.waiting("payments")) == ("REVOKED", 0)


def test_monitors_receive_it_from_the_worker_that_has_deferred_the_tasks(shop: Shop) -> None:
    add_messages(shop, "deferred", Envelope(breaker="payments", origin="celery", reported_by="w1@desk"), "a", "b")
    add_messages(shop, "deferred", Envelope(breaker="payments", origin="celery"), "unreported")
    with contextlib.closing(Events(shop)) as events:
        here(shop, "drop", "payments", "--id", "a", "--yes")
        here(shop, "resume", "payments")
        for kind, task_id in ("task-retried", "a"), ("task-revoked", "a"), ("task-retried", "b"):
            assert events.wait_for(kind, task_id)["hostname"] == "w1@desk"
        assert not events.of("unreported")


def test_dead_letters_are_listed_shown_replayed_and_dropped(shop: Shop) -> None:
    envelope = Envelope(breaker="payments", origin="celery", since=1.0, attempts=3).dead_letter(2.0, "made up")
    add_messages(shop, "dead", envelope, *"abc")
    some = here(shop, "dead", "list", "--id", "--limit", "2")
    assert (some.stdout, some.stderr) == ("a\nb\n", "2 of 3 dead letters; --limit shows more\n")
    assert here(shop, "dead", "list", "--breaker", "payments").output.count("made up") == 3
    dead = json.loads(here(shop, "dead", "show", "a", "--json").output)
    assert (dead["task_id"], dead["attempts"], dead["history"][0]["what"]) == ("a", 3, "dead")
    shown = here(shop, "dead", "show", "a").output
    assert "\\x1b[2J" in shown
    assert "\x1b" not in shown
    some = here(shop, "dead", "replay", "a", "unknown", "b")
    assert (some.exit_code, some.stdout) == (1, "2 dead letters replayed\n")
    assert "no dead letter has the id 'unknown'" in some.stderr
    assert shop.broker.llen("celery") == 2
    kept = here(shop, "dead", "drop", "c", user_input="n\n")
    assert (kept.exit_code, shop.broker.llen("resilient.dead.payments")) == (1, 1)
    assert here(shop, "dead", "drop", "c", "--yes").output == "1 dead letter dropped\n"
    logged = shop.resilience.fleet.history.transitions("payments")
    assert [entry.reason for entry in logged] == ["1 dead letter dropped", "2 dead letters replayed"]
    assert {entry.actor for entry in logged} == {this_user()}
    unknown = here(shop, "dead", "show", "c")
    assert (unknown.exit_code, "no dead letter has the id 'c'" in unknown.output) == (1, True)


def test_children_are_named_one_by_one_or_all_at_once(shop: Shop) -> None:
    for queue, envelope in (
        ("deferred", Envelope(origin="celery")),
        ("dead", Envelope(origin="celery").dead_letter(2.0, "made up")),
    ):
        for key in ("acme", "other"):
            name = f"payments:{key}"
            lies_in = name if queue == "deferred" else "payments"
            put = message(id=f"{queue}-{key}", **replace(envelope, breaker=name).write({}))
            shop.broker.lpush(f"resilient.{queue}.{lies_in}", put)
            shop.payments.child(key).reset()
    assert here(shop, "deferred", "payments:*", "--id").stdout == "deferred-acme\ndeferred-other\n"
    assert "payments:acme" in here(shop, "deferred", "payments:acme").stdout
    assert (
        here(shop, "resume", "payments:*").stdout
        == "1 task resumed for payments:acme\n1 task resumed for payments:other\n"
    )
    add_messages(shop, "deferred", Envelope(origin="celery"), "parents")
    assert here(shop, "drop", "payments:*", "--yes").stdout == "0 tasks dropped\n"
    assert here(shop, "dead", "list", "--id").stdout == "dead-acme\ndead-other\n"
    listed = json.loads(here(shop, "dead", "list", "--breaker", "payments:acme", "--json").stdout)
    assert [(dead["task_id"], dead["breaker"]) for dead in listed] == [("dead-acme", "payments:acme")]
    strange = here(shop, "dead", "drop", "dead-other", "--breaker", "payments:acme", "--yes")
    assert (strange.exit_code, strange.stdout) == (1, "")
    here(shop, "dead", "drop", "dead-other", "--yes")
    [noted, *_] = shop.resilience.fleet.history.transitions("payments:other")
    assert noted.reason == "1 dead letter dropped"


def test_dead_letters_of_a_breaker_that_is_gone_can_be_seen(shop: Shop) -> None:
    former = here(shop, "dead", "list", "--breaker", "paymnets")
    assert former.exit_code == 0
    assert former.stderr == "no breaker is named 'paymnets'; did you mean 'payments'?\n"


# --- breakers, with a worker alive -----------------------------------------------------------------------


def test_a_worker_obeys_and_reports_what_it_sees(shop: Shop) -> None:
    worker = shop.worker()
    isolated = run(shop.module, shop.env, "breakers", "isolate", "payments", "--reason", "\x1b[2J[red]by hand")
    assert isolated.stdout == "payments is FORCED_OPEN\n"
    assert isolated.stderr == ""
    shop.wait_until_known("payments")
    result = shop.charge.delay(1)
    shop.wait(lambda: shop.waiting("payments") == shop.payments.snapshot().deferred == 1, "it to wait")
    table = run(shop.module, shop.env, "breakers", "list")
    line = table.stdout.splitlines()[1].split()
    assert (line[0], line[1], table.stderr) == ("payments", "FORCED_OPEN", "")
    assert "\\x1b[2J[red]by hand" in table.stdout
    shown = here(shop, "show", "payments", "--json")
    snapshot = json.loads(shown.output)
    assert (shown.exit_code, snapshot["deferred"]) == (10, 1)
    asked = "--destination", f"{worker.name}@localhost", "--timeout", "60"  # it answers, and no other is waited for
    inspected = run(shop.module, shop.env, "inspect", "breakers", *asked, "--json")
    [views] = json.loads(inspected.stdout).values()
    assert set(views) == set(shop.resilience.breakers)
    assert (views["payments"]["state"], views["payments"]["epoch"]) == ("FORCED_OPEN", snapshot["epoch"])
    assert 0 <= views["payments"]["age"] < TIMEOUT
    assert views["payments"]["agrees"]
    here(shop, "reset", "payments")
    shop.wait_done(result)


def test_names_and_verbs_complete_in_the_shell(shop: Shop) -> None:
    def completed(line: str) -> set[str]:
        # the shell runs ``celery``, and the program's name says which variable is meant
        script = "import sys; sys.argv[0] = 'celery'; from celery.__main__ import main; main()"
        env = {"_CELERY_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
        printed = subprocess.run(
            [celery_command("")[0], "-c", script], env={**os.environ, **shop.env, **env}, cwd=PROJECT,
            capture_output=True, text=True, check=False, timeout=TIMEOUT,
        ).stdout  # fmt: skip
        return {line.partition(",")[2] for line in printed.split()}

    app = f"celery -A {shop.module} breakers"
    assert completed(f"{app} is") == {"isolate"}
    assert completed(f"{app} isolate payments p") == {"payments", "probed"}
    assert completed("celery -A no.such.app breakers isolate p") == set()


def test_watch_on_a_terminal_follows_until_it_is_interrupted(shop: Shop, tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    command = celery_command(shop.module, "breakers", "watch", "--interval", "0.1")
    env = {**os.environ, **shop.env, "COLUMNS": "160", "LINES": "40", "TERM": "xterm"}
    screen = subprocess.Popen(command, env=env, cwd=PROJECT, stdin=terminal, stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        read_until(master, b"CLOSED")
        shop.payments.isolate(reason="test")
        read_until(master, b"FORCED_OPEN")
        screen.send_signal(signal.SIGINT)
        read_until(master, None)
        assert screen.wait(timeout=TIMEOUT) == 0
    finally:
        screen.kill()
        os.close(master)


def read_until(master: int, text: bytes | None) -> None:
    """Read what a program writes on its terminal until a text comes, or its end; pytest's own time limit applies."""
    seen = b""
    with contextlib.suppress(OSError):  # the program has ended
        while text is None or text not in seen:
            seen += os.read(master, 65536)
    assert text is None or text in seen
