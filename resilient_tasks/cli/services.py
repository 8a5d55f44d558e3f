"""``doctor``, ``exporter``, ``monitoring`` and ``flower``: a deployment examined, and watched by other programs."""

from __future__ import annotations

import importlib
import shutil
import signal
import sys
from dataclasses import asdict
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import click

from resilient_tasks.cli.common import json_option, pass_runtime, print_json, print_table, printable
from resilient_tasks.operations.doctor import Level, examine, look_at
from resilient_tasks.worker.context import Runtime


@click.command()
@json_option
@click.option("--timeout", type=click.FloatRange(min=0.1), default=1.0, show_default=True, help="Of workers, seconds.")
@click.pass_context
@pass_runtime
def doctor(runtime: Runtime, ctx: click.Context, *, as_json: bool, timeout: float) -> None:
    """Examine the deployment and say what to do.

    It looks at store, broker, workers, beat and settings. The exit code is 1 if anything is in error; warnings leave
    it 0.
    """
    findings = examine(look_at(runtime, timeout=timeout))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(("CHECK", "LEVEL", "WHAT"), [(each.check, str(each.level), each.what) for each in findings])
        for each in (finding for finding in findings if finding.why):
            lines = f"{each.level}: {each.what}", f"  why: {each.why}", f"  do:  {each.advice}"
            click.echo("\n".join(["", *map(printable, lines)]))
    ctx.exit(int(any(finding.level is Level.ERROR for finding in findings)))


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=9809, show_default=True, help="0: any that is free.")
@click.option("--address", default="127.0.0.1", show_default=True, help="Of the interface to listen on; 0.0.0.0: all.")
@pass_runtime
def exporter(runtime: Runtime, port: int, address: str) -> None:
    """Serve all breakers to Prometheus, until interrupted.

    One exporter is enough for a fleet.
    """
    try:
        from prometheus_client import CollectorRegistry, start_http_server  # noqa: PLC0415 - an extra

        from resilient_tasks.prometheus import register  # noqa: PLC0415 - as above
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: install resilient-tasks[metrics]") from error
    registry = CollectorRegistry()
    register(runtime.app, registry)
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {address}:{port}: {error.strerror or error}") from error
    click.echo(f"metrics of {len(runtime.breakers)} breakers on http://{address}:{server.server_port}/metrics")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        thread.join()
    except KeyboardInterrupt:
        sys.exit(0)


@click.command()
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def monitoring(directory: Path) -> None:
    """Write alert rules for Prometheus and a dashboard for Grafana to DIRECTORY.

    Files of the same names are replaced.
    """
    shutil.copytree(str(files("resilient_tasks") / "monitoring"), directory, dirs_exist_ok=True)
    click.echo(f"written to {directory}: alerts.yml, grafana/dashboards/breakers.json, and how to load them")


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def flower(ctx: click.Context, options: tuple[str, ...]) -> None:
    """Start Flower with a page of breakers.

    Takes Flower's own options.
    """
    if find_spec("flower") is None:
        raise click.ClickException("Flower is not installed: pip install 'resilient-tasks[flower]'")
    importlib.import_module("resilient_tasks.flower.install")  # only now: Flower is an extra, and takes long to import
    ctx.invoke(importlib.import_module("flower.command").flower, tornado_argv=options)
