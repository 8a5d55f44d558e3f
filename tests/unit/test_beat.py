"""The beat entry is there however late a schedule is assigned, and sends a tick only while something is due."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from celery.beat import PersistentScheduler, Scheduler, Service
from celery.schedules import schedule
from celery.signals import beat_init

from resilient_tasks import Breaker, Resilience
from resilient_tasks.core.model import Snapshot
from resilient_tasks.store.base import Spec
from resilient_tasks.store.local import LocalStore
from resilient_tasks.testing import Clock, force
from resilient_tasks.worker.beat import TickSchedule
from resilient_tasks.worker.context import TICK_ENTRY, TICK_TASK
from tests.support.doubles import FlakyStore

OWN = {"own": {"task": "own", "schedule": 3600.0}}
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)


@pytest.fixture
def resilience(app: Celery) -> Resilience:
    return Resilience(app, tick_interval=0.5)


class StoreWithDeferredTask(LocalStore):
    """A store that knows of one task that waits."""

    def __init__(self, clock: Clock, deadline: float | None = None) -> None:
        super().__init__(clock)
        self.deadline = deadline

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        return [replace(snapshot, deferred=1, next_deadline_at=self.deadline) for snapshot in super().read(specs)]


def start_beat(app: Celery, tmp_path: Path, scheduler: type = PersistentScheduler) -> Any:
    """Do what the first lines of beat's ``start`` do, and return its scheduler."""
    beat = Service(app, schedule_filename=str(tmp_path / "schedule"), scheduler_cls=scheduler)
    assert beat.scheduler.schedule is not None  # built before a worker knows
    beat_init.send(sender=beat)
    return beat.scheduler


def entries_of(app: Celery, tmp_path: Path, scheduler: type = PersistentScheduler) -> dict[str, Any]:
    """Start beat and return what it would send."""
    return dict(start_beat(app, tmp_path, scheduler).schedule)


# --- the entry is there -----------------------------------------------------------------------------


@pytest.mark.parametrize("assigned", ["never", "before", "after init_app"])
def test_whether_and_whenever_a_schedule_is_assigned(app: Celery, tmp_path: Path, assigned: str) -> None:
    if assigned == "before":
        app.conf.beat_schedule = OWN
    Resilience(app)
    if assigned == "after init_app":
        app.conf.beat_schedule = OWN
    assert {TICK_ENTRY, *(() if assigned == "never" else OWN)} <= entries_of(app, tmp_path).keys()


@pytest.mark.parametrize("scheduler", [PersistentScheduler, Scheduler])
def test_assigned_after_everything_else(app: Celery, resilience: Resilience, tmp_path: Path, scheduler: type) -> None:
    app.finalize()
    assert TICK_ENTRY in app.conf.beat_schedule
    app.conf.beat_schedule = OWN
    assert TICK_ENTRY not in app.conf.beat_schedule
    assert {TICK_ENTRY, "own"} <= entries_of(app, tmp_path, scheduler).keys()


def test_changed_by_a_signal_of_celerys(app: Celery, resilience: Resilience, tmp_path: Path) -> None:
    @app.on_after_finalize.connect
    def add(sender: Celery, **_: Any) -> None:
        sender.add_periodic_task(60.0, sender.signature("own"), name="periodic")

    app.finalize()
    assert {TICK_ENTRY, "periodic"} <= entries_of(app, tmp_path).keys()


def test_an_entry_of_the_users_under_our_name_wins(app: Celery, resilience: Resilience, tmp_path: Path) -> None:
    app.conf.beat_schedule = {TICK_ENTRY: {"task": TICK_TASK, "schedule": 7.0}}
    assert entries_of(app, tmp_path)[TICK_ENTRY].schedule == schedule(7.0)


def test_what_the_entry_says(app: Celery, resilience: Resilience, tmp_path: Path) -> None:
    entry = entries_of(app, tmp_path)[TICK_ENTRY]
    assert entry.task == TICK_TASK
    assert entry.options == {"queue": "resilient.control", "expires": 1.5, "ignore_result": True}
    assert entry.schedule.run_every == timedelta(seconds=0.5)


