"""``report``: the outages that are remembered, as tables, Markdown or JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict

import click

from resilient_tasks.cli.common import BreakerName, pass_runtime
from resilient_tasks.cli.display import Row, print_json, print_table, printable
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.monitor.report import moment, rows_of
from resilient_tasks.worker.runtime import Runtime

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


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
    """Tell of outages, the newest first.

    Their causes, the calls avoided, the tasks that waited, and how fast they drained.
    """
    names = runtime.fleet.with_children(runtime.breakers if name is None else [name])
    snapshots = runtime.fleet.store.read_shared([runtime.breaker(each).spec for each in names])
    history, now = runtime.fleet.history, snapshots[0].now if snapshots else 0.0
    outages = history.outages(names, since=0.0 if since is None else now - since)
    estimates = history.estimates(snapshots)
    if form == "json":
        print_json([_fields(outage, estimates.get(outage.breaker)) for outage in outages])
        return
    if not outages:
        click.echo("no outage is remembered")
    for outage in outages:
        _PRINTERS[form](outage, rows_of(outage, estimates.get(outage.breaker)))


def _fields(outage: Outage, estimate: Estimate | None) -> dict[str, object]:
    lasts = outage.drained is None and estimate is not None
    return {
        **asdict(outage),
        "failed_calls": outage.failed_calls,
        "average_answer_age": outage.average_answer_age,
        "drain_rate": outage.drain_rate,
        "estimate": asdict(estimate) if lasts and estimate else None,
    }


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
