"""``exporter``: the breakers for Prometheus, where no Flower tells of them."""

from __future__ import annotations

import signal
import sys
from functools import partial
from types import FrameType

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
    from resilient_tasks.monitor.exposition import Exposition, ExpositionServer  # noqa: PLC0415 - `--help` needs none
    from resilient_tasks.worker.subjects import read_subjects  # noqa: PLC0415 - as above

    try:
        server = ExpositionServer(Exposition(partial(read_subjects, runtime)), address, port)
    except OSError as error:
        raise click.ClickException(f"cannot listen on {address}:{port}: {error.strerror or error}") from error
    click.echo(f"metrics of {len(runtime.breakers)} breakers on http://{address}:{server.port}/metrics")
    signal.signal(signal.SIGTERM, _end)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


def _end(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(0)
