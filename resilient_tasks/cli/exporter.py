"""``exporter``: the breakers for Prometheus, where no Flower has them in its ``/metrics``."""

from __future__ import annotations

import signal
import sys

import click

from resilient_tasks.cli.common import pass_runtime
from resilient_tasks.worker.runtime import Runtime


@click.command()
@click.option("--port", type=click.IntRange(0, 65535), default=9809, show_default=True, help="0: any that is free.")
@click.option("--address", default="0.0.0.0", show_default=True, help="Of the interface to listen on.")  # noqa: S104 - so exporters do
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
