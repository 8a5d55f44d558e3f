"""The beat entry: sends a tick only while something is due, and is there however late a schedule is assigned."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.beat import PersistentScheduler, Scheduler
from celery.schedules import schedstate, schedule

from resilient_tasks.errors import StoreError
from resilient_tasks.worker.runtime import TICK_ENTRY, TICK_TASK, runtime_of
from resilient_tasks.worker.tick import anything_due

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")

#: A tick that nobody has taken for this many intervals is not worth running any more.
EXPIRY_INTERVALS = 3


class TickSchedule(schedule):  # type: ignore[misc]  # Celery is untyped
    """Every tick interval, if a breaker is due or tasks wait; silent otherwise."""

    def __init__(
        self,
        run_every: Any = None,
        relative: bool = False,  # noqa: FBT001, FBT002 - Celery's signature
        nowfun: Any = None,
        app: Celery | None = None,
    ) -> None:
        super().__init__(run_every or timedelta(seconds=1), relative, nowfun, app)

    def is_due(self, last_run_at: Any) -> Any:
        """Return ``(due, seconds until the next look)`` as Celery's schedules do."""
        state = super().is_due(last_run_at)
        if not state.is_due:
            return state
        return schedstate(is_due=self._anything_due(), next=self.seconds)

    def _anything_due(self) -> bool:
        runtime = runtime_of(self.app)
        try:
            runtime.fleet.view.refresh()
            _sign_of_life(runtime)
            breakers = runtime.present()
            snapshots = [runtime.fleet.view.standing(breaker.name).snapshot for breaker in breakers]
        except StoreError as exc:
            logger.debug("beat cannot read the store: %s", exc)
            return False
        due = (anything_due(*pair, pair[1].now) for pair in zip(breakers, snapshots, strict=True))
        return any(due) and not _piles_up(runtime)


def _sign_of_life(runtime: Runtime) -> None:
    """Tell the doctor that beat is alive, though it sends nothing while nothing is due."""
    with suppress(StoreError):
        runtime.fleet.ledger.tick_sender_seen(runtime.tick_scope)


def _piles_up(runtime: Runtime) -> bool:
    """Whether ticks lie about that no worker takes: brokers do not throw away what has expired."""
    try:
        return runtime.queues.size(runtime.control_queue) >= EXPIRY_INTERVALS
    except Exception as exc:  # noqa: BLE001 - beat itself tells of a broker that is away
        logger.debug("beat cannot count the ticks that wait: %s", type(exc).__name__)
        return False


def tick_entry(runtime: Runtime) -> dict[str, Any]:
    """Return the entry of the beat schedule."""
    interval = runtime.settings.tick_interval
    return {
        "task": TICK_TASK,
        "schedule": TickSchedule(timedelta(seconds=interval), app=runtime.app),
        "options": {"queue": runtime.control_queue, "expires": EXPIRY_INTERVALS * interval, "ignore_result": True},
    }


def add_tick_entry(runtime: Runtime) -> None:
    """Put the entry into the app's ``beat_schedule``, which the user may have assigned meanwhile."""
    conf = runtime.app.conf
    if TICK_ENTRY not in (conf.beat_schedule or {}):
        conf.beat_schedule = {**(conf.beat_schedule or {}), TICK_ENTRY: tick_entry(runtime)}


def add_tick_to_scheduler(runtime: Runtime, scheduler: Any) -> None:
    """Put the entry into a scheduler that is already built, if it is one of Celery's own.

    A scheduler that keeps its entries in a database is left alone: the README tells how to add it there.
    """
    add_tick_entry(runtime)
    if type(scheduler) in (Scheduler, PersistentScheduler) and TICK_ENTRY not in scheduler.schedule:
        scheduler.update_from_dict({TICK_ENTRY: tick_entry(runtime)})
