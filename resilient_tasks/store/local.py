"""``LocalStore``: breakers of one process, without a server.

It runs ``core/machine.py`` under one lock. It serves while the shared store cannot be reached, in
users' tests, and as the reference that the contract suite compares the shared store with. All that
it keeps is bounded.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from resilient_tasks.core.children import Children
from resilient_tasks.core.machine import Decision
from resilient_tasks.core.model import Answer, Grant, Outcome, Snapshot, Verb
from resilient_tasks.core.names import key_of, parent_of
from resilient_tasks.core.record import Record, brief, to_ms
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.keys import check_key_part

_MOST_VALUES = 10_000
_MOST_UNREAD_CHANGES = 1_000


class LocalStore:
    """A store inside this process; safe to use from several threads.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._values: dict[tuple[str, str], tuple[bytes, int, int]] = {}  # -> value, written at, ends at
        self._listeners: list[queue.Queue[Snapshot]] = []
        self._children: dict[str, Children] = {}
        renew_after_fork(self)

    def __repr__(self) -> str:
        return "LocalStore()"

    def after_fork(self) -> None:
        """Start with a new lock and without the parent's listeners."""
        self._lock = threading.RLock()
        self._listeners = []

    # --- decisions --------------------------------------------------------------------------------

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers, changing nothing. A breaker never seen before is CLOSED."""
        with self._lock:
            now = self._now()
            return [
                replace(self._seen(spec, now).snapshot(now), hot_children=self._hot_children(spec)) for spec in specs
            ]

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        """Ask to make one call; see :meth:`Store.acquire`."""
        with self._deciding(spec, jitter) as decision:
            admitted, trial = decision.acquire(holder, to_ms(lease))
            answer = self._told(decision)
        return Grant(admitted, trial, answer.snapshot, answer.transition)

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        """Lengthen live permits and slots to ``lease`` seconds from now. False: it is no longer held."""
        check_key_part("breaker", name)
        with self._lock:
            now, record = self._now(), self._records.get(name)
            return [record is not None and record.renew(h, lease=to_ms(lease), now=now) for h in holders]

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count outcomes of calls that needed no permit; open the breaker if that trips it."""
        with self._deciding(spec, jitter) as decision:
            decision.report(evidence.epoch, evidence.runs, brief(evidence.cause), _retry_after(evidence))
            return self._told(decision)

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count the outcome of a call, and free its permit and its slot. Without either it changes nothing."""
        with self._deciding(spec, jitter) as decision:
            told = brief(evidence.cause), _retry_after(evidence), evidence.runs
            decision.settle(holder, evidence.epoch, outcome, *told)
            return self._told(decision)

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        """Do what time has made due: expired permits become failures, OPEN becomes HALF_OPEN."""
        with self._deciding(spec, jitter) as decision:
            decision.advance()
            return self._told(decision)

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb. A verb that leads to the present state makes no transition."""
        with self._deciding(spec, jitter) as decision:
            decision.command(verb, brief(reason), brief(actor))
            return self._told(decision)

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        """Return whether it is the caller who makes a health check; False if somebody has begun one since."""
        with self._deciding(spec, 0.0) as decision:
            return decision.begin_health_check(to_ms(since))

    def report_health_check(
        self, spec: Spec, outcome: Outcome, evidence: Evidence, *, limit: int, jitter: float = 0.0
    ) -> Answer:
        """Count a health check made while CLOSED or SHADOW; ``limit`` failures in a row open the breaker."""
        with self._deciding(spec, jitter) as decision:
            told = brief(evidence.cause), _retry_after(evidence)
            decision.report_health_check(evidence.epoch, outcome, limit, *told)
            return self._told(decision)

    def adopt(self, snapshot: Snapshot) -> None:
        """Go on from a state last seen in the shared store, with what was left of its open time.

        Counts and permits start empty; epoch, reason and the rest stay, moved to this store's clock.
        It replaces what this store knew of the breaker. A breaker that the shared store had never
        seen (epoch 0) is forgotten.
        """
        with self._lock:
            if snapshot.epoch:
                self._records[snapshot.name] = Record.continued(snapshot, self._now())
            else:
                self._records.pop(snapshot.name, None)

    def clear(self) -> None:
        """Forget all breakers; values stay."""
        with self._lock:
            self._records.clear()
            self._children.clear()

    # --- children -----------------------------------------------------------------------------------

    def enroll(self, spec: Spec) -> bool:
        """Return whether there is room for a child; see :meth:`Store.enroll`."""
        with self._lock:
            return self._family(spec.name).enroll(key_of(spec.name), spec.policy.max_keys, self._now())

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        """Return the names of the children of a breaker; see :meth:`Store.children`."""
        with self._lock:
            used_at = self._family(name).used_at
            keys = sorted(used_at, key=lambda key: (used_at[key], key))
            return [f"{name}:{key}" for key in keys[start : None if count is None else start + count]]

    def cool(self, spec: Spec) -> bool:
        """Take a child off the hot ones; see :meth:`Store.cool`."""
        with self._lock:
            return self._family(spec.name).cool(key_of(spec.name), self._seen(spec, self._now()), self._now())

    def _hot_children(self, spec: Spec) -> tuple[str, ...]:
        return () if spec.parent else tuple(sorted(self._family(spec.name).hot))

    # --- small values -------------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds under ``(kind, key)``, with the time of writing."""
        with self._lock:
            now = self._now()
            self._values.pop((kind, key), None)
            if len(self._values) >= _MOST_VALUES:
                del self._values[next(iter(self._values))]
            self._values[kind, key] = (bytes(value), now, now + to_ms(ttl))

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        """Return ``(value, age in seconds)``, or None."""
        with self._lock:
            value, written_at, ends_at = self._values.get((kind, key), (b"", 0, 0))
            now = self._now()
            return (value, (now - written_at) / 1000) if now < ends_at else None

    # --- changes --------------------------------------------------------------------------------------

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        """Yield None at once, then states as they change; None whenever ``timeout`` seconds pass in silence."""
        listener: queue.Queue[Snapshot] = queue.Queue(_MOST_UNREAD_CHANGES)
        self._listeners.append(listener)
        try:
            yield None
            while True:
                yield _next_or_none(listener, timeout)
        finally:
            if listener in self._listeners:
                self._listeners.remove(listener)

    def check(self) -> None:
        """Do nothing: there is no server."""

    def close(self) -> None:
        """Do nothing: there are no connections."""

    # --- inside ---------------------------------------------------------------------------------------

    def _now(self) -> int:
        return round(self._clock() * 1000)

    @contextmanager
    def _deciding(self, spec: Spec, jitter: float) -> Iterator[Decision]:
        check_key_part("breaker", spec.name)
        rules = spec.rules()
        with self._lock:
            now = self._now()
            record = self._records.get(spec.name)
            if record is None:
                record = self._records[spec.name] = Record.created(spec.name, rules, now)
            record.rules = record.rules.or_newer(rules)
            family = self._family(spec.name)
            is_child = parent_of(spec.name) is not None
            yield Decision(record, now, jitter, not is_child or family.has_room_to_open(record, now))
            if is_child:
                family.note(key_of(spec.name), record, now)

    def _family(self, name: str) -> Children:
        """Return the children of a breaker, or of a child's parent."""
        return self._children.setdefault(parent_of(name) or name, Children())

    def _seen(self, spec: Spec, now: int) -> Record:
        """Return what is known of a breaker under its newest rules; nobody keeps this record."""
        check_key_part("breaker", spec.name)
        rules = spec.rules()
        known = self._records.get(spec.name)
        return replace(known, rules=known.rules.or_newer(rules)) if known else Record(spec.name, rules, since=now)

    def _told(self, decision: Decision) -> Answer:
        snapshot = decision.record.snapshot(decision.now)
        if decision.changed:
            for listener in self._listeners:
                if not listener.full():
                    listener.put(snapshot)
        return Answer(snapshot, decision.transition)


def _next_or_none(listener: queue.Queue[Snapshot], timeout: float) -> Snapshot | None:
    try:
        return listener.get(timeout=timeout)
    except queue.Empty:
        return None


def _retry_after(evidence: Evidence) -> int | None:
    return None if evidence.retry_after is None else to_ms(evidence.retry_after)
