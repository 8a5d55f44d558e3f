"""``flower``: Flower with a page of breakers."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

import click


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
