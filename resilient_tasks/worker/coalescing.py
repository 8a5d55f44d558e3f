"""Coalescing: of several deferred tasks with one key only the latest runs (``coalesce="latest"``).

The latest to be deferred claims the key in the ledger, once its message is in its place. Whoever resumes a task sees
there whether a later one has claimed its key since. What never ran after all, because it was revoked or has expired,
gives its claim back, so that those that still wait run. Without the ledger every task runs.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from kombu.utils.json import dumps

from resilient_tasks.call import Call, key_of

if TYPE_CHECKING:
    from resilient_tasks.store.ledger import Ledger
    from resilient_tasks.worker.queues import Entry
    from resilient_tasks.worker.request import GatedRequest

logger = logging.getLogger("resilient_tasks")


class SupersededError(Exception):
    """A later task with the same key runs instead.

    Args:
        latest: its id.
    """

    def __init__(self, latest: str) -> None:
        super().__init__(f"superseded by {latest}")
        self.latest = latest


def coalesced_as(request: GatedRequest) -> str:
    """Return what a task and those that it may stand for have in common; "" if there is none that it may.

    A task that others wait for, in a workflow or by a callback, stands for itself alone.
    """
    options, context = request.task.options, request.context
    if options.coalesce is None or context.callbacks or context.chain or context.chord or context.group:
        return ""
    call = Call(request.task.name, request.task.run, request.args or (), request.kwargs or {})
    try:
        key = options.coalesce_key and key_of(call, options.coalesce_key)
        text = dumps([call.task_name, call.arguments() if key is None else key], sort_keys=True)
    except Exception as exc:  # noqa: BLE001 - a user's function, or arguments that JSON cannot hold
        what = "Task %s[%s] has no key to be coalesced by: %r"
        logger.warning(what, request.name, request.id, exc, extra=request.log_fields)
        return ""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def superseded_among(entries: Sequence[Entry], ledger: Ledger, *, gone: Collection[str] = ()) -> dict[str, str]:
    """Return by the ids of those waiting tasks that a later one runs instead of, the id of that one.

    Args:
        entries: the waiting tasks.
        ledger: knows the latest of each kind.
        gone: ids of tasks that will not run, whatever they have claimed.
    """
    latest = ledger.claims({entry.ticket.coalesced_as for entry in entries} - {""})
    found = {entry.task_id: latest.get(entry.ticket.coalesced_as, entry.task_id) for entry in entries}
    return {task_id: later for task_id, later in found.items() if later != task_id and later not in gone}
