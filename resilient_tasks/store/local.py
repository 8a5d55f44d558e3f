"""``LocalStore``: breakers of one process, without a server.

It runs ``core/machine.py`` under one lock. It serves while the shared store cannot be reached, in
users' tests, and as the reference that the contract suite compares the shared store with. All that
it keeps is bounded.
"""

from __future__ import annotations

import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from resilient_tasks.core.machine import Decision
from resilient_tasks.core.model import Answer, Grant, Outcome, Snapshot, Verb
from resilient_tasks.core.record import Record, Rules, brief, to_ms
from resilient_tasks.store.base import MOST_REVOKED, REVOKED_FOR, Evidence, Pace, Spec
from resilient_tasks.store.forking import renew_after_fork
from resilient_tasks.store.keys import check_name
from resilient_tasks.store.waiting import Times, Waiting

_MOST_DEFERRED = 100_000  # per breaker; the index of a store that is meant to bridge an outage of the shared one
_MOST_VALUES = 10_000
_MOST_UNREAD_CHANGES = 1_000


@dataclass(slots=True)
class _Tick:
    holder: str = ""
    lease_ends: int = 0
    completed: int | None = None


class LocalStore:
    """A store inside this process; safe to use from several threads.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._records: dict[str, Record] = {}
        self._waiting: dict[str, Waiting] = {}
        self._values: dict[tuple[str, str], tuple[bytes, int, int]] = {}  # -> value, written at, ends at
        self._revoked = Times()
        self._ticks: dict[str, _Tick] = {}
        self._declared: dict[str, int] = {}
        self._listeners: list[queue.Queue[Snapshot]] = []
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
            return [self._snapshot(self._seen(spec, now), now) for spec in specs]

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        """Ask to make one call; see :meth:`Store.acquire`."""
        with self._deciding(spec, jitter) as decision:
            admitted, trial = decision.acquire(holder, to_ms(lease))
            answer = self._answer(decision)
        return Grant(admitted, trial, answer.snapshot, answer.transition)

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        """Lengthen live permits to ``lease`` seconds from now. False: the permit is no longer held."""
        check_name("breaker", name)
        with self._lock:
            now, record = self._now(), self._records.get(name)
            return [record is not None and record.renew(h, lease=to_ms(lease), now=now) for h in holders]

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count outcomes of calls that needed no permit; open the breaker if that trips it."""
        with self._deciding(spec, jitter) as decision:
            decision.report(evidence.epoch, evidence.runs, brief(evidence.cause), _retry_after(evidence))
            return self._answer(decision)

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count the outcome of a trial and free its permit. Without a live permit it changes nothing."""
        with self._deciding(spec, jitter) as decision:
            decision.settle(holder, evidence.epoch, outcome, brief(evidence.cause), _retry_after(evidence))
            return self._answer(decision)

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        """Do what time has made due: expired permits become failures, OPEN becomes HALF_OPEN."""
        with self._deciding(spec, jitter) as decision:
            decision.advance()
            return self._answer(decision)

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb. A verb that leads to the present state makes no transition."""
        with self._deciding(spec, jitter) as decision:
            decision.command(verb, brief(reason), brief(actor))
            return self._answer(decision)

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

    # --- deferred tasks -----------------------------------------------------------------------------

    def add_deferred(self, name: str, task_id: str, *, deadline: float | None = None) -> None:
        """Index a deferred task. ``deadline``: store time at which its ``defer_for`` ends."""
        with self._lock:
            waiting = self._waiting_for(name)
            if task_id not in waiting.deferred:
                if len(waiting.deferred) >= _MOST_DEFERRED:
                    return
                waiting.deferred.put(task_id, self._now())
            if deadline is None:
                waiting.deadlines.discard(task_id)
            else:
                waiting.deadlines.put(task_id, to_ms(deadline))

    def remove_deferred(self, name: str, task_ids: Iterable[str]) -> None:
        """Forget deferred tasks that were resumed, dead-lettered or dropped."""
        with self._lock:
            waiting = self._waiting_for(name)
            for task_id in task_ids:
                waiting.deferred.discard(task_id)
                waiting.deadlines.discard(task_id)

    def clear_deferred(self, name: str) -> None:
        """Forget all deferred tasks of a breaker, because its deferred queue is known to be empty."""
        with self._lock:
            waiting = self._waiting_for(name)
            waiting.deferred, waiting.deadlines = Times(), Times()

    def pace(self, name: str) -> Pace:
        """Return the resume pace of a breaker."""
        with self._lock:
            return self._waiting_for(name).pace

    def save_pace(self, name: str, pace: Pace) -> None:
        """Keep ``pace``, but for ``outstanding``, which is only moved by the methods below."""
        with self._lock:
            waiting = self._waiting_for(name)
            waiting.pace = replace(pace, outstanding=waiting.pace.outstanding)

    def resumed(self, name: str, count: int) -> None:
        """Add ``count`` to the resumed tasks that no worker has taken up yet."""
        self._move_outstanding(name, count)

    def taken_up(self, name: str, count: int) -> None:
        """Take ``count`` off them again, never below 0."""
        self._move_outstanding(name, -count)

    def revoke(self, task_ids: Iterable[str]) -> None:
        """Remember revoked task ids for seven days, the latest 50,000 of them."""
        with self._lock:
            now = self._now()
            for task_id in task_ids:
                self._revoked.put(task_id, now)
            while (oldest := self._revoked.earliest()) and (
                oldest[0] <= now - to_ms(REVOKED_FOR) or len(self._revoked) > MOST_REVOKED
            ):
                self._revoked.discard(oldest[1])

    def revoked(self, task_ids: Sequence[str]) -> set[str]:
        """Return those of ``task_ids`` that were revoked."""
        with self._lock:
            return {task_id for task_id in task_ids if task_id in self._revoked}

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

    # --- the tick -----------------------------------------------------------------------------------

    @contextmanager
    def tick_lease(self, holder: str, *, ttl: float, scope: str = "") -> Iterator[bool]:
        """Hold the one tick lease of ``scope`` while in the context; False when somebody else has it."""
        token = f"{holder}:{uuid.uuid4().hex}"
        with self._lock:
            now, tick = self._now(), self._ticks.setdefault(scope, _Tick())
            if tick.lease_ends <= now:
                tick.holder, tick.lease_ends = token, now + to_ms(ttl)
            held = tick.holder == token
        try:
            yield held
        finally:
            with self._lock:
                if tick.holder == token:
                    tick.lease_ends = 0

    def tick_completed(self, scope: str = "") -> None:
        """Note that a tick has run to its end."""
        with self._lock:
            self._ticks.setdefault(scope, _Tick()).completed = self._now()

    def last_tick_age(self, scope: str = "") -> float | None:
        """Seconds since a tick last ran to its end; None if never."""
        with self._lock:
            completed = self._ticks.get(scope, _Tick()).completed
            return None if completed is None else (self._now() - completed) / 1000

    # --- who is who ---------------------------------------------------------------------------------

    def declare(self, names: Iterable[str]) -> None:
        """Note that a living worker defines these breakers."""
        with self._lock:
            self._declared.update(dict.fromkeys(names, self._now()))

    def abandoned(self, *, unseen_for: float) -> list[str]:
        """Return breakers that workers used to define and none has declared for so many seconds."""
        with self._lock:
            latest = self._now() - to_ms(unseen_for)
            return [name for name, at in self._declared.items() if at <= latest]

    def retire(self, names: Iterable[str]) -> None:
        """Forget that breakers were ever declared."""
        with self._lock:
            for name in names:
                self._declared.pop(name, None)

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
        check_name("breaker", spec.name)
        rules = Rules.of(spec.policy, spec.revision)
        with self._lock:
            now = self._now()
            record = self._records.get(spec.name)
            if record is None:
                record = self._records[spec.name] = Record.created(spec.name, rules, now)
            record.rules = record.rules.or_newer(rules)
            yield Decision(record, now, jitter)

    def _seen(self, spec: Spec, now: int) -> Record:
        """Return what is known of a breaker under its newest rules; nobody keeps this record."""
        check_name("breaker", spec.name)
        rules = Rules.of(spec.policy, spec.revision)
        known = self._records.get(spec.name)
        return replace(known, rules=known.rules.or_newer(rules)) if known else Record(spec.name, rules, since=now)

    def _snapshot(self, record: Record, now: int) -> Snapshot:
        waiting = self._waiting.get(record.name)
        if waiting is None:
            return record.snapshot(now)
        return record.snapshot(
            now,
            deferred=len(waiting.deferred),
            oldest_deferred_at=waiting.deferred.earliest_time(),
            next_deadline_at=waiting.deadlines.earliest_time(),
        )

    def _answer(self, decision: Decision) -> Answer:
        snapshot = self._snapshot(decision.record, decision.now)
        if decision.changed:
            for listener in self._listeners:
                if not listener.full():
                    listener.put(snapshot)
        return Answer(snapshot, decision.transition)

    def _waiting_for(self, name: str) -> Waiting:
        return self._waiting.setdefault(check_name("breaker", name), Waiting())

    def _move_outstanding(self, name: str, count: int) -> None:
        with self._lock:
            waiting = self._waiting_for(name)
            outstanding = max(0, waiting.pace.outstanding + count)
            waiting.pace = replace(waiting.pace, outstanding=outstanding)


def _next_or_none(listener: queue.Queue[Snapshot], timeout: float) -> Snapshot | None:
    try:
        return listener.get(timeout=timeout)
    except queue.Empty:
        return None


def _retry_after(evidence: Evidence) -> int | None:
    return None if evidence.retry_after is None else to_ms(evidence.retry_after)
