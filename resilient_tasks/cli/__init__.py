"""``celery -A proj breakers ...``: breakers shown and controlled from a terminal.

Celery imports this module for each of its own commands too, so it knows only where ours are.

Exit codes: 0 done; 1 refused or impossible; 2 wrong usage, e.g. an unknown breaker; 69 the store, or the broker, is
unavailable. ``show`` also returns 10 and 11, see there.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import click
from click_didyoumean import DYMGroup

from resilient_tasks.errors import ResilienceError, StoreError

_COMMANDS = {
    "list": "states:list_breakers",
    "show": "states:show",
    "watch": "states:watch",
    "trip": "states:trip",
    "isolate": "states:isolate",
    "disable": "states:disable",
    "shadow": "states:shadow",
    "reset": "states:reset",
    "deferred": "tasks:deferred",
    "resume": "tasks:resume",
    "drop": "tasks:drop",
    "dead": "tasks:dead",
    "report": "states:report",
    "doctor": "services:doctor",
    "flower": "services:flower",
    "exporter": "services:exporter",
    "monitoring": "services:monitoring",
}


class Unavailable(click.ClickException):
    """The store, or the broker, is unavailable."""

    exit_code = os.EX_UNAVAILABLE


class _Commands(DYMGroup):  # type: ignore[misc]  # click_didyoumean is untyped
    """Imports a command on first use, and prints one line instead of a traceback for expected errors."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, _ctx: click.Context, name: str) -> click.Command | None:
        module, _, command = _COMMANDS.get(name, "").partition(":")
        return getattr(importlib.import_module(f"{__name__}.{module}"), command) if command else None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StoreError as error:
            raise Unavailable(str(error)) from error
        except ResilienceError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands)
def breakers() -> None:
    """Show and control circuit breakers, and the tasks that wait for them."""
