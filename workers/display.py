"""What a drill shows while it runs: a live table on a terminal, plain lines anywhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.table import Table

from workers.verdict import Row

PLAIN_LINE_SECONDS = 2.0


@dataclass(frozen=True)
class StreamStatus:
    """One dependency and its tasks at one moment."""

    name: str
    breaker: str
    submitted: int
    finished: int
    deferred: int
    failed: int
    rate: float  # finished per second
    evidence: str
    calls_while_failing: int


@dataclass(frozen=True)
class Status:
    """A drill at one moment; ``elapsed`` in seconds."""

    phase: str
    elapsed: float
    streams: Sequence[StreamStatus]


Show = Callable[[Status], object]


@contextmanager
def display(console: Console) -> Iterator[Show]:
    """Yield a function that shows a :class:`Status`."""
    if not console.is_terminal:
        yield PlainLines(console).show
        return
    with Live(console=console, refresh_per_second=4, transient=True) as live:
        yield lambda status: live.update(status_table(status))


class PlainLines:
    """Prints a line at each new phase and every two seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._phase = ""
        self._next_at = 0.0

    def show(self, status: Status) -> None:
        """Print ``status`` if it is time to."""
        if status.phase != self._phase:
            self._phase = status.phase
            self._console.print(f"{status.elapsed:5.1f} s  {status.phase}")
        if status.elapsed >= self._next_at:
            self._next_at = status.elapsed + PLAIN_LINE_SECONDS
            parts = [_in_short(stream) for stream in status.streams]
            self._console.print(f"{status.elapsed:5.1f} s  " + " | ".join(parts), highlight=False)


def _in_short(stream: StreamStatus) -> str:
    deferred = f", {stream.deferred} deferred" if stream.deferred else ""
    failed = f", {stream.failed} FAILED" if stream.failed else ""
    evidence = f" (evidence {stream.evidence})" if stream.evidence else ""
    finished = f"{stream.finished}/{stream.submitted} at {stream.rate:.0f}/s"
    return f"{stream.name} {stream.breaker}{evidence} {finished}{deferred}{failed}"


def status_table(status: Status) -> Table:
    """Return a drill's status as a table."""
    table = Table(title=f"{status.elapsed:5.1f} s   {status.phase}", title_justify="left", expand=False)
    table.add_column("dependency")
    table.add_column("breaker")
    for heading in ("evidence", "submitted", "finished", "per second", "deferred", "failed", "calls while failing"):
        table.add_column(heading, justify="right")
    for stream in status.streams:
        colour = "green" if stream.breaker == "CLOSED" else "yellow" if stream.breaker == "HALF_OPEN" else "red"
        finished = (str(stream.submitted), str(stream.finished), f"{stream.rate:.0f}")
        others = map(str, (stream.deferred, stream.failed, stream.calls_while_failing))
        table.add_row(stream.name, f"[{colour}]{stream.breaker}[/]", stream.evidence, *finished, *others)
    return table


def verdict_table(rows: Sequence[Row]) -> Table:
    """Return the verdict as a table."""
    table = Table(title="verdict", title_justify="left")
    for heading in ("", "measured", "allowed", ""):
        table.add_column(heading)
    for row in rows:
        mark = {True: "[green]ok[/]", False: "[bold red]FAILED[/]", None: ""}[row.ok]
        table.add_row(row.what, row.figure, row.bound, mark)
    return table
