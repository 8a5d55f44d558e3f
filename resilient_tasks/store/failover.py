"""``FailoverStore``: the shared store while it answers, a local breaker while it does not.

No task fails because the store is away. Decisions (reading, admitting, counting, settling) then fall to
a ``LocalStore`` that goes on from the last state this process knew: OPEN is honoured until its deadline,
what an operator has set stays set, counts begin anew. The first answer of the shared store ends that, and
what was decided locally is forgotten.

Operator's verbs, health checks and kept values cannot be made up by one process: there a ``StoreError`` reaches
the caller.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from resilient_tasks.core.model import Answer, Grant, Outcome, Snapshot, State, Verb
from resilient_tasks.errors import StoreError
from resilient_tasks.store.base import Evidence, Spec, Store
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.local import LocalStore

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class FailoverStore:
    """A store whose decisions never raise ``StoreError``.

    The delay of a decision is bounded by the shared store's own time limit and its fail-fast cooldown.

    Args:
        primary: the shared store.
        local: decides while ``primary`` is away; by default one that runs on the shared store's clock,
            as well as this process knows it.
        clock: monotonic clock in seconds.
    """

    def __init__(
        self, primary: Store, local: LocalStore | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._primary = primary
        self._local = LocalStore(self._shared_time) if local is None else local
        self._clock = clock
        self._offset = time.time() - clock()
        self._known: dict[str, Snapshot] = {}
        self._adopted: set[str] = set()
        self._away = False
        self.after_fork()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"FailoverStore({self._primary!r})"

    def after_fork(self) -> None:
        """Replace the lock; the child goes on from what the parent knew."""
        self._lock = threading.Lock()

    @property
    def away(self) -> bool:
        """Whether the shared store did not answer when it was last asked for a decision."""
        return self._away

    # --- decisions ----------------------------------------------------------------------------------

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers; while the shared store is away, as this process's own breakers see them."""
        return self._decide([spec.name for spec in specs], lambda store: store.read(specs), list)

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        """Ask to make one call; see :meth:`Store.acquire`."""
        return self._decide(
            [spec.name], lambda store: store.acquire(spec, holder, lease=lease, jitter=jitter), _snapshot_of
        )

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        """Lengthen live permits. While the shared store is away nobody can tell that one is lost."""
        local = self._local if self._away else None
        try:
            return self._primary.renew(name, holders, lease=lease)
        except StoreError as error:
            self._leave(error)
            if local is not None:
                local.renew(name, holders, lease=lease)
            return [True] * len(holders)

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count outcomes of calls that needed no permit; see :meth:`Store.record`."""
        return self._decide([spec.name], lambda store: store.record(spec, evidence, jitter=jitter), _snapshot_of)

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count the outcome of a trial and free its permit; see :meth:`Store.settle`."""
        return self._decide(
            [spec.name], lambda store: store.settle(spec, holder, outcome, evidence, jitter=jitter), _snapshot_of
        )

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        """Do what time has made due; see :meth:`Store.advance`."""
        return self._decide([spec.name], lambda store: store.advance(spec, jitter=jitter), _snapshot_of)

    # --- children -----------------------------------------------------------------------------------

    def enroll(self, spec: Spec) -> bool:
        """Return whether there is room for a child; while the shared store is away, in this process."""
        return self._decide([], lambda store: store.enroll(spec), lambda _: ())

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        """Return the names of the children of a breaker; see :meth:`Store.children`."""
        return self._primary.children(name, start=start, count=count)

    def active_children(self, name: str, *, since: float = 0.0, start: int = 0, count: int = 500) -> list[str]:
        """Return the names of children that are not plainly CLOSED; see :meth:`Store.active_children`."""
        return self._decide(
            [], lambda store: store.active_children(name, since=since, start=start, count=count), lambda _: ()
        )

    def cool(self, spec: Spec) -> bool:
        """Take a child off the hot ones; see :meth:`Store.cool`."""
        return self._primary.cool(spec)

    def forget(self, name: str) -> None:
        """Let go of what this process knows of a child that it does not use any more."""
        with self._lock:
            self._known.pop(name, None)
            self._adopted.discard(name)

    def _decide(
        self, names: Sequence[str], ask: Callable[[Store], _T], snapshots_of: Callable[[_T], Iterable[Snapshot]]
    ) -> _T:
        try:
            answer = ask(self._primary)
        except StoreError as error:
            self._leave(error)
            self._adopt(names)
            return ask(self._local)
        self._return()
        for snapshot in snapshots_of(answer):
            self._note(snapshot)
        return answer

    def _note(self, snapshot: Snapshot) -> None:
        self._known[snapshot.name] = snapshot
        self._offset = snapshot.now - self._clock()
        if self._adopted:
            self._adopted.discard(snapshot.name)

    def _adopt(self, names: Iterable[str]) -> None:
        """Have the local store go on from what was last known, once per absence."""
        with self._lock:
            for name in names:
                if name not in self._adopted:
                    known = self._known.get(name) or Snapshot(name, State.CLOSED, 0, 0, now=0.0, since=0.0)
                    self._local.adopt(replace(known, now=self._shared_time()))
                    self._adopted.add(name)

    def _shared_time(self) -> float:
        return self._clock() + self._offset

    def _leave(self, error: StoreError) -> None:
        if not self._away:
            self._away = True
            logger.warning("the shared store is away, this process decides for itself: %s", error)

    def _return(self) -> None:
        if self._away:
            with self._lock:
                self._away = False
                self._adopted.clear()
                self._local.clear()
            logger.warning("the shared store answers again")

    # --- what only the shared store can do ------------------------------------------------------------

    def read_shared(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers from the shared store or not at all, for people who ask what the fleet knows."""
        return self._primary.read(specs)

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb; see :meth:`Store.command`."""
        answer = self._primary.command(spec, verb, reason=reason, actor=actor, jitter=jitter)
        self._note(answer.snapshot)
        return answer

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        """Return whether it is the caller who makes a health check; see :meth:`Store.begin_health_check`."""
        return self._primary.begin_health_check(spec, since=since)

    def report_health_check(
        self, spec: Spec, outcome: Outcome, evidence: Evidence, *, limit: int, jitter: float = 0.0
    ) -> Answer:
        """Count a health check; see :meth:`Store.report_health_check`."""
        answer = self._primary.report_health_check(spec, outcome, evidence, limit=limit, jitter=jitter)
        self._note(answer.snapshot)
        return answer

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        """Yield states as others change them; see :meth:`Store.changes`."""
        for snapshot in self._primary.changes(timeout=timeout):
            if snapshot is not None:
                self._note(snapshot)
            yield snapshot

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds."""
        self._primary.put(kind, key, value, ttl=ttl)

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        """Return ``(value, age in seconds)``, or None."""
        return self._primary.get(kind, key)

    def check(self) -> None:
        """Find a server that is no store at all; see :meth:`Store.check`."""
        self._primary.check()

    def close(self) -> None:
        """Close the connections of the shared store."""
        self._primary.close()


def _snapshot_of(answer: Answer | Grant) -> tuple[Snapshot, ...]:
    return (answer.snapshot,)
