"""``dead list``, ``show``, ``replay`` and ``drop``: tasks that failed for good, or expired, while they waited."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import click

from resilient_tasks.cli.common import BreakerName, asking_the_broker, note, pass_runtime
from resilient_tasks.cli.display import Row, plain_lines, print_json, print_table, printable
from resilient_tasks.errors import DeadLetterError
from resilient_tasks.monitor.report import counted, moment
from resilient_tasks.worker.dead_letters import DeadLetter, DeadLetters
from resilient_tasks.worker.decoding import UNDECODABLE
from resilient_tasks.worker.runtime import Runtime


class _FormerBreakerName(BreakerName):
    """Name of any breaker: a deploy may have removed it and left its dead letters."""

    def unknown(self, message: str, _param: click.Parameter | None, _ctx: click.Context | None) -> None:
        """Say so, and go on."""
        click.echo(message, err=True)


_breaker = click.option(
    "--breaker", type=_FormerBreakerName(), help="Of this breaker only, also of one that nobody defines any more."
)
_ids = click.argument("task_ids", metavar="ID...", nargs=-1, required=True)


@click.group()
def dead() -> None:
    """See, replay and drop dead letters.

    They are tasks that failed for good, or expired, while they waited.
    """


@dead.command("list")
@_breaker
@click.option("--limit", type=click.IntRange(min=1), default=100, show_default=True, help="Most of each breaker.")
@click.option("--id", "ids_only", is_flag=True, help="For scripts: ids alone, one per line.")
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
@pass_runtime
def list_letters(runtime: Runtime, breaker: str | None, *, limit: int, ids_only: bool, as_json: bool) -> None:
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


@dead.command()
@_ids
@_breaker
@click.option("--yes", is_flag=True, help="Do not ask.")
@pass_runtime
def drop(runtime: Runtime, task_ids: tuple[str, ...], breaker: str | None, *, yes: bool) -> None:
    """Delete dead letters for good."""
    if not yes:
        click.confirm(f"Delete {counted(len(set(task_ids)), 'dead letter')} for good?", abort=True)
    _carry_out(runtime, "dropped", lambda letters: letters.drop(*task_ids, breaker=breaker))


def _carry_out(runtime: Runtime, what: str, act: Callable[[DeadLetters], dict[str, int]]) -> None:
    """Do something to dead letters, and tell and log how many it was done to, also if it was not all."""
    try:
        with asking_the_broker(runtime):
            done = act(DeadLetters(runtime))
    except DeadLetterError as error:
        _tell(runtime, what, error.done)
        raise
    _tell(runtime, what, done)


def _tell(runtime: Runtime, what: str, done: Mapping[str, int]) -> None:
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
