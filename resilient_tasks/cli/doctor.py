"""``doctor``: what is wrong with a deployment, why it matters, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import click

from resilient_tasks.cli.common import pass_runtime, print_json, print_table, printable
from resilient_tasks.operations.doctor import Finding, Level, examine, look_at
from resilient_tasks.worker.context import Runtime


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of objects.")
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
        _print_advice([finding for finding in findings if finding.why])
    ctx.exit(int(any(finding.level is Level.ERROR for finding in findings)))


def _print_advice(findings: Sequence[Finding]) -> None:
    for finding in findings:
        lines = f"{finding.level}: {finding.what}", f"  why: {finding.why}", f"  do:  {finding.advice}"
        click.echo("\n".join(["", *map(printable, lines)]))
