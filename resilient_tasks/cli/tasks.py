"""``deferred``, ``resume``, ``drop`` and ``dead``: tasks that wait for a breaker, and dead letters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from resilient_tasks.breaker import this_user
from resilient_tasks.cli.common import (
    BreakerName,
    Row,
    expand,
    json_option,
    pass_runtime,
    plain_lines,
    print_json,
    print_table,
    printable,
    using_the_broker,
)
from resilient_tasks.errors import BreakerOpenError, DeadLetterError
from resilient_tasks.monitor.report import counted, moment
from resilient_tasks.operations.waiting import DeadLetter, DeadLetters, Deferred, note
from resilient_tasks.worker.context import Runtime

_ids_only = click.option("--id", "ids_only", is_flag=True, help="For scripts: ids alone, one per line.")


@click.command()
@click.argument("name", type=BreakerName(wildcard=True))
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most tasks to list.")
@_ids_only
@json_option
@pass_runtime
def deferred(runtime: Runtime, name: str, *, limit: int, ids_only: bool, as_json: bool) -> None:
    """List the tasks that wait for a breaker, the oldest first.

    NAME:* means all its children.
    """
    with using_the_broker(runtime):
        waiting = Deferred(runtime)
        counts = {each: waiting.count(each) for each in expand(runtime, [name])}
        found = [task for each, some in counts.items() if some for task in waiting.list(each, limit=limit)]
    tasks = sorted(found, key=lambda task: task.since or 0)[:limit]
    rows = [(t.task_id, t.task, t.breaker, moment(t.since or None), str(t.attempts), t.reason) for t in tasks]
    columns = ("ID", "TASK", "BREAKER", "SINCE", "ATTEMPTS", "REASON")
    _print_tasks(columns, rows, [asdict(task) for task in tasks] if as_json else None, ids_only=ids_only)
    _say_how_many(len(tasks), sum(counts.values()), "waiting tasks")


def _print_tasks(columns: Row, rows: Sequence[Row], fields: object, *, ids_only: bool) -> None:
    """Print tasks: their ``fields`` as JSON if given, or the ids in their first cells, or a table."""
    if fields is not None:
        print_json(fields)
    elif ids_only:
        click.echo("".join(f"{printable(task_id)}\n" for task_id, *_ in rows), nl=False)
    else:
        print_table(columns, rows)


def _say_how_many(listed: int, count: int, what: str) -> None:
    if count > listed:
        click.echo(f"{listed} of {count} {what}; --limit shows more", err=True)


@click.command()
@click.argument("name", type=BreakerName(wildcard=True))
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="Tasks per second; all at once without it.")
@click.option("--force", is_flag=True, help="Even though the breaker refuses.")
@pass_runtime
def resume(runtime: Runtime, name: str, *, rate: float | None, force: bool) -> None:
    """Resume the tasks that wait for a breaker now.

    Faster or slower than the workers do. NAME:* means all its children. While the breaker refuses, its workers
    would only defer the tasks again, so that takes --force.
    """
    if rate is not None and not math.isfinite(rate):
        raise click.BadParameter(f"{rate} is no number of tasks per second", param_hint="'--rate'")
    with using_the_broker(runtime):
        waiting = Deferred(runtime)
        names = [each for each in expand(runtime, [name]) if each == name or waiting.count(each)]
        refusals = [_resume(runtime, waiting, each, rate, force=force) for each in names]
    if any(refusals):
        raise click.ClickException("\n".join(filter(None, refusals)))


def _resume(runtime: Runtime, waiting: Deferred, name: str, rate: float | None, *, force: bool) -> str | None:
    """Resume the tasks that wait for one breaker at this moment; return the error if it refuses."""
    resumed = 0
    try:
        for count, pause in waiting.resume_at(name, rate, force=force):
            resumed += count
            time.sleep(pause)
    except BreakerOpenError as error:
        advice = f"its tasks would be deferred again. 'reset {name}' closes it, --force resumes them all the same."
        return f"{error}: {advice}"
    finally:
        note(runtime, {name: resumed}, "task", "resumed", this_user())
        if resumed:
            click.echo(f"{counted(resumed, 'task')} resumed for {name}")
    if not resumed:
        click.echo(f"nothing was there to resume for {name}")
    return None


@click.command()
@click.argument("name", type=BreakerName(wildcard=True))
@click.option("--id", "task_ids", metavar="ID", multiple=True, help="Only this task; may be given several times.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_runtime
def drop(runtime: Runtime, name: str, *, task_ids: tuple[str, ...], yes: bool) -> None:
    """Drop tasks that wait for a breaker.

    All of them or some: they never run, and their results are REVOKED. NAME:* means all its children.
    """
    with using_the_broker(runtime):
        waiting = Deferred(runtime)
        counts = {each: waiting.count(each) for each in expand(runtime, [name])}
        count = len(set(task_ids)) or sum(counts.values())
        if count and not yes:
            click.confirm(f"Drop {counted(count, 'task')} waiting for {name}, never to run?", abort=True)
        dropped = {each: waiting.drop(each, frozenset(task_ids) or None) for each, some in counts.items() if some}
    note(runtime, {each: len(ids) for each, ids in dropped.items()}, "task", "dropped", this_user())
    gone = set[str]().union(*dropped.values())
    click.echo(f"{counted(len(gone), 'task')} dropped")
    missing = ", ".join(printable(task_id) for task_id in task_ids if task_id not in gone)
    if missing:
        raise click.ClickException(
            f"not dropped, as they do not wait or have results that cannot be written: {missing}"
        )


_breaker = click.option(
    "--breaker", type=BreakerName(former=True), help="Of this breaker only, also of one that is no longer defined."
)
_ids = click.argument("task_ids", metavar="ID...", nargs=-1, required=True)


@click.group()
def dead() -> None:
    """Show, replay and drop dead letters.

    They are tasks that failed for good, or expired, while they waited.
    """


@dead.command("list")
@_breaker
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most of each breaker.")
@_ids_only
@json_option
@pass_runtime
def list_dead(runtime: Runtime, breaker: str | None, *, limit: int, ids_only: bool, as_json: bool) -> None:
    """List dead letters, the oldest first."""
    with using_the_broker(runtime):
        dead_letters = DeadLetters(runtime)
        tasks, count = dead_letters.list(breaker, limit=limit), sum(dead_letters.count(breaker).values())
    rows = [(each.task_id, each.task, each.breaker, moment(each.died_at), each.reason) for each in tasks]
    columns = ("ID", "TASK", "BREAKER", "DEAD SINCE", "REASON")
    _print_tasks(columns, rows, [_fields(task) for task in tasks] if as_json else None, ids_only=ids_only)
    _say_how_many(len(tasks), count, "dead letters")


@dead.command()
@click.argument("task_id", metavar="ID")
@_breaker
@json_option
@pass_runtime
def show(runtime: Runtime, task_id: str, breaker: str | None, *, as_json: bool) -> None:
    """Show one dead letter: why and since when it is dead, and the message as it was published."""
    with using_the_broker(runtime):
        task = DeadLetters(runtime).show(task_id, breaker=breaker)
    if as_json:
        print_json(_fields(task))
    else:
        click.echo("\n".join(plain_lines(("id", task.task_id), _details(task))))


@dead.command()
@_ids
@_breaker
@pass_runtime
def replay(runtime: Runtime, task_ids: tuple[str, ...], breaker: str | None) -> None:
    """Send tasks again as they were first published, under the same ids."""
    _carry_out(runtime, "replayed", lambda dead_letters: dead_letters.replay(*task_ids, breaker=breaker))


@dead.command("drop")
@_ids
@_breaker
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_runtime
def drop_dead(runtime: Runtime, task_ids: tuple[str, ...], breaker: str | None, *, yes: bool) -> None:
    """Delete dead letters for good."""
    if not yes:
        click.confirm(f"Delete {counted(len(set(task_ids)), 'dead letter')} for good?", abort=True)
    _carry_out(runtime, "dropped", lambda dead_letters: dead_letters.drop(*task_ids, breaker=breaker))


def _carry_out(runtime: Runtime, what: str, act: Callable[[DeadLetters], dict[str, int]]) -> None:
    """Replay or drop dead-lettered tasks; print and log how many, also if some failed."""
    done: Mapping[str, int] = {}
    try:
        with using_the_broker(runtime):
            done = act(DeadLetters(runtime))
    except DeadLetterError as error:
        done = error.done
        raise
    finally:
        note(runtime, done, "dead letter", what, this_user())
        if done:
            click.echo(f"{counted(sum(done.values()), 'dead letter')} {what}")


def _fields(task: DeadLetter) -> dict[str, Any]:
    return {**task.public_fields(), "headers": task.headers, "body": _text(task.body)}


def _text(body: bytes) -> str:
    return body.decode(errors="backslashreplace")


def _details(task: DeadLetter) -> list[Row]:
    return [
        ("task", task.task),
        ("breaker", task.breaker),
        ("reason", task.reason),
        ("since", moment(task.since)),
        ("dead since", moment(task.died_at)),
        ("queue", task.origin),
        ("attempts", str(task.attempts)),
        ("args", task.args),
        ("kwargs", task.kwargs),
        ("body", _text(task.body)),
        *(("history", f"{moment(step.at)} {step.what} {step.cause}") for step in task.history),
    ]
