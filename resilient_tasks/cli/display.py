"""Tables, and text that was written by strangers, on a terminal or in a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
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


def printable(text: str) -> str:
    """Return text with all characters written out that could steer a terminal, escape and newline among them."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def print_json(value: Any) -> None:
    """Print a value for programs."""
    click.echo(json.dumps(value, indent=2, default=str))


def print_table(columns: Row, rows: Sequence[Row]) -> None:
    """Print a table: for people on a terminal as rich draws it, otherwise as plain text."""
    if is_rich():
        from rich.console import Console  # noqa: PLC0415 - rich is an extra, and takes long to import

        Console(no_color=click.get_current_context().obj.no_color or None).print(rich_table(columns, rows))
    else:
        click.echo("\n".join(plain_lines(columns, rows)))


def is_rich() -> bool:
    """Whether somebody looks at a terminal, and rich is installed."""
    return sys.stdout.isatty() and find_spec("rich") is not None


def plain_lines(columns: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table in plain text."""
    lines = [columns, *([printable(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def rich_table(columns: Row, rows: Sequence[Row]) -> Table:
    """Return a table whose cells are never taken for markup."""
    from rich import box  # noqa: PLC0415 - as above
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(*columns, box=box.SIMPLE)
    for row in rows:
        table.add_row(*(Text(printable(cell), style=_STYLES.get(cell, "")) for cell in row))
    return table
