"""``list``, ``show``, ``watch``, the operator commands and ``report``: the breakers themselves."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict

import click

from resilient_tasks.breaker import this_user
from resilient_tasks.cli.common import (
    BreakerName,
    Row,
    expand,
    is_rich,
    json_option,
    pass_runtime,
    plain_lines,
    print_json,
    print_table,
    printable,
    rich_console,
    rich_table,
)
from resilient_tasks.core.model import ADMITTING, Snapshot, State, Verb, parent_of
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.errors import StoreError
from resilient_tasks.monitor.report import counted, duration, evidence_of, in_words, moment, rows_of, share
from resilient_tasks.worker.context import Runtime

REFUSES = 10
TRIALS_ONLY = 11

_COLUMNS = (
    "BREAKER", "STATE", "FOR", "EVIDENCE", "CALLS", "FAILED", "SLOW", "DEFERRED", "OLDEST", "NEXT PROBE", "REASON",
    "BY",
)  # fmt: skip


@click.command("list")
@click.argument("names", metavar="[NAME]...", nargs=-1, type=BreakerName(wildcard=True))
@json_option
@pass_runtime
def list_breakers(runtime: Runtime, names: tuple[str, ...], *, as_json: bool) -> None:
    """List all breakers, those that are not CLOSED first.

    Then those with waiting tasks. Of children only those that are not CLOSED, or that tasks wait for. Their parent's
    NAME:* lists all of them.
    """
    snapshots = _read(runtime, expand(runtime, names)) if names else _in_order(runtime.read())
    if as_json:
        print_json([snapshot.as_dict() for snapshot in snapshots])
    else:
        print_table(_COLUMNS, [_row(snapshot) for snapshot in snapshots])


@click.command()
@click.argument("name", type=BreakerName())
@json_option
@click.pass_context
@pass_runtime
def show(runtime: Runtime, ctx: click.Context, name: str, *, as_json: bool) -> None:
    """Show one breaker.

    The exit code gives its state: 0 if it admits calls (CLOSED, DISABLED, SHADOW), 10 if it refuses them (OPEN,
    FORCED_OPEN), 11 if it admits trials only (HALF_OPEN).
    """
    [snapshot] = _read(runtime, [name])
    estimate = runtime.fleet.history.estimates([snapshot])[name] if snapshot.deferred else None
    if as_json:
        print_json({**snapshot.as_dict(), "estimate": estimate and asdict(estimate)})
    else:
        outlook = [("outlook", in_words(estimate))] if estimate else []
        policy = runtime.breaker(name).policy
        about = [(field, text) for field in ("description", "runbook") if (text := getattr(policy, field))]
        details = [*_details(snapshot), *outlook, *_undecided(runtime, name), *about]
        click.echo("\n".join(plain_lines(("breaker", name), details)))
    refuses = TRIALS_ONLY if snapshot.state is State.HALF_OPEN else REFUSES
    ctx.exit(0 if snapshot.state in ADMITTING else refuses)


@click.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Seconds.")
@pass_runtime
def watch(runtime: Runtime, *, interval: float) -> None:
    """Show all breakers, live, until interrupted."""
    try:
        if is_rich():
            _watch_live(runtime, interval)
        else:
            for caption, rows in _looks(runtime, interval):
                click.echo("\n".join([caption, *plain_lines(_COLUMNS, rows), ""]))
    except KeyboardInterrupt:
        sys.exit(0)


def _watch_live(runtime: Runtime, interval: float) -> None:
    from rich.live import Live  # noqa: PLC0415 - rich is an extra, and takes long to import

    with Live(console=rich_console(), auto_refresh=False, screen=True) as live:
        for caption, rows in _looks(runtime, interval):
            table = rich_table(_COLUMNS, rows)
            table.title = caption
            live.update(table, refresh=True)


def _looks(runtime: Runtime, interval: float) -> Iterator[tuple[str, Sequence[Row]]]:
    """Yield a caption and rows every so many seconds; the last state while the store is unavailable."""
    rows: list[Row] = []
    known = "never"
    while True:
        try:
            rows = [_row(snapshot) for snapshot in _in_order(runtime.read())]
            caption = known = moment(time.time())
        except StoreError:
            caption = f"the store is unavailable; last read: {known}"
        yield caption, rows
        time.sleep(interval)


def _read(runtime: Runtime, names: Iterable[str]) -> list[Snapshot]:
    return _in_order(runtime.fleet.store.read_shared([runtime.breaker(name).spec for name in names]))


def _in_order(snapshots: Iterable[Snapshot]) -> list[Snapshot]:
    return sorted(snapshots, key=lambda each: (each.state is State.CLOSED, not each.deferred, each.name))


def _row(snapshot: Snapshot) -> Row:
    oldest = snapshot.oldest_deferred_at
    return (
        snapshot.name,
        str(snapshot.state),
        duration(snapshot.now - snapshot.since) if snapshot.epoch else "",
        evidence_of(snapshot),
        str(snapshot.calls),
        share(snapshot.failure_rate, snapshot.calls),
        share(snapshot.slow_rate, snapshot.calls),
        str(snapshot.deferred),
        duration(None if oldest is None else snapshot.now - oldest),
        _next_probe(snapshot),
        snapshot.reason,
        snapshot.actor,
    )


def _next_probe(snapshot: Snapshot) -> str:
    due = snapshot.next_probe_at
    if due is None:
        return ""
    return f"in {duration(due - snapshot.now)}" if due > snapshot.now else "due"


def _details(snapshot: Snapshot) -> list[Row]:
    calls, limit, would_open = snapshot.calls, snapshot.concurrency_limit, snapshot.would_have_opened
    shadowed = would_open or snapshot.state is State.SHADOW
    return [
        ("state", str(snapshot.state)),
        ("since", moment(snapshot.since if snapshot.epoch else None)),
        ("reason", snapshot.reason),
        ("by", snapshot.actor),
        ("evidence", evidence_of(snapshot)),
        ("calls", str(calls)),
        ("failed", f"{snapshot.failures} {share(snapshot.failure_rate, calls)}"),
        ("slow", f"{snapshot.slow} {share(snapshot.slow_rate, calls)}"),
        ("openings in a row", str(snapshot.openings)),
        ("next probe", _next_probe(snapshot)),
        ("trials", str(snapshot.trials)),
        *([] if limit is None else [("in flight", f"{snapshot.in_flight} of {limit}")]),
        ("deferred", str(snapshot.deferred)),
        ("oldest deferred", moment(snapshot.oldest_deferred_at)),
        *([("would have opened", counted(would_open, "time"))] if shadowed else []),
    ]


def _undecided(runtime: Runtime, name: str) -> Iterator[Row]:
    types: set[str] = set()
    with suppress(StoreError):  # the state is shown without it
        for minute in runtime.fleet.history.minutes(parent_of(name) or name):
            types.update(minute.counts.undecided)
    if types:
        yield "not counted", f"{', '.join(sorted(types))}: no rule knows it, write failures= or ignore="


def _command(verb: Verb, does: str) -> click.Command:
    @click.command(verb.value, help=does)
    @click.argument("names", metavar="NAME...", nargs=-1, required=True, type=BreakerName(wildcard=True))
    @click.option("--reason", default="", metavar="TEXT", help="Stored with the state.")
    @pass_runtime
    def carry_out(runtime: Runtime, names: tuple[str, ...], reason: str) -> None:
        for name in expand(runtime, names):
            snapshot = runtime.fleet.command(runtime.breaker(name).spec, verb, reason, this_user())
            click.echo(f"{name} is {snapshot.state}")

    return carry_out


trip = _command(Verb.TRIP, "Open breakers as if they had tripped: they heal by themselves.")
isolate = _command(Verb.ISOLATE, "Refuse all calls, probes too, until reset.")
disable = _command(Verb.DISABLE, "Admit all calls and count nothing, until reset.")
shadow = _command(Verb.SHADOW, "Admit all calls and report when a breaker would have opened.")
reset = _command(Verb.RESET, "Close breakers, without evidence.")


_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400, "w": 604800}


def _span(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Return ``"90min"`` as 5400.0 seconds."""
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9})\s*(s|min|h|d|w)", value, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{value!r} is no span of time: allowed is a number with s, min, h, d or w, as 24h")
    return float(match[1]) * _UNITS[match[2]]


@click.command()
@click.argument("name", type=BreakerName(), required=False)
@click.option(
    "--since", metavar="SPAN", callback=_span, help="Only outages that were not over by then, e.g. 24h, 90min, 7d."
)
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
    """Report outages, the newest first.

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
        rows = rows_of(outage, estimates.get(outage.breaker))
        if form == "terminal":
            print_table(("BREAKER", outage.breaker), rows)
        else:
            title = f"## Outage of {_escaped(outage.breaker)}, {moment(outage.opened)}"
            cells = [f"| {name} | {_escaped(value)} |" for name, value in rows]
            click.echo("\n".join([title, "", "| | |", "|---|---|", *cells]))
        click.echo()


def _fields(outage: Outage, estimate: Estimate | None) -> dict[str, object]:
    return {
        **asdict(outage),
        "failed_calls": outage.failed_calls,
        "average_answer_age": outage.average_answer_age,
        "drain_rate": outage.drain_rate,
        "estimate": asdict(estimate) if estimate and outage.drained is None else None,
    }


def _escaped(text: str) -> str:
    """Return text that is no markup in Markdown, whatever it contains."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", printable(text))
