"""What decides without the shared store: breakers of one process, and the change-over to them.

``LocalStore`` has the primitives of the shared store's scripts over dicts, under one lock, and leaves what follows from
them to the same rules. It serves in users' tests, and while the shared store is unavailable.

``FailoverStore`` is the shared store while it answers, and a ``LocalStore`` while it does not, so that no task fails
because of the store. The local store goes on from the last state that this process knew: OPEN is honoured until its
deadline, what an operator has set stays set, counts begin anew. The first answer of the shared store ends that, and
what was decided locally is forgotten. Operators' verbs, health checks and kept values are not decided by one process:
there a ``StoreError`` reaches the caller.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from resilient_tasks.core.model import (
    HELD_OPEN,
    Calls,
    Outcome,
    Snapshot,
    State,
    key_of,
    parent_of,
)
from resilient_tasks.core.rules import (
    COUNTING,
    LONGEST_LEASE,
    NO_EVIDENCE,
    OLDEST,
    UNIT,
    Change,
    Counter,
    Kept,
    Rules,
    Seen,
    learn,
    to_ms,
)  # fmt: skip
from resilient_tasks.errors import StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.background import renew_after_fork
from resilient_tasks.store.base import IDLE_AFTER, RuledStore, Spec, Store
from resilient_tasks.store.keys import check_key_part

logger = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_MOST_VALUES = 10_000
_MOST_UNREAD_CHANGES = 1_000
_DEFAULT_RULES = Rules.from_policy(BreakerPolicy(), OLDEST).text()


@dataclass(slots=True)
class _Children:
    """Children of one breaker by key: when each was last used (for ever while it is held open), and the active ones."""

    used_at: dict[str, float] = field(default_factory=dict)
    active: dict[str, int] = field(default_factory=dict)  # -> last transition


class LocalStore(RuledStore):
    """A store inside this process; safe to use from several threads.

    Args:
        clock: returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._breakers: dict[str, Kept] = {}
        self._values: dict[tuple[str, str], tuple[bytes, int, int]] = {}  # -> value, written at, ends at
        self._listeners: list[queue.Queue[Snapshot]] = []
        self._keyed: dict[str, _Children] = {}
        self._changed: dict[str, int] = {}
        renew_after_fork(self)

    def __repr__(self) -> str:
        return "LocalStore()"

    def after_fork(self) -> None:
        """Start with a new lock and without the parent's listeners."""
        self._lock = threading.RLock()
        self._listeners = []

    # --- primitives: those of store/lua -------------------------------------------------------------

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        with self._lock:
            return [self._seen(spec).snapshot() for spec in specs]

    def _look(self, spec: Spec) -> Seen:
        with self._lock:
            self._declare(spec)
            return self._seen(spec)

    def _count(self, spec: Spec, epoch: int, runs: Sequence[Calls], check: tuple[Outcome, int] | None = None) -> Seen:
        with self._lock:
            kept, rules = self._declare(spec)
            fields = kept.fields
            is_current = epoch == fields["epoch"] or (epoch == 0 and fields["epoch"] == fields["first"])
            if is_current and fields["state"] in COUNTING:
                Counter(kept, rules, self._now()).count(runs)
                if check is not None:
                    failed = fields["failed_checks"] + 1 if check[0] is Outcome.FAILURE else 0
                    fields.update(failed_checks=failed, check_limit=check[1])
            if spec.parent is not None:
                used_at, key = self._children_of(spec.name).used_at, key_of(spec.name)
                used_at[key] = max(used_at.get(key, 0), self._now())
            return self._seen(spec)

    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        with self._lock:
            kept, rules = self._declare(spec)
            now, fields = self._now(), kept.fields
            for leases in (kept.trials, kept.slots):
                leases.update({each: min(end, now + LONGEST_LEASE) for each, end in leases.items()})
            seen, lease_end = self._seen(spec), now + min(lease, LONGEST_LEASE)
            limit, permit = seen.concurrency_limit, f"{seen.epoch}:{holder}"
            granted = seen.state not in {State.OPEN, State.FORCED_OPEN}
            if limit is not None and kept.slots.get(holder, 0) <= now:
                granted = granted and _live(kept.slots, now) < limit
            if granted and seen.state is State.HALF_OPEN:
                used = fields["ok"] + fields["ko"] + sum(each.startswith(f"{seen.epoch}:") for each in kept.trials)
                is_new = permit not in kept.trials and max(used, _live(kept.trials, now)) < rules.trial_calls
                granted = is_new or kept.trials.get(permit, 0) > now
                if granted:
                    kept.trials[permit] = max(kept.trials.get(permit, 0), lease_end)
            if granted and limit is not None:
                kept.slots = {each: end for each, end in kept.slots.items() if end > now}
                kept.slots[holder] = max(kept.slots.get(holder, 0), lease_end)
            return self._seen(spec), granted

    def _settle(self, spec: Spec, holder: str, epoch: int, outcome: Outcome) -> tuple[Seen, bool]:
        with self._lock:
            kept, rules = self._declare(spec)
            now, fields, ended = self._now(), kept.fields, outcome is not Outcome.OVERDUE
            permit, freed = f"{epoch}:{holder}", False
            is_own = fields["state"] is State.HALF_OPEN and epoch == fields["epoch"]
            if kept.trials.get(permit, 0) > now and is_own and (ended or rules.slow_counts):
                lease_end = kept.trials.pop(permit)
                if not ended:
                    kept.trials[f"0:{holder}"] = lease_end
                self._count_trial(fields, outcome, rules)
                freed = outcome is Outcome.IGNORED
            elif ended and not is_own:
                freed = kept.trials.pop(permit, None) is not None
            if ended:
                freed |= kept.trials.pop(f"0:{holder}", None) is not None
            had_slot = kept.slots.get(holder, 0) > now
            if had_slot and rules.least_in_flight and outcome is not Outcome.IGNORED:
                learn(fields, rules, _live(kept.slots, now), outcome)
            if ended:
                kept.slots.pop(holder, None)
            if freed:
                fields["version"] += 1
                self._publish(spec)
            return self._seen(spec), had_slot

    def _count_trial(self, fields: dict[str, Any], outcome: Outcome, rules: Rules) -> None:
        if outcome is Outcome.SUCCESS or (outcome is Outcome.SLOW and not rules.slow_counts):
            fields["ok"] += 1
        elif outcome is not Outcome.IGNORED:
            fields["ko"] += 1
            fields["total_failures"] += 1
        if outcome in {Outcome.SUCCESS, Outcome.SLOW}:
            fields["last_success_at"] = self._now()

    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        with self._lock:
            kept, rules = self._declare(spec)
            now = self._now()
            share = rules.max_open_ratio if change.opens_child and spec.parent else 0.0
            if kept.fields["version"] != seen.version or not self._has_room(spec.name, share, now - rules.window):
                return self._seen(spec), False
            kept.fields.update(change.fields, state=State(change.fields.get("state", kept.fields["state"])))
            kept.trials = {member: end for member, end in kept.trials.items() if end > now}
            if change.forgets:
                for tasks in kept.tasks.values():
                    tasks.clear()
            if spec.parent is not None:
                children, key = self._children_of(spec.name), key_of(spec.name)
                children.used_at[key] = math.inf if kept.fields["state"] in HELD_OPEN else now
                children.active[key] = now
            self._publish(spec)
            return self._seen(spec), True

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        check_key_part("breaker", name)
        with self._lock:
            kept, now = self._breakers.get(name) or Kept({}), self._now()
            return [self._renew(kept, holder, now, min(to_ms(lease), LONGEST_LEASE)) for holder in holders]

    @staticmethod
    def _renew(kept: Kept, holder: str, now: int, lease: int) -> bool:
        permits = [member for member in kept.trials if member.partition(":")[2] == holder]
        held = [(kept.slots, holder), *((kept.trials, permit) for permit in permits)]
        live = [(leases, member) for leases, member in held if leases.get(member, 0) > now]
        for leases, member in live:
            leases[member] = max(leases[member], now + lease)
        return bool(live)

    def adopt(self, snapshot: Snapshot) -> None:
        """Go on from a state last seen in the shared store, moved to this store's clock.

        Counts and permits start empty. A breaker that the shared store had never seen (epoch 0) is forgotten.
        """
        with self._lock:
            if snapshot.epoch:
                self._breakers[snapshot.name] = Kept(continued(snapshot, self._now()))
            else:
                self._breakers.pop(snapshot.name, None)

    def clear(self) -> None:
        """Forget all breakers; values stay."""
        with self._lock:
            self._breakers.clear()
            self._keyed.clear()
            self._changed.clear()

    # --- children -----------------------------------------------------------------------------------

    def register(self, spec: Spec) -> Snapshot | None:
        with self._lock:
            used_at, key, seen_at = self._children_of(spec.name).used_at, key_of(spec.name), self._now()
            if key not in used_at and len(used_at) >= spec.policy.max_keys:
                idle = [each for each, at in used_at.items() if at <= seen_at - IDLE_AFTER]
                for each in idle:
                    del used_at[each]
                if not idle:
                    return None
            used_at.setdefault(key, seen_at)
        return self.read([spec])[0]

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        with self._lock:
            used_at = self._children_of(name).used_at
            keys = sorted(used_at, key=lambda key: (used_at[key], key))
            return [f"{name}:{key}" for key in keys[start : None if count is None else start + count]]

    def active_children(self, name: str, *, start: int = 0, count: int = 500) -> list[str]:
        with self._lock:
            active = self._children_of(name).active
            return [
                f"{name}:{key}" for key in sorted(active, key=lambda key: (active[key], key))[start : start + count]
            ]

    def mark_idle(self, spec: Spec) -> bool:
        with self._lock:
            is_plain = self._seen(spec).is_plain
            if is_plain:
                self._children_of(spec.name).active.pop(key_of(spec.name), None)
            return is_plain

    def _has_room(self, name: str, share: float, since: int) -> bool:
        used_at = self._children_of(name).used_at.values()
        held_open, active = sum(at == math.inf for at in used_at), sum(at > since for at in used_at)
        return share == 0 or held_open + 1 <= share * active

    # --- small values -------------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        with self._lock:
            now = self._now()
            self._values.pop((kind, key), None)
            if len(self._values) >= _MOST_VALUES:
                del self._values[next(iter(self._values))]
            self._values[kind, key] = (bytes(value), now, now + to_ms(ttl))

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        with self._lock:
            value, written_at, ends_at = self._values.get((kind, key), (b"", 0, 0))
            now = self._now()
            return (value, (now - written_at) / 1000) if now < ends_at else None

    # --- changes --------------------------------------------------------------------------------------

    def changed(self, since: float) -> dict[str, float]:
        with self._lock:
            return {name: at / 1000 for name, at in self._changed.items() if at >= to_ms(since)}

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
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
        pass

    def close(self) -> None:
        pass

    # --- inside ---------------------------------------------------------------------------------------

    def _now(self) -> int:
        return round(self._clock() * 1000)

    def _declare(self, spec: Spec) -> tuple[Kept, Rules]:
        """Return a breaker, which comes into being if it is new, and the rules with the higher revision."""
        check_key_part("breaker", spec.name)
        kept, text = self._breakers.get(spec.name), spec.rules().text()
        if kept is None:
            kept = self._breakers[spec.name] = Kept(new(self._now()))
        rules = spec.rules().or_newer(kept.fields["rules"])
        if rules.text() != kept.fields["rules"]:
            kept.fields.update(rules=text, failure_peak=0, slow_peak=0, row_peak=0)
        return kept, rules

    def _seen(self, spec: Spec) -> Seen:
        check_key_part("breaker", spec.name)
        kept, now = self._breakers.get(spec.name) or Kept(new(self._now(), epoch=0)), self._now()
        fields = {**kept.fields, "active_children": len(self._children_of(spec.name).active)}
        rules, waiting = spec.rules().or_newer(kept.fields["rules"]), (_live(kept.slots, now), 0, None, None)
        return Seen(spec.name, now, rules, fields, dict(kept.trials), waiting)

    def _children_of(self, name: str) -> _Children:
        """Return the children of a breaker, or of a child's parent."""
        return self._keyed.setdefault(parent_of(name) or name, _Children())

    def _publish(self, spec: Spec) -> None:
        self._changed[spec.name] = self._now()
        for listener in self._listeners:
            if not listener.full():
                listener.put(self._seen(spec).snapshot())


