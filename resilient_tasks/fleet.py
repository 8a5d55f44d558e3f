"""``Fleet``: the store, this process's view of it and its reporter; one per process."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from resilient_tasks.core.model import Answer, Grant, Snapshot, State, Transition, Verb, voter_of
from resilient_tasks.core.outage import TRIALS
from resilient_tasks.core.rules import OLDEST
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.history import History
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.store.reporter import LEASE, Reporter
from resilient_tasks.store.view import CachedState, View

logger = logging.getLogger(__name__)


class Fleet:
    """Store, view and reporter of this process; while the shared store is unavailable, a local one decides.

    A store in memory has no ledger, of what workers must know in common, and no history. ``announce`` gets each
    transition that this process has made, ``task_id`` returns the id of the task that runs here and now.
    """

    def __init__(
        self,
        store: Store,
        ledger: Ledger | None = None,
        history: History | None = None,
        *,
        announce: Callable[[Transition], object] = lambda _: None,
        task_id: Callable[[], str | None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store = store if isinstance(store, FailoverStore) else FailoverStore(store, clock=clock)
        self._ledger = ledger
        self._history = history
        self.view = View(self.store, clock)
        self.view.on_forgotten = self.store.forget
        self.view.on_answer = self.learn
        self.reporter = Reporter(self.store, self.view, self.learn, clock, history)
        self._announce = announce
        self._task_id = task_id

    @property
    def ledger(self) -> Ledger:
        """What the fleet's workers must know in common; StoreError without a shared store."""
        if self._ledger is None:
            raise StoreError(f"{self.store!r} keeps no ledger of deferred tasks: workers need a shared store")
        return self._ledger

    @property
    def history(self) -> History:
        """What has become of the fleet's breakers; StoreError without a shared store."""
        if self._history is None:
            raise StoreError(f"{self.store!r} keeps no history of breakers: that takes a shared store")
        return self._history

    def with_children(self, names: Iterable[str]) -> list[str]:
        """Return the names of some breakers and of all their children."""
        return [each for name in names for each in (name, *self.store.children(name))]

    def voter(self) -> str:
        """Return who votes by a call made here and now: the running task; "" outside any task."""
        return voter_of(self._task_id())

    def join(self, spec: Spec) -> CachedState:
        """Declare a breaker that is about to be used: read it once and keep the view fresh from now on."""
        state = self.view.declare(spec)
        if not state.known and spec.parent is not None:
            self.view.look(spec)
        elif not state.known:
            self.view.refresh()
        self.view.follow()
        return state

    def acquire(self, spec: Spec, holder: str, *, lease: float = LEASE) -> Grant:
        """Ask the store for admission; a denial is remembered for a while. Never raises ``StoreError``."""
        asked = self.view.asking()
        grant = self.store.acquire(spec, holder, lease=lease, jitter=random.random())
        self.learn(grant, asked)
        if grant.trial:
            self.reporter.tally(spec.name, TRIALS)
        if not grant.admitted and grant.snapshot.state is State.HALF_OPEN:
            self.view.state(spec.name).deny()
        return grant

    def command(self, spec: Spec, verb: Verb, reason: str, actor: str) -> Snapshot:
        """Carry out an operator's verb and return the state that it led to.

        The workers' policy stays in force, whatever checkout and environment the verb comes from. If the store is
        away, nothing has changed.
        """
        asked = self.view.asking()
        undeclared = replace(spec, revision=OLDEST)
        answer = self.store.command(undeclared, verb, reason=reason, actor=actor, jitter=random.random())
        self.learn(answer, asked)
        return answer.snapshot

    def learn(self, answer: Answer | Grant, asked: int | None = None) -> None:
        """Update the view by a store's answer, and announce the transition that it brought about, if any."""
        self.view.update(answer.snapshot, asked)
        if answer.transition is not None:
            try:
                self._announce(answer.transition)
            except Exception:  # whatever is given to this class
                logger.exception("a listener failed on the transition of breaker %s", answer.transition.name)
        if isinstance(answer, Answer):
            self.view.look_for_room(answer.snapshot)

    def close(self) -> None:
        """Send what waits, for about a second at most, and let go of threads and connections."""
        self.reporter.close()
        self.view.stop(timeout=0.0)  # it listens for half a second at most and asks nothing more
        self.store.close()
