"""Which of the waiting tasks are resumed in one go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from resilient_tasks.worker.deferred_tasks import PAGE
from resilient_tasks.worker.queues import Entry


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
