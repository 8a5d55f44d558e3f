"""The outage drill behind ``make demo``: steady load, a real outage, and a verdict from real figures.

After half a minute of healthy traffic two dependencies fail at the same time: payments hangs, called without a
client time-out, and accounts answers 500. Mail stays healthy. Then both recover, and the tasks that waited have
to finish by themselves. The breakers have the README's policy.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import click
from rich.console import Console

from resilient_tasks import Breaker
from resilient_tasks.errors import StoreError
from resilient_tasks.monitor import report
from workers.app import accounts, app, payments, resilience
from workers.display import Show, Status, StreamStatus, display, verdict_table
from workers.load import BreakerEvent, EventLog, Load, Results, Stream
from workers.processes import StartError
from workers.service import DEPENDENCIES
from workers.stack import CONCURRENCY, WORKERS, Stack, announce, exit_on_sigterm, new_run, start_stack
from workers.tasks import balance, charge, send_mail
from workers.verdict import Limits, Marks, Recording, judge, passed

STREAMS = (
    Stream("payments", charge, rate=20),
    Stream("accounts", balance, rate=10, keys=40),  # each has been looked up before the outage
    Stream("mail", send_mail, rate=20),
)
LATENCY_SECONDS = 0.01
SETTLE_SECONDS = 3.0  # of the first phase that do not count as "before"
RATE_SECONDS = 3.0  # over which the table's rates are taken
REFRESH_SECONDS = 0.5
PLAIN_WIDTH = 120


@dataclass(frozen=True)
class Plan:
    """How long each phase lasts, in seconds; ``drain`` at most."""

    before: float
    outage: float
    after: float
    drain: float


class Drill:
    """One drill on a running stack."""

    def __init__(self, stack: Stack, plan: Plan, console: Console) -> None:
        self._service = stack.service
        self._plan = plan
        self._console = console
        self._load = Load(STREAMS)
        self._results = Results(app)
        self._events = EventLog(app, on_transition=self._print_transition)
        self._started_at = time.monotonic()

    def run(self) -> Recording:
        """Go through all phases and return what happened."""
        self._make("up", *DEPENDENCIES)
        self._events.start()
        self._load.start()
        try:
            with display(self._console) as show:
                marks = self._phases(show)
        finally:
            self._events.finish()
        return self._recording(marks)

    def _phases(self, show: Show) -> Marks:
        measured_from = time.time() + SETTLE_SECONDS
        self._go_on(self._plan.before, "steady load, all services are healthy", show)
        failed_at = time.time()
        self._make("hang", "payments")
        self._make("5xx", "accounts")
        self._go_on(self._plan.outage, "OUTAGE: payments hangs, accounts answers 500", show)
        self._make("up", "payments", "accounts")
        healed_at = time.time()
        self._go_on(self._plan.after, "both services are healthy again, the load goes on", show)
        self._load.finish()
        self._go_on(self._plan.drain, "no more load, the waiting tasks finish", show, until_idle=True)
        return Marks(measured_from, failed_at, healed_at)

    def _make(self, health: str, *dependencies: str) -> None:
        for name in dependencies:
            self._service.make(name, health, latency=LATENCY_SECONDS)

    def _go_on(self, seconds: float, phase: str, show: Show, *, until_idle: bool = False) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._load.check()
            self._results.refresh(self._load.submissions[:])
            show(self._status(phase))
            if until_idle and not self._results.waiting:
                return
            time.sleep(min(left, REFRESH_SECONDS))

    def _status(self, phase: str) -> Status:
        stats = self._service.stats()
        submissions = self._load.submissions[:]
        submitted = Counter(submission.stream for submission in submissions)
        finished, failed = self._results.ended(submissions)
        rates = self._results.rates(submissions, seconds=RATE_SECONDS)
        streams = [
            StreamStatus(
                name=stream.name,
                breaker=self._events.state_of(stream.name),
                submitted=submitted[stream.name],
                finished=finished[stream.name],
                deferred=self._results.waiting.get(stream.name, Counter())["DEFERRED"],
                failed=failed[stream.name],
                rate=rates[stream.name],
                evidence=evidence_of(stream.name),
                calls_while_failing=len(stats[stream.name]["arrivals_while_failing"]),
            )
            for stream in STREAMS
        ]
        return Status(phase, time.monotonic() - self._started_at, streams)

    def _print_transition(self, event: BreakerEvent) -> None:
        self._console.print(f"         {event.breaker}: {event.type}  {event.reason}", highlight=False)

    def _recording(self, marks: Marks) -> Recording:
        submissions = self._load.submissions
        return Recording(
            submissions=submissions,
            finished=self._results.finished,
            strays=self._results.strays(submissions, [stream.task.name for stream in STREAMS]),
            stats=self._service.stats(),
            transitions=self._events.transitions,
            deferred=frozenset(self._events.deferred),
            fallbacks=Counter(filter(None, (source_of(submission.task_id) for submission in submissions))),
            peak_deferred=self._results.peak_deferred,
            limits={breaker.name: limits_of(breaker) for breaker in (payments, accounts)},
            marks=marks,
        )


def source_of(task_id: str) -> str | None:
    """Return which fallback answered a task, if one did."""
    provenance = resilience.provenance(task_id)
    return provenance.source if provenance else None


def evidence_of(name: str) -> str:
    """Return how near a breaker is to opening, e.g. ``"7 of 10"``."""
    try:
        return report.evidence_of(resilience[name].snapshot())
    except StoreError:
        return ""


def limits_of(breaker: Breaker) -> Limits:
    """Return how many calls a breaker's policy lets through to a service that fails."""
    policy = breaker.policy
    return Limits(
        calls_to_open=policy.minimum_calls,
        trial_calls=policy.trial_calls,
        slots=len(WORKERS) * (CONCURRENCY + resilience.settings.spare_slots),
        first_open=policy.open_duration,
        growth=policy.open_multiplier,
        jitter=policy.open_jitter,
    )


@click.command(help=__doc__)
@click.option("--keep", is_flag=True, help="Leave everything running, to explore; `make down` stops it.")
@click.option("--before", default=30.0, show_default=True, help="Seconds of healthy load.")
@click.option("--outage", default=25.0, show_default=True, help="Seconds of outage.")
@click.option("--after", default=8.0, show_default=True, help="Seconds of load after healing.")
@click.option("--drain", default=90.0, show_default=True, help="Seconds the waiting tasks may take, at most.")
def main(*, keep: bool, before: float, outage: float, after: float, drain: float) -> None:
    """Run the drill; exit code 1 if a task was lost, the outage was noticed late or mail was slowed down."""
    exit_on_sigterm()
    console = Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)
    try:
        stack = start_stack(new_run(), detached=keep, progress=console.print)
    except StartError as error:
        raise click.ClickException(str(error)) from error
    with stopped_unless(stack, keep=keep):
        os.environ.update(stack.environment)  # read by the app when it connects for the first time
        rows = judge(Drill(stack, Plan(before, outage, after, drain), console).run())
    console.print(verdict_table(rows))
    if keep:
        announce(stack)
    elif passed(rows):
        shutil.rmtree(stack.directory)
    else:
        console.print(f"logs: {stack.directory}")
    sys.exit(0 if passed(rows) else 1)


@contextmanager
def stopped_unless(stack: Stack, *, keep: bool) -> Iterator[None]:
    """Stop the stack at the end, unless it is to be kept and nothing went wrong."""
    try:
        yield
    except BaseException:
        stack.stop()
        raise
    if not keep:
        stack.stop()


if __name__ == "__main__":
    main()
