"""A short chaos run on every broker; the same harness finds what plain Celery loses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos import report
from tests.chaos.run import Outcome, run, schedule_of
from tests.chaos.schedule import Planned, Schedule, Weather
from tests.chaos.stack import Setup
from workers.rabbitmq import rabbitmq_binary

pytestmark = pytest.mark.timeout(600)

#: A dependency is down while the broker takes no messages.
NO_PUBLISHES = Schedule(
    seed=0,
    faults=(Planned("publishes refused", at=1.0, lasts=2.0),),
    weather=(Weather("payments", "5xx", at=0.0), Weather("payments", "up", at=4.0)),
)


def chaos(setup: Setup, schedule: Schedule, tasks: int, directory: Path) -> Outcome:
    outcome = run(setup, schedule, tasks, directory / "run")
    print(report.head(), report.line(setup, outcome), report.findings(outcome, directory), sep="\n")
    return outcome


@pytest.mark.chaos
@pytest.mark.parametrize(("broker", "seed"), [("redis", 4), ("valkey", 7)])
def test_nothing_is_lost(broker: str, seed: int, tmp_path: Path) -> None:
    assert chaos(Setup(broker), schedule_of(seed, broker, 300), 300, tmp_path).clean


@pytest.mark.rabbitmq
def test_nothing_is_lost_on_rabbitmq(tmp_path: Path) -> None:
    if rabbitmq_binary() is None:
        pytest.skip("RabbitMQ is not installed")
    assert chaos(Setup("rabbitmq"), schedule_of(1, "rabbitmq", 300), 300, tmp_path).clean


@pytest.mark.chaos
def test_where_plain_celery_loses_tasks_nothing_is_lost(tmp_path: Path) -> None:
    assert chaos(Setup("valkey", plain=True), NO_PUBLISHES, 300, tmp_path / "plain").account.gone
    assert chaos(Setup("valkey"), NO_PUBLISHES, 300, tmp_path).clean