def _live(leases: Mapping[str, int], now: int) -> int:
    return sum(end > now for end in leases.values())


def new(now: int, epoch: int | None = None) -> dict[str, Any]:
    """Return the fields of a new breaker; epoch and version start from the clock."""
    first = now if epoch is None else epoch
    return {
        "state": State.CLOSED, "epoch": first, "first": first, "version": first, "since": now, "rules": None,
        "ok": 0, "ko": 0, "total_failures": 0, "learned": 0, "credit": 0, "backed_off": 0, **NO_EVIDENCE,
    }  # fmt: skip


def continued(snapshot: Snapshot, now: int) -> dict[str, Any]:
    """Return the fields of a breaker that goes on from ``snapshot``, with its times moved to another clock."""

    def here(at: float | None) -> int | str:
        return "" if at is None else now + round((at - snapshot.now) * 1000)

    figures = snapshot.calls, snapshot.failures, snapshot.slow, snapshot.evidence * UNIT, snapshot.slow_evidence * UNIT
    return {
        **new(now, snapshot.epoch), "first": -1, "state": snapshot.state, "version": snapshot.version,
        "since": here(snapshot.since), "reason": snapshot.reason, "actor": snapshot.actor,
        "openings": snapshot.openings, "open_until": here(snapshot.open_until),
        "frozen": "" if snapshot.state in COUNTING else " ".join(str(round(each)) for each in figures),
        "last_success_at": here(snapshot.last_success_at), "total_failures": snapshot.total_failures,
        "ramp_since": here(snapshot.ramp_since), "checked_at": here(snapshot.checked_at) or 0,
        "learned": snapshot.concurrency_limit or 0, "backed_off": 1,
        "rules": _DEFAULT_RULES,
    }  # fmt: skip


