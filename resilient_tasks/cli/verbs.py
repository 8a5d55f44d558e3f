"""``trip``, ``isolate``, ``disable``, ``shadow`` and ``reset``: what an operator can do to breakers."""

from __future__ import annotations

import click

from resilient_tasks.breaker import this_user
from resilient_tasks.cli.common import BreakerNames, expand, pass_runtime
from resilient_tasks.core.model import Verb
from resilient_tasks.worker.runtime import Runtime


def _command(verb: Verb, does: str) -> click.Command:
    @click.command(verb.value, help=does)
    @click.argument("names", metavar="NAME...", nargs=-1, required=True, type=BreakerNames())
    @click.option("--reason", default="", metavar="TEXT", help="Kept with the state, for whoever asks why.")
    @pass_runtime
    def carry_out(runtime: Runtime, names: tuple[str, ...], reason: str) -> None:
        for name in expand(runtime, names):
            snapshot = runtime.fleet.command(runtime.breaker(name).spec, verb, reason, this_user())
            click.echo(f"{name} is {snapshot.state}")

    return carry_out


trip = _command(Verb.TRIP, "Open breakers as if they had tripped: they heal by themselves.")
isolate = _command(Verb.ISOLATE, "Refuse all calls, probes too, until reset.")
disable = _command(Verb.DISABLE, "Admit all calls and count nothing, until reset.")
shadow = _command(Verb.SHADOW, "Admit all calls and tell when a breaker would have opened.")
reset = _command(Verb.RESET, "Close breakers, with an empty window.")
