"""What all commands share: the app's runtime, names of breakers, an unavailable broker; tables and text."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import click
from celery import Celery
from click.shell_completion import CompletionItem

from resilient_tasks.cli import Unavailable
from resilient_tasks.core.model import ALL_KEYS, child_name, did_you_mean, is_child, key_of, parent_of
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.context import Runtime, find_runtime

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

P = ParamSpec("P")
R = TypeVar("R")
Row = Sequence[str]

_STYLES = {
    "CLOSED": "green",
    "OPEN": "bold red",
    "HALF_OPEN": "yellow",
    "FORCED_OPEN": "bold red",
    "DISABLED": "magenta",
    "SHADOW": "cyan",
}

#: Columns of a table that are never cut, names and states; and how much of a word is left in all others.
_WHOLE, _LEAST = 2, 8

json_option = click.option("--json", "as_json", is_flag=True, help="For programs, as JSON.")

#: Names that the answer to an unknown one lists.
MOST_NAMED = 20


def pass_runtime(command: Callable[Concatenate[Runtime, P], R]) -> Callable[P, R]:
    """Give a command the runtime of the app that ``celery -A`` names, as its first argument."""

    @functools.wraps(command)
    def with_runtime(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(_runtime_of(click.get_current_context().obj.app), *args, **kwargs)

    return with_runtime


@functools.lru_cache(maxsize=1)
def _runtime_of(app: Celery) -> Runtime:
    """Return the runtime of an app, with all breakers that its modules define."""
    logging.getLogger("resilient_tasks").addHandler(logging.NullHandler())  # a command prints itself what it did
    celery_internals.import_task_modules(app)
    runtime = find_runtime(app)
    if runtime is None:
        raise click.ClickException(
            f"app {app.main!r} has no Resilience: name the app that has, as in celery -A proj breakers ..."
        )
    return runtime


class BreakerName(click.ParamType):  # type: ignore[type-arg]  # older releases of click know no argument
    """Name of a breaker that the app defines, or of a child of it: ``payments:acme``.

    With ``wildcard`` also ``payments:*``, which :func:`expand` knows; with ``former`` also a name that no code defines.
    """

    name = "breaker"

    def __init__(self, *, wildcard: bool = False, former: bool = False) -> None:
        self._wildcard, self._former = wildcard, former

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        breakers = _runtime_of((ctx or click.get_current_context()).obj.app).breakers
        parent, key = parent_of(value), key_of(value)
        if value in breakers or (parent in breakers and is_child(value)):
            return value
        if parent in breakers and key == ALL_KEYS:
            if not self._wildcard:
                self.fail(f"'{value}' means all children of {parent}: name one breaker", param, ctx)
            return value
        if parent in breakers and key:
            try:
                return child_name(str(parent), key)
            except ConfigurationError as error:
                self.fail(printable(str(error)), param, ctx)
        known, more = sorted(breakers)[:MOST_NAMED], len(breakers) - MOST_NAMED
        defined = ", ".join([*known, *([f"and {more} more"] if more > 0 else [])]) or "none"
        message = f"no breaker is named '{printable(value)}'{did_you_mean(value, breakers) or f'; defined: {defined}'}"
        if not self._former:
            self.fail(message, param, ctx)
        click.echo(message, err=True)
        return value

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so; none if the app cannot be found: completion must not fail."""
        try:
            runtime = _runtime_of(celery_internals.app_named(ctx.find_root().params["app"]))
        except Exception:  # noqa: BLE001 - importing the user's app may raise anything
            return []
        return [CompletionItem(name) for name in sorted(runtime.breakers) if name.startswith(incomplete)]


def expand(runtime: Runtime, names: Iterable[str]) -> list[str]:
    """Return the names, each once, with those of all children that there are now in place of wildcards."""
    found = dict[str, None]()
    for name in names:
        children = runtime.fleet.store.children(str(parent_of(name))) if key_of(name) == ALL_KEYS else [name]
        found.update(dict.fromkeys(sorted(children)))
    return list(found)


@contextmanager
def using_the_broker(runtime: Runtime) -> Iterator[None]:
    """Turn an error of an unavailable broker into one line and an exit code."""
    try:
        yield
    except runtime.queues.errors as error:
        raise Unavailable(f"the broker is unavailable: {type(error).__name__}: {printable(str(error))}") from error


# --- output ---------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Return text with all control characters, escape and newline among them, written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(columns: Row, rows: Sequence[Row]) -> None:
    """Print a table: for people on a terminal as rich draws it, otherwise as plain text."""
    if is_rich():
        rich_console().print(rich_table(columns, rows))
    else:
        click.echo("\n".join(plain_lines(columns, rows)))


def is_rich() -> bool:
    return sys.stdout.isatty() and find_spec("rich") is not None


def rich_console() -> Console:
    """Return the terminal, without colours if they are switched off."""
    from rich.console import Console  # noqa: PLC0415 - rich is an extra, and takes long to import

    return Console(no_color=click.get_current_context().obj.no_color or None)


def plain_lines(columns: Row, rows: Sequence[Row]) -> Iterator[str]:
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def rich_table(columns: Row, rows: Sequence[Row]) -> Table:
    """Return a table whose cells are never taken for markup.

    On a narrow terminal empty columns are left out, and words stay whole in the first columns.
    """
    from rich import box  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    filled = [number for number in range(len(columns)) if not rows or any(row[number] for row in rows)]
    for number in filled:
        words = " ".join([columns[number], *(printable(row[number]) for row in rows)]).split()
        longest = max(map(len, words))
        table.add_column(columns[number], min_width=longest if number < _WHOLE else min(longest, _LEAST))
    for row in rows:
        table.add_row(*(Text(printable(row[number]), style=_STYLES.get(row[number], "")) for number in filled))
    return table
