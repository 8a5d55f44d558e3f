"""Which of the waiting tasks are resumed in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from resilient_tasks.core.model import Snapshot
from resilient_tasks.store.base import Store
from resilient_tasks.store.leases import LEASE
from resilient_tasks.worker.deferred_tasks import PAGE
from resilient_tasks.worker.queues import Entry

if TYPE_CHECKING:
    from resilient_tasks.breaker import Breaker


class Selection(Protocol):
    """Chooses from one page of waiting tasks after the other, until it is :attr:`complete`."""

    @property
    def page(self) -> int:
        """How many tasks it would look at first."""

    @property
    def complete(self) -> bool:
        """Whether it needs to see no more."""

    def choose(self, due: Sequence[Entry]) -> Sequence[Entry]:
        """Return those that shall be resumed, of some whose own wait is over, oldest first."""


@dataclass
class FirstFew:
    """The oldest tasks, so many.

    Args:
        wanted: how many.
        unfailed_first: those that have never failed come before the others.
    """

    wanted: int
    unfailed_first: bool = False
    page: int = PAGE

    @property
    def complete(self) -> bool:
        """Whether there are so many."""
        return self.wanted <= 0

    def choose(self, due: Sequence[Entry]) -> Sequence[Entry]:
        """Return the first of them."""
        if self.unfailed_first:
            due = sorted(due, key=lambda entry: entry.ticket.attempted_at > 0)
        chosen = due[: self.wanted]
        self.wanted -= len(chosen)
        return chosen


@dataclass
class TheseOnly:
    """Some tasks by their ids.

    Args:
        wanted: their ids; those that were chosen are taken out.
    """

    wanted: set[str]
    page: int = PAGE

    @property
    def complete(self) -> bool:
        """Whether all were there."""
        return not self.wanted

    def choose(self, due: Sequence[Entry]) -> Sequence[Entry]:
        """Return those of them that are there."""
        chosen = [entry for entry in due if entry.task_id in self.wanted]
        self.wanted -= {entry.task_id for entry in chosen}
        return chosen


class WhoeverFits:
    """The oldest tasks, as many as slots are free; one is kept for each.

    Args:
        store: the shared store.
        breaker: for whose slots the tasks wait.
        snapshot: the breaker now.
        most: calls that may be in flight by the caller's knowledge.
    """

    def __init__(self, store: Store, breaker: Breaker, snapshot: Snapshot, most: int) -> None:
        self._store, self._breaker, self._most = store, breaker, most
        self.page = max(0, min(most - snapshot.in_flight, PAGE - 1)) + 1  # one more tells that others go on waiting
        self.complete = False

    def choose(self, due: Sequence[Entry]) -> Sequence[Entry]:
        """Return those for which a slot is kept now; if it is not all of them, there is none left."""
        ids = [entry.task_id for entry in due]
        kept = self._store.keep_slots(self._breaker.spec, ids, lease=LEASE, most=self._most)
        self.complete = kept < len(due)
        return due[:kept]
