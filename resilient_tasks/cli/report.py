"""``report``: the outages that are remembered, as tables, Markdown or JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TypeVar

import click

from resilient_tasks.cli.common import BreakerName, pass_runtime
from resilient_tasks.cli.display import Row, print_json, print_table, printable
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.monitor.story import in_words
from resilient_tasks.monitor.words import duration, moment
from resilient_tasks.worker.runtime import Runtime

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_T = TypeVar("_T")


class _Span(click.ParamType):  # type: ignore[type-arg]  # older releases of click know no argument
    """A span of time up to now, in seconds."""

    name = "span"

    def convert(self, value: str | float, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return ``"90min"`` as 5400.0."""
        match = re.fullmatch(r"(\d{1,9})\s*(s|min|h|d|w)", str(value), re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no span of time: allowed is a number with s, min, h, d or w, as 24h", param, ctx)
        return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.argument("name", type=BreakerName(), required=False)
@click.option("--since", type=_Span(), help="Only outages that were not over by then, e.g. 24h, 90min, 7d.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["terminal", "markdown", "json"]),
    default="terminal",
    show_default=True,
    help="How to print it.",
)
@pass_runtime
def report(runtime: Runtime, name: str | None, *, since: float | None, form: str) -> None:
    """Tell of outages, the newest first: causes, calls avoided, tasks that waited, and how fast they drained."""
    names = list(runtime.breakers) if name is None else [name]
    snapshots = runtime.fleet.store.read_shared([runtime.breakers[each].spec for each in names])
    story, now = runtime.fleet.story, snapshots[0].now if snapshots else 0.0
    outages = story.outages(names, since=0.0 if since is None else now - since)
    estimates = story.estimates(snapshots)
    if form == "json":
        print_json([_fields(outage, estimates.get(outage.breaker)) for outage in outages])
        return
    if not outages:
        click.echo("no outage is remembered")
    for outage in outages:
        estimate = None if outage.drained else estimates.get(outage.breaker)
        _PRINTERS[form](outage, [row for row in _rows(outage, estimate) if row[1]])


def _fields(outage: Outage, estimate: Estimate | None) -> dict[str, object]:
    lasts = outage.drained is None and estimate is not None
    return {
        **asdict(outage),
        "failed_calls": outage.failed_calls,
        "average_answer_age": outage.average_answer_age,
        "drain_rate": outage.drain_rate,
        "estimate": asdict(estimate) if lasts and estimate else None,
    }


def _rows(outage: Outage, estimate: Estimate | None) -> Sequence[Row]:
    counts = outage.counts
    return (
        ("opened", moment(outage.opened)),
        ("closed", _with(outage.closed, lambda at: f"{moment(at)}, after {duration(at - outage.opened)}") or "not yet"),
        ("drained", _drained(outage)),
        ("outlook", in_words(estimate) if estimate else ""),
        ("reason", outage.reason),
        ("by", outage.actor),
        ("openings", str(outage.openings)),
        ("causes", ", ".join(f"{cause} {count}" for cause, count in outage.causes)),
        ("calls that failed", str(outage.failed_calls)),
        ("calls avoided", str(counts.refused)),
        ("tasks deferred", str(counts.deferred)),
        ("tasks resumed", str(counts.resumed)),
        ("served from fallback", ", ".join(f"{source} {count}" for source, count in counts.fallbacks.items())),
        ("how stale", _stale(outage)),
        ("tasks failed", str(counts.failed)),
        ("dead-lettered", f"{counts.dead}, {counts.expired} of them expired" if counts.expired else str(counts.dead)),
        ("revoked or dropped", str(counts.revoked + counts.dropped)),
        ("longest wait", duration(outage.longest_wait)),
        ("delivered again", str(counts.redelivered)),
    )


def _with(value: _T | None, words: Callable[[_T], str]) -> str:
    return "" if value is None else words(value)


def _drained(outage: Outage) -> str:
    if outage.closed is None or outage.drained is None:
        return "not yet"
    words = f"{moment(outage.drained)}, {duration(outage.drained - outage.closed)} after it closed"
    return words + _with(outage.drain_rate, lambda rate: f", {rate:,.1f} tasks/s")


def _stale(outage: Outage) -> str:
    if outage.oldest_answer is None:
        return ""
    average = _with(outage.average_answer_age, lambda age: f", {duration(age)} on average")
    return f"{duration(outage.oldest_answer)} at most{average}"


def _print_terminal(outage: Outage, rows: Sequence[Row]) -> None:
    print_table(("BREAKER", outage.breaker), rows)
    click.echo()


def _print_markdown(outage: Outage, rows: Sequence[Row]) -> None:
    lines = [f"## Outage of {_escaped(outage.breaker)}, {moment(outage.opened)}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_escaped(value)} |" for name, value in rows]
    click.echo("\n".join([*lines, ""]))


def _escaped(text: str) -> str:
    """Return text that is no markup in Markdown, whoever has written it."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", printable(text))


_PRINTERS = {"terminal": _print_terminal, "markdown": _print_markdown}
