"""Revokes of waiting tasks: a worker forgets them when it stops, the ledger keeps them for the fleet.

A task is revoked by its id or by one of its stamps. An id is one task's for good, but a stamp comes back on
later tasks: revoking it concerns those that had been sent by then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from celery.signals import task_revoked

from resilient_tasks.store.ledger import Ledger
from resilient_tasks.worker import seams
from resilient_tasks.worker.queues import Entry

#: Seconds for which a task may still be deferred by a worker that has not heard of its stamp's revoke.
HEARSAY = 60.0


class Hearing:
    """What one worker was told to revoke and has passed on to the ledger."""

    def __init__(self) -> None:
        self._ids: set[str] = set()
        self._stamps: dict[str, int] = {}  # header -> number of its values
        self._expired: set[str] = set()  # Celery takes them for revoked, too, but that is nobody's order
        task_revoked.connect(self._note_expiry)

    def _note_expiry(self, request: Any, *, expired: bool, **_: Any) -> None:
        if expired:
            self._expired.add(request.id)

    def pass_on(self, ledger: Ledger, breakers: Iterable[str]) -> None:
        """Tell the ledger what is new, and have the tick look at tasks that wait for one of ``breakers``.

        Raises:
            StoreError: the ledger is away; the next call tells it.
        """
        ids = set(seams.revoked_ids)
        stamps = {header: list(values) for header, values in seams.revoked_stamps.copy().items()}
        self._expired &= ids  # what Celery has forgotten need not be told apart
        new_ids = ids - self._ids - self._expired
        ledger.revoke([*new_ids, *self._unheard(stamps)])
        ledger.hasten(breakers, new_ids)
        self._ids = ids
        self._stamps = {header: len(values) for header, values in stamps.items()}

    def _unheard(self, stamps: dict[str, list[object]]) -> Iterator[str]:
        for header, values in stamps.items():  # Celery only ever appends to them
            yield from (_mark(header, value) for value in values[self._stamps.get(header, 0) :])


def revoked_among(entries: Sequence[Entry], ledger: Ledger) -> set[str]:
    """Return the ids of those waiting tasks that were revoked."""
    marks = {entry.task_id: set(_marks(entry)) for entry in entries}
    revoked = ledger.revoked([*marks, *set().union(*marks.values())])

    def by_stamp(entry: Entry) -> bool:
        heard_until = entry.ticket.since - HEARSAY
        return any(mark in revoked and revoked[mark] > heard_until for mark in marks[entry.task_id])

    return {entry.task_id for entry in entries if entry.task_id in revoked or by_stamp(entry)}


def _marks(entry: Entry) -> Iterator[str]:
    """Yield the marks of a task's stamps, as far as what it says of them makes sense."""
    headers = entry.message.headers or {}
    stamped, stamps = headers.get("stamped_headers"), headers.get("stamps")
    if not isinstance(stamped, (list, tuple)) or not isinstance(stamps, dict):
        return
    for header, value in stamps.items():
        if header in stamped:
            values = value if isinstance(value, (list, tuple)) else [value]
            yield from (_mark(header, one) for one in values)


def _mark(header: str, value: object) -> str:
    """Return the name of a stamp in the ledger; it looks like no task's id."""
    return json.dumps([header, value], default=str)
