"""The beat entry: sends a tick only while something is due, and is there however late a schedule is assigned.

Celery's own schedulers keep the entry's :class:`TickSchedule` itself, pickled by its name. Those that keep their
entries in a database (django-celery-beat, redbeat) know plain intervals alone: there the class of the entries turns the
interval of ours back into a ``TickSchedule``.
"""

from __future__ import annotations

import logging
import math
from contextlib import suppress
from datetime import timedelta
from typing import Any

from celery import Celery
from celery.beat import ScheduleEntry
from celery.schedules import schedstate, schedule

from resilient_tasks.errors import StoreError
from resilient_tasks.worker.context import TICK_ENTRY, TICK_TASK, Runtime, runtime_of
from resilient_tasks.worker.maintenance import anything_due

logger = logging.getLogger("resilient_tasks")

#: A tick that no worker has taken for this many intervals is not worth running any more.
EXPIRY_INTERVALS = 3
#: Seconds until an entry that is never due is asked again.
_NEVER_DUE = 60.0


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
        state = super().is_due(last_run_at)
        return schedstate(is_due=_is_tick_due(runtime_of(self.app)), next=self.seconds) if state.is_due else state


def _is_tick_due(runtime: Runtime) -> bool:
    fleet = runtime.fleet
    try:
        fleet.view.refresh()
        with suppress(StoreError):  # for the doctor: beat is alive, though it sends nothing while nothing is due
            fleet.ledger.tick_sender_seen(runtime.tick_scope)
        now = fleet.view.server_now()
        due = [each for each in runtime.present() if anything_due(each, each.cached_state.snapshot, now)]
        snapshots = fleet.view.look(*(breaker.spec for breaker in due))  # another process may have dealt with it
    except StoreError as exc:
        logger.debug("beat cannot read the store: %s", exc)
        return False
    if not any(anything_due(breaker, snapshot, snapshot.now) for breaker, snapshot in zip(due, snapshots, strict=True)):
        return False
    try:  # ticks that no worker takes pile up: brokers do not delete what has expired
        return runtime.queues.size(runtime.control_queue) < EXPIRY_INTERVALS
    except runtime.queues.errors as exc:  # beat itself logs that the broker is unavailable
        logger.debug("beat cannot count the ticks that wait: %s", type(exc).__name__)
        return True


def add_tick_entry(runtime: Runtime) -> None:
    """Put the entry into the app's ``beat_schedule``, which the user may have assigned meanwhile."""
    conf, interval = runtime.app.conf, runtime.settings.tick_interval
    if TICK_ENTRY not in (conf.beat_schedule or {}):
        expires = EXPIRY_INTERVALS * interval
        entry = {
            "task": TICK_TASK,
            "schedule": TickSchedule(timedelta(seconds=interval), app=runtime.app),
            "options": {"queue": runtime.control_queue, "expires": expires, "ignore_result": True},
        }
        conf.beat_schedule = {**(conf.beat_schedule or {}), TICK_ENTRY: entry}


def add_tick_to_scheduler(runtime: Runtime, scheduler: Any) -> None:
    """Put the entry into a scheduler that is already built, in the terms of that scheduler."""
    add_tick_entry(runtime)
    entry = runtime.app.conf.beat_schedule[TICK_ENTRY]
    if scheduler.Entry is not ScheduleEntry:
        scheduler.Entry = _entry_class(runtime, scheduler.Entry)
        scheduler.update_from_dict({TICK_ENTRY: _in_terms_of(scheduler, entry)})
    elif TICK_ENTRY not in scheduler.schedule:
        scheduler.update_from_dict({TICK_ENTRY: entry})


def _in_terms_of(scheduler: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """Return our entry for a database; one of the user's under our name is left as it is."""
    if not isinstance(entry["schedule"], TickSchedule):
        return entry
    interval = math.ceil(entry["schedule"].seconds)  # django-celery-beat keeps whole seconds
    options = dict(entry["options"])
    if hasattr(scheduler.Entry, "_unpack_options"):  # django-celery-beat's, which drops what it does not know
        options["expire_seconds"] = math.ceil(options.pop("expires"))
    return {**entry, "schedule": schedule(timedelta(seconds=interval), app=scheduler.app), "options": options}


def _entry_class(runtime: Runtime, base: Any) -> Any:
    """Return the class of a database's entries in which ours asks whether anything is due."""

    class Entry(base):  # type: ignore[misc]  # known at run time alone
        schedule: Any
        reported = False

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.name == TICK_ENTRY and isinstance(self.schedule, schedule):
                self.schedule = TickSchedule(self.schedule.run_every, app=runtime.app)

        def is_due(self) -> Any:
            if self.task != TICK_TASK or self.name == TICK_ENTRY:
                return super().is_due()
            if not Entry.reported:
                Entry.reported = True
                what = "beat ignores the entry %r for %s, which the entry %r sends: delete it"
                logger.warning(what, self.name, TICK_TASK, TICK_ENTRY)
            return schedstate(is_due=False, next=_NEVER_DUE)

    return Entry
