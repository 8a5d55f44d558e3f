"""Tables, and text from untrusted sources, on a terminal or in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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


def printable(text: str) -> str:
    """Return text with all control characters, escape and newline among them, written out."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(columns: Row, rows: Sequence[Row]) -> None:
    """Print a table: for people on a terminal as rich draws it, otherwise as plain text."""
    if is_rich():
        rich_console().print(rich_table(columns, rows))
    else:
        click.echo("\n".join(plain_lines(columns, rows)))


def is_rich() -> bool:
    """Whether the output is a terminal, and rich is installed."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def rich_console() -> Console:
    """Return the terminal, without colours if they are switched off."""
    from rich.console import Console  # noqa: PLC0415 - rich is an extra, and takes long to import

    return Console(no_color=click.get_current_context().obj.no_color or None)


def plain_lines(columns: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in plain text."""
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
