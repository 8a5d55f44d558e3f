"""``python -m tests.chaos``: faults at random, every task accounted for."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import click

from tests.chaos import report
from tests.chaos.faults import FAULTS, possible_faults
from tests.chaos.run import Outcome, run, schedule_of
from tests.chaos.stack import Setup
from workers.stack import new_run


@click.command(help=__doc__)
@click.option("--broker", type=click.Choice(["redis", "valkey", "rabbitmq"]), default="valkey", show_default=True)
@click.option("--seeds", default=20, show_default=True, help="How many runs.")
@click.option("--first", default=1, show_default=True, help="Seed of the first run; with --seeds 1 that one again.")
@click.option("--tasks", default=2000, show_default=True, help="Tasks per run.")
@click.option("--baseline", is_flag=True, help="Also plain Celery with autoretry_for, on the same schedules.")
@click.option("--fsync", type=click.Choice(["always", "everysec"]), default="always", show_default=True)
def main(*, broker: str, seeds: int, first: int, tasks: int, baseline: bool, fsync: str) -> None:
    """Run the seeds one after the other and report."""
    setups = [Setup(broker, fsync=fsync), *([Setup(broker, plain=True, fsync=fsync)] if baseline else [])]
    outcomes: dict[Setup, list[Outcome]] = {setup: [] for setup in setups}
    for impossible in sorted(FAULTS.keys() - possible_faults(broker).keys()):
        click.echo(f"not possible here: {impossible}")
    directory = new_run()
    click.echo(report.head())
    for seed in range(first, first + seeds):
        for setup in setups:
            outcomes[setup].append(_run_and_report(setup, seed, tasks, directory / f"{report.name_of(setup)}-{seed}"))
    for setup in setups:
        click.echo(report.total(setup, outcomes[setup]))
    sys.exit(not all(outcome.clean for outcome in outcomes[setups[0]]))


def _run_and_report(setup: Setup, seed: int, tasks: int, directory: Path) -> Outcome:
    outcome = run(setup, schedule_of(seed, setup.broker, tasks), tasks, directory)
    click.echo(report.line(setup, outcome))
    if outcome.clean:
        shutil.rmtree(directory)
    elif not setup.plain:
        click.echo(report.findings(outcome, directory))
    return outcome


if __name__ == "__main__":
    main()
