"""``Provenance``: where a task's result came from when a fallback made it, kept beside the result."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from resilient_tasks.errors import StoreError
from resilient_tasks.fallback import Served
from resilient_tasks.store.base import Store

logger = logging.getLogger("resilient_tasks")

_PROVENANCE = "provenance"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a task's result came from when a fallback made it.

    Args:
        source: ``"cached"``, ``"constant"`` or the function's name.
        age: seconds since a cached value was good when it was served, else ``None``.
        breaker: name of the breaker whose refusal or failure called for the fallback.
    """

    source: str
    age: float | None
    breaker: str


def write_provenance(store: Store, task_id: str, served: Served, breaker: str, ttl: float) -> None:
    """Note for ``ttl`` seconds where the result of ``task_id`` came from. Raises nothing."""
    note = {"source": served.source, "age": served.age, "breaker": breaker}
    try:
        store.put(_PROVENANCE, task_id, json.dumps(note).encode(), ttl=ttl)
    except StoreError as error:
        logger.debug("provenance not kept: %s", error)


def read_provenance(store: Store, task_id: str) -> Provenance | None:
    """Return where the result of ``task_id`` came from; None: from the task itself, or not known (any more).

    Raises:
        StoreError: the store is unavailable.
    """
    found = store.get(_PROVENANCE, task_id)
    if found is None:
        return None
    note = json.loads(found[0])
    return Provenance(note["source"], note["age"], note["breaker"])
