"""What metrics tell of an app's breakers, as its runtime can read it."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from resilient_tasks.monitor.metrics import Subject

if TYPE_CHECKING:
    from resilient_tasks.core.outage import Estimate
    from resilient_tasks.worker.runtime import Runtime

#: Most children of one breaker that are told of: each has as many series as a breaker.
MOST_CHILDREN = 100


def read_subjects(runtime: Runtime) -> list[Subject]:
    """Read all breakers of an app from the store, and some of their children that are not plainly CLOSED.

    Raises:
        StoreError: the store is away, or one in memory.
    """
    snapshots = runtime.read(MOST_CHILDREN)
    totals = runtime.fleet.history.totals([each.name for each in snapshots])
    estimates = runtime.fleet.story.estimates(snapshots)
    tasks, queue = _tasks_by_breaker(runtime), f"{runtime.settings.namespace}.deferred.{{}}".format
    return [
        Subject(each, totals[each.name], queue(each.name), tasks[each.name], _done_in(estimates.get(each.name)))
        for each in snapshots
    ]


def _done_in(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.done_in


def _tasks_by_breaker(runtime: Runtime) -> dict[str, list[str]]:
    tasks: defaultdict[str, list[str]] = defaultdict(list)
    for name, task in sorted(runtime.app.tasks.items()):
        options = getattr(task, "options", None)
        for breaker in options.breakers if options is not None else ():
            tasks[breaker].append(name)
    return tasks