def _next_or_none(listener: queue.Queue[Snapshot], timeout: float) -> Snapshot | None:
    try:
        return listener.get(timeout=timeout)
    except queue.Empty:
        return None


def _decided(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[FailoverStore, _P], _T]:
    """Return a method that asks the shared store, or the local one while that is unavailable."""

    def decide(self: FailoverStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            answer: _T = getattr(self._primary, method.__name__)(*args, **kwargs)
        except StoreError as error:
            self._leave(error)
            specs: Any = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
            self._adopt(spec.name for spec in specs if isinstance(spec, Spec))
            return cast("_T", getattr(self._local, method.__name__)(*args, **kwargs))
        self._return()
        self._note_all(answer)
        return answer

    return decide


def _shared(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[FailoverStore, _P], _T]:
    """Return a method that asks the shared store or raises ``StoreError``."""

    def ask(self: FailoverStore, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        answer: _T = getattr(self._primary, method.__name__)(*args, **kwargs)
        self._note_all(answer)
        return answer

    return ask


class FailoverStore:
    """A store whose decisions never raise ``StoreError``.

    The delay of a decision is bounded by the shared store's own time limit and its fail-fast cooldown. Local decisions
    are made on the shared store's clock, as well as this process knows it; ``clock`` is monotonic, in seconds.
    """

    def __init__(self, primary: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._primary = primary
        self._local = LocalStore(self._shared_time)
        self._clock = clock
        self._offset = time.time() - clock()
        self._known: dict[str, Snapshot] = {}
        self._adopted: set[str] = set()
        self._is_unavailable = False
        self.switches = 0  # how often it was left, and returned to
        self.after_fork()
        renew_after_fork(self)

    def __repr__(self) -> str:
        return f"FailoverStore({self._primary!r})"

    def after_fork(self) -> None:
        """Replace the lock; the child goes on from what the parent knew."""
        self._lock = threading.Lock()

    @property
    def is_unavailable(self) -> bool:
        """Whether the shared store did not answer when it was last asked for a decision."""
        return self._is_unavailable

    # --- decisions ----------------------------------------------------------------------------------

    read, acquire, record = _decided(Store.read), _decided(Store.acquire), _decided(Store.record)
    settle, advance, register = _decided(Store.settle), _decided(Store.advance), _decided(Store.register)
    active_children, changed = _decided(Store.active_children), _decided(Store.changed)

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        local = self._local if self._is_unavailable else None
        try:
            return self._primary.renew(name, holders, lease=lease)
        except StoreError as error:
            self._leave(error)
            if local is not None:
                local.renew(name, holders, lease=lease)
            return [True] * len(holders)  # nothing shows that one is lost

    def forget(self, name: str) -> None:
        """Let go of what this process knows of a child that it does not use any more."""
        with self._lock:
            self._known.pop(name, None)
            self._adopted.discard(name)

    def _note_all(self, answer: object) -> None:
        for each in answer if isinstance(answer, list) else [getattr(answer, "snapshot", answer)]:
            if isinstance(each, Snapshot):
                self._note(each)

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
        if not self._is_unavailable:
            self._is_unavailable = True
            self.switches += 1
            logger.warning("the shared store is unavailable, this process decides for itself: %s", error)

    def _return(self) -> None:
        if self._is_unavailable:
            self.switches += 1
            with self._lock:
                self._is_unavailable = False
                self._adopted.clear()
                self._local.clear()
            logger.warning("the shared store answers again")

    # --- what only the shared store can do ------------------------------------------------------------

    def read_shared(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers from the shared store or not at all, for people who ask what the fleet knows."""
        return self._primary.read(specs)

    command, children, mark_idle = _shared(Store.command), _shared(Store.children), _shared(Store.mark_idle)
    begin_health_check = _shared(Store.begin_health_check)
    report_health_check = _shared(Store.report_health_check)
    put, get, check, close = _shared(Store.put), _shared(Store.get), _shared(Store.check), _shared(Store.close)

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        for snapshot in self._primary.changes(timeout=timeout):
            if snapshot is not None:
                self._note(snapshot)
            yield snapshot
