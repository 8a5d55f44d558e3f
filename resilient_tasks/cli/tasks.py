"""``deferred``, ``resume``, ``drop`` and ``dead``: tasks that wait for a breaker, and dead letters."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from typing import Any

import click

from resilient_tasks.cli.common import (
    BreakerName,
    BreakerNames,
    Row,
    asking_the_broker,
    expand,
    note,
    pass_runtime,
    plain_lines,
    print_json,
    print_table,
    printable,
)
from resilient_tasks.errors import BreakerOpenError, DeadLetterError
from resilient_tasks.monitor.report import counted, moment
from resilient_tasks.operations.waiting import DeadLetter, DeadLetters, Deferred, DeferredTask
from resilient_tasks.worker.context import Runtime
from resilient_tasks.worker.envelope import UNDECODABLE


@click.command()
@click.argument("name", type=BreakerNames())
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most tasks to list.")
@click.option("--id", "ids_only", is_flag=True, help="For scripts: ids alone, one per line.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@pass_runtime
def deferred(runtime: Runtime, name: str, *, limit: int, ids_only: bool, as_json: bool) -> None:
    """List the tasks that wait for a breaker, the oldest first.

    NAME:* means all its children.
    """
    with asking_the_broker(runtime):
        waiting = Deferred(runtime)
        counts = {each: waiting.count(each) for each in expand(runtime, [name])}
        found = [task for each, some in counts.items() if some for task in waiting.list(each, limit=limit)]
        tasks, count = sorted(found, key=lambda task: task.since or 0)[:limit], sum(counts.values())
    if as_json:
        print_json([asdict(task) for task in tasks])
    elif ids_only:
        for task in tasks:
            click.echo(printable(task.task_id))
    else:
        print_table(("ID", "TASK", "BREAKER", "SINCE", "ATTEMPTS", "REASON"), [_row(task) for task in tasks])
    if count > len(tasks):
        click.echo(f"{len(tasks)} of {count} waiting tasks; --limit shows more", err=True)


def _row(task: DeferredTask) -> Row:
    return task.task_id, task.task, task.breaker, moment(task.since or None), str(task.attempts), task.reason


@click.command()
@click.argument("name", type=BreakerNames())
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
    with asking_the_broker(runtime):
        waiting = Deferred(runtime)
        names = [each for each in expand(runtime, [name]) if each == name or waiting.count(each)]
        refusals = [_resume(runtime, waiting, each, rate, force=force) for each in names]
    if any(refusals):
        raise click.ClickException("\n".join(filter(None, refusals)))


def _resume(runtime: Runtime, waiting: Deferred, name: str, rate: float | None, *, force: bool) -> str | None:
    """Resume the tasks that wait for one breaker; return the error if it refuses."""
    resumed = 0
    try:
        for count in _batches(waiting, name, rate, force=force):
            resumed += count
    except BreakerOpenError as error:
        advice = f"its tasks would be deferred again. 'reset {name}' closes it, --force resumes them all the same."
        return f"{error}: {advice}"
    finally:
        if resumed:
            done = f"{counted(resumed, 'task')} resumed"
            note(runtime, name, done)
            click.echo(f"{done} for {name}")
    if not resumed:
        click.echo(f"nothing was there to resume for {name}")
    return None


def _batches(waiting: Deferred, name: str, rate: float | None, *, force: bool) -> Iterator[int]:
    """Resume the tasks that wait at this moment, at a steady rate; yield the size of each batch."""
    if rate is None:
        yield waiting.resume(name, force=force)
        return
    for count, pause in waiting.resume_at(name, rate, force=force):
        yield count
        time.sleep(pause)


@click.command()
@click.argument("name", type=BreakerNames())
@click.option("--id", "task_ids", metavar="ID", multiple=True, help="Only this task; may be given several times.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_runtime
def drop(runtime: Runtime, name: str, *, task_ids: tuple[str, ...], yes: bool) -> None:
    """Drop tasks that wait for a breaker.

    All of them or some: they never run, and their results are REVOKED. NAME:* means all its children.
    """
    with asking_the_broker(runtime):
        waiting = Deferred(runtime)
        counts = {each: waiting.count(each) for each in expand(runtime, [name])}
        count = len(set(task_ids)) or sum(counts.values())
        if count and not yes:
            click.confirm(f"Drop {counted(count, 'task')} waiting for {name}, never to run?", abort=True)
        dropped = {each: waiting.drop(each, frozenset(task_ids) or None) for each, some in counts.items() if some}
    for each, ids in dropped.items():
        if ids:
            note(runtime, each, f"{counted(len(ids), 'task')} dropped")
    gone = set[str]().union(*dropped.values())
    click.echo(f"{counted(len(gone), 'task')} dropped")
    missing = ", ".join(printable(task_id) for task_id in task_ids if task_id not in gone)
    if missing:
        raise click.ClickException(
            f"not dropped, as they do not wait or have results that cannot be written: {missing}"
        )


class _FormerBreakerName(BreakerName):
    """Name of any breaker: a deploy may have removed it and left its dead letters."""

    def unknown(self, message: str, _param: click.Parameter | None, _ctx: click.Context | None) -> None:
        """Warn, and go on."""
        click.echo(message, err=True)


_breaker = click.option(
    "--breaker", type=_FormerBreakerName(), help="Of this breaker only, also of one that is no longer defined."
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
@click.option("--id", "ids_only", is_flag=True, help="For scripts: ids alone, one per line.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@pass_runtime
def list_dead(runtime: Runtime, breaker: str | None, *, limit: int, ids_only: bool, as_json: bool) -> None:
    """List dead letters, the oldest first."""
    with asking_the_broker(runtime):
        dead_letters = DeadLetters(runtime)
        letters, count = dead_letters.list(breaker, limit=limit), sum(dead_letters.count(breaker).values())
    if as_json:
        print_json([_fields(letter) for letter in letters])
    elif ids_only:
        for letter in letters:
            click.echo(printable(letter.task_id))
    else:
        rows = [(each.task_id, each.task, each.breaker, moment(each.died_at), each.reason) for each in letters]
        print_table(("ID", "TASK", "BREAKER", "DIED", "REASON"), rows)
    if count > len(letters):
        click.echo(f"{len(letters)} of {count} dead letters; --limit shows more", err=True)


@dead.command()
@click.argument("task_id", metavar="ID")
@_breaker
@click.option("--json", "as_json", is_flag=True, help="For programs: one object.")
@pass_runtime
def show(runtime: Runtime, task_id: str, breaker: str | None, *, as_json: bool) -> None:
    """Show one dead letter: why and when it died, and the message as it was published."""
    with asking_the_broker(runtime):
        letter = DeadLetters(runtime).show(task_id, breaker=breaker)
    if as_json:
        print_json(_fields(letter))
    else:
        click.echo("\n".join(plain_lines(("id", letter.task_id), list(_details(letter)))))


@dead.command()
@_ids
@_breaker
@pass_runtime
def replay(runtime: Runtime, task_ids: tuple[str, ...], breaker: str | None) -> None:
    """Send tasks again as they were first published, under the same ids."""
    _carry_out(runtime, "replayed", lambda letters: letters.replay(*task_ids, breaker=breaker))


@dead.command("drop")
@_ids
@_breaker
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_runtime
def drop_dead(runtime: Runtime, task_ids: tuple[str, ...], breaker: str | None, *, yes: bool) -> None:
    """Delete dead letters for good."""
    if not yes:
        click.confirm(f"Delete {counted(len(set(task_ids)), 'dead letter')} for good?", abort=True)
    _carry_out(runtime, "dropped", lambda letters: letters.drop(*task_ids, breaker=breaker))


def _carry_out(runtime: Runtime, what: str, act: Callable[[DeadLetters], dict[str, int]]) -> None:
    """Replay or drop dead letters; print and log how many, also if some failed."""
    try:
        with asking_the_broker(runtime):
            done = act(DeadLetters(runtime))
    except DeadLetterError as error:
        _report(runtime, what, error.done)
        raise
    _report(runtime, what, done)


def _report(runtime: Runtime, what: str, done: Mapping[str, int]) -> None:
    for breaker, count in done.items():
        if breaker != UNDECODABLE:
            note(runtime, breaker, f"{counted(count, 'dead letter')} {what}")
    if done:
        click.echo(f"{counted(sum(done.values()), 'dead letter')} {what}")


def _fields(letter: DeadLetter) -> dict[str, Any]:
    values = {field.name: getattr(letter, field.name) for field in fields(letter)}
    return {**values, "history": [step._asdict() for step in letter.history], "body": _text(letter.body)}


def _text(body: bytes) -> str:
    return body.decode(errors="backslashreplace")


def _details(letter: DeadLetter) -> Iterator[Row]:
    yield "task", letter.task
    yield "breaker", letter.breaker
    yield "reason", letter.reason
    yield "since", moment(letter.since)
    yield "died", moment(letter.died_at)
    yield "queue", letter.origin
    yield "attempts", str(letter.attempts)
    yield "args", letter.args
    yield "kwargs", letter.kwargs
    yield "body", _text(letter.body)
    for step in letter.history:
        yield "history", f"{moment(step.at)} {step.what} {step.cause}"
