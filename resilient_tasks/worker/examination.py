"""Looking at a deployment for the doctor: store, broker, workers and settings, whatever of them answers."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from celery.backends.base import DisabledBackend

from resilient_tasks.core.model import parent_of
from resilient_tasks.errors import ResilienceError
from resilient_tasks.monitor.deployment import BreakerFacts, Deployment, ServerFacts, TaskFacts, WorkerFacts
from resilient_tasks.worker.definitions import doubts
from resilient_tasks.worker.inspection import library_version, resilience, rules_of
from resilient_tasks.worker.options import DEFER, options_of

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime

_VISIBILITY_TIMEOUT = 3600.0  # kombu's own

#: A breaker that no worker has declared for so many seconds is defined by none that lives.
UNSEEN = 60.0


def look_at(runtime: Runtime, *, timeout: float) -> Deployment:
    """Find out all that the doctor needs; what does not answer is left out.

    Args:
        runtime: of the app.
        timeout: seconds for which the workers' answers are awaited.
    """
    broker = _look_at_broker(runtime)
    workers = None if broker["broker_trouble"] else _ask_workers(runtime, timeout)
    conf = runtime.app.conf
    return Deployment(
        version=library_version(),
        control_queue=runtime.control_queue,
        tasks=tuple(_tasks(runtime)),
        mistakes=tuple(map(str, runtime.mistakes())),
        doubts=(*doubts(runtime.app), *_unused_overrides(runtime)),
        keeps_results=not isinstance(runtime.app.backend, DisabledBackend),
        result_expires=runtime.result_ttl,
        prefetch_multiplier=conf.worker_prefetch_multiplier,
        tick_interval=runtime.settings.tick_interval,
        workers=workers,
        **broker,
        **_look_at_store(runtime, workers or ()),
        orphans=_orphans(runtime, workers),
    )


def _look_at_store(runtime: Runtime, workers: tuple[WorkerFacts, ...]) -> dict[str, Any]:
    waits: dict[str, float] = {}
    found: dict[str, Any] = {}
    try:
        ledger = runtime.fleet.ledger
        found["store"] = ServerFacts.of("store", *ledger.server_info())
        for snapshot in runtime.read():
            found["clock_ahead"] = time.time() - snapshot.now
            if snapshot.oldest_deferred_at is not None:
                name = parent_of(snapshot.name) or snapshot.name
                waits[name] = max(snapshot.now - snapshot.oldest_deferred_at, waits.get(name, 0.0))
        # Code that defines other breakers than the workers do, as in a deploy, has another scope, and theirs counts.
        theirs = {worker.tick_scope for worker in workers if worker.policies.keys() & runtime.breakers.keys()}
        scopes = {runtime.tick_scope, *theirs}
        found["tick_age"] = _youngest(map(ledger.last_tick_age, scopes))
        found["tick_sender_age"] = _youngest(map(ledger.tick_sender_age, scopes))
        found["undecided"] = _undecided(runtime)
    except ResilienceError as error:
        found = {"store_trouble": str(error)}
    found["breakers"] = tuple(
        BreakerFacts(
            spec.name,
            spec.policy.trial_timeout,
            rules_of(spec),
            waits.get(spec.name),
            spec.policy.slow_call_duration,
        )
        for spec in runtime.specs()
    )
    return found


def _youngest(ages: Iterable[float | None]) -> float:
    return min(math.inf if age is None else age for age in ages)


def _undecided(runtime: Runtime) -> dict[str, list[str]]:
    """Return the exceptions that no rule has known of late, by breaker."""
    history = runtime.fleet.history
    ever = [name for name, counts in history.totals(runtime.breakers).items() if counts.undecided]
    lately = {name: {each for minute in history.minutes(name) for each in minute.counts.undecided} for name in ever}
    return {name: sorted(types) for name, types in lately.items() if types}


def _unused_overrides(runtime: Runtime) -> list[tuple[str, str, str]]:
    """Return what settings say of breakers that are not defined."""
    why, advice = "they have no effect", "correct the name in RESILIENT_TASKS_BREAKERS__, or define the breaker"
    unused = runtime.settings.unknown_overrides(runtime.breakers)
    return [(f"settings override breaker {name}, which is not defined", why, advice) for name in unused]


def _look_at_broker(runtime: Runtime) -> dict[str, Any]:
    try:
        runtime.queues.size(runtime.control_queue)
        facts = runtime.queues.server_facts()
    except runtime.queues.errors as error:
        return {"broker_trouble": f"{type(error).__name__}: {error}"}
    options = runtime.app.conf.broker_transport_options or {}
    timeout = float(options.get("visibility_timeout", _VISIBILITY_TIMEOUT)) if facts else None
    return {"broker": facts, "broker_trouble": "", "visibility_timeout": timeout}


def _ask_workers(runtime: Runtime, timeout: float) -> tuple[WorkerFacts, ...]:
    """Return what each worker answers; one without the library answers that it knows no such command."""
    replies = runtime.app.control.broadcast(resilience.__name__, reply=True, timeout=timeout) or []
    answers = {name: reply for each in replies for name, reply in each.items()}
    return tuple(WorkerFacts(name, **_known(answers[name])) for name in sorted(answers))


def _known(reply: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is understood here of the reply of a worker, whatever its version."""
    return {field.name: reply[field.name] for field in fields(WorkerFacts) if field.name in reply}


def _tasks(runtime: Runtime) -> list[TaskFacts]:
    guarded = [task for task in runtime.app.tasks.values() if options_of(task)]
    longest = runtime.app.conf.task_time_limit or runtime.app.conf.task_soft_time_limit
    return [
        TaskFacts(
            name=task.name,
            breakers=task.options.breakers,
            defers=DEFER in (task.options.on_open, task.options.on_failure),
            acks_late=bool(task.acks_late),
            time_limit=task.time_limit or task.soft_time_limit or longest,
        )
        for task in guarded
    ]


def _orphans(runtime: Runtime, workers: tuple[WorkerFacts, ...] | None) -> dict[str, int] | None:
    """Return the waiting tasks of breakers that workers used to define, and neither they nor this process do."""
    if workers is None:
        return None
    defined = set(runtime.breakers).union(*(worker.policies for worker in workers))
    try:
        declared = runtime.fleet.ledger.abandoned(unseen_for=UNSEEN)
    except ResilienceError:
        return None
    gone = [name for name in declared if (parent_of(name) or name) not in defined]
    sizes = {name: runtime.queues.size(runtime.queues.deferred(name)) for name in gone}
    return {name: size for name, size in sizes.items() if size}