def test_a_scheduler_that_reads_no_schedule_has_it_too(app: Celery, resilience: Resilience, tmp_path: Path) -> None:
    class InMemory(Scheduler):
        def setup_schedule(self) -> None:
            self.data: dict[str, Any] = {}

    assert TICK_ENTRY in entries_of(app, tmp_path, InMemory)


def test_an_app_without_resilience_is_none_of_our_business(app: Celery, tmp_path: Path) -> None:
    assert TICK_ENTRY not in entries_of(app, tmp_path)


# --- and survives what beat does to it ----------------------------------------------------------------


def test_the_schedule_file_of_a_former_run_is_taken_up(app: Celery, resilience: Resilience, tmp_path: Path) -> None:
    first = start_beat(app, tmp_path)
    first.schedule[TICK_ENTRY].total_run_count = 41
    first.close()

    again = Celery("beat", broker="memory://", set_as_current=False)
    Resilience(again, tick_interval=2.0)
    entry = entries_of(again, tmp_path)[TICK_ENTRY]
    assert entry.total_run_count == 41
    assert isinstance(entry.schedule, TickSchedule)
    assert (entry.schedule.run_every, entry.options["expires"]) == (timedelta(seconds=2), 6.0)


def test_a_tick_schedule_pickles(app: Celery, resilience: Resilience) -> None:
    original = TickSchedule(timedelta(seconds=0.5), app=app)
    copy = pickle.loads(pickle.dumps(original))
    assert (type(copy), copy.run_every, copy) == (TickSchedule, timedelta(seconds=0.5), original)


# --- what is sent -------------------------------------------------------------------------------------


@pytest.fixture
def ticks(app: Celery, resilience: Resilience, clock: Clock) -> Any:
    """Let beat look once, as if a long time had passed, and return how many ticks lie in the control queue."""
    scheduler = Scheduler(app, lazy=True)
    app.finalize()
    scheduler.setup_schedule()
    connection = app.connection_for_read()
    queue = connection.SimpleQueue("resilient.control")
    queue.clear()

    def look() -> int:
        scheduler.schedule[TICK_ENTRY].last_run_at = LONG_AGO
        scheduler._heap = None
        wait = scheduler.tick()
        assert wait <= 0.5
        return queue.qsize()

    yield look
    connection.close()


def test_nothing_is_sent_while_nothing_is_due(ticks: Any, payments: Breaker, clock: Clock) -> None:
    assert ticks() == 0
    force(payments, "OPEN")
    assert ticks() == 0
    force(payments, "FORCED_OPEN")
    clock.advance(1000)
    assert ticks() == 0


def test_a_tick_is_sent_when_an_open_time_is_over(ticks: Any, payments: Breaker, clock: Clock) -> None:
    force(payments, "OPEN")
    assert ticks() == 0
    clock._now += 20
    assert (ticks(), ticks()) == (1, 2)


def test_a_tick_is_sent_while_tasks_wait_that_may_go_or_have_waited_long_enough(
    ticks: Any, payments: Breaker, resilience: Resilience, clock: Clock
) -> None:
    resilience.use_store(StoreWithDeferredTask(clock, deadline=clock() + 5))
    assert ticks() == 1
    force(payments, "FORCED_OPEN")
    assert ticks() == 1
    clock.advance(6)
    assert ticks() == 2


def test_a_tick_is_sent_when_an_active_probe_is_due(
    ticks: Any, payments: Breaker, resilience: Resilience, clock: Clock
) -> None:
    payments.probe(lambda: None, active=True, interval=60)
    assert ticks() == 1, "a tick must make the breaker known, or time does not pass for it"
    store = resilience.fleet.store
    store.advance(payments._dependency.spec)
    assert ticks() == 1
    clock.advance(60.001)
    assert ticks() == 2
    store.begin_health_check(payments._dependency.spec, since=clock())
    assert ticks() == 2
    force(payments, "FORCED_OPEN")
    clock.advance(60.001)
    assert ticks() == 2


def test_beat_goes_on_while_the_store_is_away(ticks: Any, resilience: Resilience, clock: Clock) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)
    store.is_unavailable = True
    assert ticks() == 0
