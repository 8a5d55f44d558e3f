"""Nothing that a thread may hold is carried across a fork: owners of locks and connections get new ones."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forkable(Protocol):
    """Something with locks or connections."""

    def after_fork(self) -> None:
        """Replace locks and connections; called in the child before anything else runs there."""


_owners: weakref.WeakSet[Forkable] = weakref.WeakSet()


def renew_after_fork(owner: Forkable) -> None:
    """Call ``owner.after_fork()`` in every process forked from this one, for as long as the owner lives."""
    _owners.add(owner)


def _after_fork() -> None:
    for owner in list(_owners):
        owner.after_fork()


os.register_at_fork(after_in_child=_after_fork)
