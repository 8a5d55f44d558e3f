"""``Dependency``: what guards and workers ask of a breaker; users hold its public face, a ``Breaker``.

It admits calls by this process's cached state or by the store, judges how they end, and reports that. It is made at
import time, before the store's address is known, so it finds its ``Fleet`` on first use: the store, this process's view
of it and its reporter.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any, NamedTuple

from resilient_tasks.checks import Probe
from resilient_tasks.core.classification import (
    Verdict,
    attribute_to,
    attributed_to,
    dependency_errors,
    judge,
    judge_result,
    log_undecided,
    refusal_in,
)
from resilient_tasks.core.model import (
    Answer,
    Grant,
    Outcome,
    Snapshot,
    State,
    Transition,
    Verb,
    child_name,
    parent_of,
    voter_of,
)
from resilient_tasks.core.outage import REFUSED, TRIALS, UNDECIDED
from resilient_tasks.core.rules import OLDEST
from resilient_tasks.errors import AT_CAPACITY, BreakerOpenError, ConfigurationError, StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.history import History
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.store.reporter import LEASE, Reporter
from resilient_tasks.store.view import CachedState, View

logger = logging.getLogger("resilient_tasks")

REMEMBERED_FOR = 60.0  # seconds for which a process goes by its cached state of a CLOSED child, which nothing refreshes
SWEEP_INTERVAL = 60.0  # seconds between two searches for children that are no longer used, made when a new one is
FULL_FOR = 10.0  # seconds for which a parent without room for more children is not asked again

NO_VALUE = object()  # in place of what a call returned: it was a ``with`` block
_SUCCESS, _SLOW = Verdict(Outcome.SUCCESS), Verdict(Outcome.SLOW)

# admits nothing, for breakers that have not joined their fleet yet
_NOWHERE = CachedState(Spec("nowhere"), perf_counter)
_NOWHERE.admits = _NOWHERE.admits_freely = False


class Admitted(NamedTuple):
    """What one breaker has granted to one call."""

    breaker: str
    epoch: int = 0  # at that moment; the outcome is reported for this epoch
    trial: bool = False  # the call holds a permit, or is part of a call that does
    counts: bool = False  # a dependency failure of this run that is attributed to the breaker counts as an attempt
    leased: bool = False  # the call itself holds a permit, or one of a limited number of slots
    for_child: bool = False  # granted by a parent, for a call that counts for a child: only a trial counts
    watched: bool = False  # the call is reported when it is overdue; guards of the same breaker inside it need not be


class Fleet:
    """Store, view and reporter of this process; while the shared store is unavailable, a local one decides.

    ``announce`` gets each transition that this process has made, ``task_id`` returns the id of the task that runs here.
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

    def register(self, spec: Spec) -> bool:
        """Register a child that is about to be used, and declare it; False: there is no room."""
        asked = self.view.asking()
        snapshot = self.store.register(spec)
        if snapshot is not None:
            self.view.declare(spec)
            self.view.take(spec, snapshot, asked)
        return snapshot is not None

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
        """Carry out an operator's verb under the workers' policy, and return the state that it led to."""
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


class Dependency:
    """A breaker as guards and workers use it; a child counts alone, under its parent's policy."""

    reporter: Reporter
    cached: CachedState  # as it is; ``cached_state`` is brought up to date
    plain: CachedState  # the same one, if a call that succeeds needs no look at its duration or value
    _joined: Fleet | None
    _children: dict[str, Dependency]  # without a lock: each step leaves it right, and forks inherit it

    def __init__(self, spec: Spec, find_fleet: Callable[[], Fleet], parent: Dependency | None = None) -> None:
        self.parent = parent
        self.guards = (self,) if parent is None else (parent, self)  # the breakers that a call must pass
        self.spec = spec
        self.name = spec.name
        self.root = self.name if parent is None else parent.name
        self.policy: BreakerPolicy = spec.policy
        # whether the runs of its tasks are limited, in the fleet or in each worker
        self.is_limited = (spec.policy.max_concurrency_per_worker or spec.policy.most_in_flight) is not None
        self.probe: Probe | None = None
        self.slow_after = math.inf if spec.policy.slow_call_duration is None else spec.policy.slow_call_duration
        self._find_fleet = find_fleet
        self._full_until = self._swept_at = -math.inf
        self.detach()

    def __repr__(self) -> str:
        return f"<Dependency {self.name!r}>"

    @property
    def probe_to_run(self) -> Probe | None:
        """The registered probe; if that is a function that takes a key, it is one for each of the children."""
        probe = self.probe if self.parent is None else self.parent.probe
        if probe is None or probe.takes_key != (self.parent is not None):
            return None
        return probe if self.parent is None else probe.of_child(self.name)

    # --- fleet and state --------------------------------------------------------------------------

    @property
    def fleet(self) -> Fleet:
        """This process's fleet; on first use the breaker's state is read from the store."""
        if self._joined is None:
            fleet = self._find_fleet()
            self.reporter = fleet.reporter
            self.cached = fleet.join(self.spec)
            if self.parent is None and self.slow_after == math.inf and self.policy.classify is dependency_errors:
                self.plain = self.cached
            self._joined = fleet
        return self._joined

    @property
    def has_joined(self) -> bool:
        """Whether this process has used the breaker."""
        return self._joined is not None

    def detach(self) -> None:
        self._joined = None
        self.cached = self.plain = _NOWHERE
        self._children = {}

    def declare(self, spec: Spec) -> None:
        self.spec = spec
        if self._joined is not None:
            self._joined.view.declare(spec)

    @property
    def cached_state(self) -> CachedState:
        """Brought up to date; that of a child is read anew from time to time, because nothing follows a CLOSED one."""
        cached = self.cached
        if self._joined is None or self.parent is not None or (cached.counts is not None and cached.is_behind):
            view = self.fleet.view
            view.catch_up(self.cached)
            if self._is_old:
                view.look(self.spec)
        return self.cached

    @property
    def _is_old(self) -> bool:
        return self.parent is not None and (self.cached.age or 0.0) > REMEMBERED_FOR

    @property
    def state(self) -> State:
        return self.cached_state.snapshot.state

    @property
    def accepting(self) -> bool:
        """Whether a task sent now may run; with a probe the workers decide about trials."""
        cached = self.cached_state
        return cached.admits or not (cached.refuses or self.leaves_trials_to_probes)

    @property
    def leaves_trials_to_probes(self) -> bool:
        """Whether a probe keeps tasks from being trials; while the store is unavailable no tick can run it."""
        return self.probe_to_run is not None and not self.fleet.store.is_unavailable

    @property
    def is_current(self) -> bool:
        """Whether the cached state can be used without I/O."""
        return self._joined is not None and not self.cached.is_behind and not self._is_old

    # --- children ---------------------------------------------------------------------------------

    def child(self, key: object) -> Dependency:
        """Return the child of a key; the breaker itself if it has ``max_keys`` children already, none of them idle."""
        if self.parent is not None:
            raise ConfigurationError(
                f"breaker {self.name!r} is a child: allowed is a child of {self.parent.name!r}, not {key!r}"
            )
        name = child_name(self.name, key)
        known = self._children.get(name)
        if known is not None:
            return known
        fleet = self.fleet
        if fleet.view.clock() < self._full_until:
            return self
        if not fleet.register(replace(self.spec, name=name)):
            self._full_until = fleet.view.clock() + FULL_FOR
            return self
        return self.child_named(name)

    def child_named(self, name: str) -> Dependency:
        """Return the child of a name that a process of the fleet has used."""
        known = self._children.get(name)
        if known is None:
            now = self.fleet.view.clock()
            if now >= self._swept_at + SWEEP_INTERVAL:
                self._swept_at = now
                for idle in [each for each, child in list(self._children.items()) if child.is_idle]:
                    self.fleet.view.forget(idle)
                    self._children.pop(idle).detach()
            child = Dependency(replace(self.spec, name=name), self._find_fleet, parent=self)
            known = self._children.setdefault(name, child)
        return known

    @property
    def is_idle(self) -> bool:
        """Whether a child was not used here for a while, and is known as nothing but CLOSED."""
        cached = self.cached
        is_closed = cached.snapshot.state is State.CLOSED and not cached.pending
        return self._joined is None or (is_closed and (cached.age or 0.0) > REMEMBERED_FOR)

    # --- admission --------------------------------------------------------------------------------

    @property
    def refusal(self) -> BreakerOpenError:
        """The error of a refusal at this moment."""
        cached = self.cached_state
        is_full = cached.admits and not cached.admits_freely
        return BreakerOpenError(self.name, AT_CAPACITY if is_full else cached.snapshot.state.value, cached.retry_after)

    def refuse(self) -> BreakerOpenError:
        """Return the error of a refusal, and count it; at capacity no call is kept from the dependency for good."""
        refusal = self.refusal
        if refusal.state != AT_CAPACITY:
            self.fleet.reporter.tally(self.name, REFUSED)
        return refusal

    def lease(self, holder: str, *, for_child: bool, renewed_for: float | None = None) -> Admitted | None:
        """Ask the store for a permit, to be renewed for ``trial_timeout`` or so long, or a slot; None: it is denied."""
        grant = self.fleet.acquire(self.spec, holder)
        if not grant.admitted:
            return None
        if grant.leased:
            limit = self.policy.trial_timeout if renewed_for is None else renewed_for
            self.hold(holder, limit if grant.trial else math.inf)
        return Admitted(self.name, grant.snapshot.epoch, grant.trial, leased=grant.leased, for_child=for_child)

    def hold(self, holder: str, seconds: float) -> None:
        """Renew a permit until it is settled, at most for so many seconds."""
        fleet = self.fleet
        fleet.reporter.hold(self.name, holder, fleet.view.clock() + seconds)

    # --- outcomes ---------------------------------------------------------------------------------

    def judge(self, exc: BaseException, seconds: float = 0.0) -> Verdict:
        """Return what the exception that ended a call after ``seconds`` means for the dependency.

        One that ended a guarded call of another dependency inside this one means nothing here, nor does a refusal,
        whatever it is wrapped in. Another one that means nothing, like a cancellation, is SLOW if it came too late.
        """
        policy = self.policy
        other = attributed_to(exc)
        is_anothers = other is not None and self.name not in (other, parent_of(other))
        if is_anothers or refusal_in(exc, in_groups=False) is not None:
            return Verdict(Outcome.IGNORED, type(exc).__name__)
        verdict = judge(policy.classify, policy.failures, policy.ignore, exc)
        if verdict.undecided and log_undecided(known := parent_of(self.name) or self.name, exc):
            self.fleet.reporter.tally(known, UNDECIDED + verdict.cause)
        return _SLOW if verdict.outcome is Outcome.IGNORED and seconds > self.slow_after else verdict

    def judge_success(self, seconds: float, value: object = NO_VALUE) -> Verdict:
        is_plain = value is NO_VALUE or self.policy.classify is dependency_errors
        verdict = _SUCCESS if is_plain else judge_result(self.policy.classify, value)
        return _SLOW if verdict.outcome is Outcome.SUCCESS and seconds > self.slow_after else verdict

    def conclude(
        self, held: Admitted, verdict: Verdict, *, holder: str, voter: str = "", each: bool = False,
        was_overdue: bool = False,
    ) -> int:  # fmt: skip
        """Report a call, and settle the permit or slot that it holds; see :meth:`Reporter.report`."""
        how: Any = {"voter": voter, "each": each, "was_overdue": was_overdue}
        reporter = self.fleet.reporter
        if held.leased:
            return reporter.settle(self.spec, holder, held.epoch, verdict, **how)
        return reporter.report(self.cached, held.epoch, verdict, **how)

    def voter_of(self, verdict: Verdict) -> str:
        """Return the task that votes by a verdict; "" outside any task, and for a success, which needs no voter."""
        return "" if verdict.outcome is Outcome.SUCCESS else self.fleet.voter()

    def report_failure(self, epoch: int, exc: BaseException, *, is_replaced: bool) -> int:
        """Report a plain call that has raised ``exc``, unless a guard inside has counted that."""
        counted_for, verdict = attributed_to(exc), self.judge(exc)
        if verdict.outcome is Outcome.FAILURE:
            attribute_to(exc, self.name)
        if is_replaced and needs_no_report(self.name, verdict, counted_for):
            return 0
        return self.fleet.reporter.report(self.cached, epoch, verdict, voter=self.voter_of(verdict), each=True)


def with_parents(breakers: Sequence[Dependency]) -> Sequence[Dependency]:
    """Return all breakers that must admit a call for which some count: each after its parent."""
    if len(breakers) == 1:
        return breakers[0].guards
    return [guard for breaker in breakers for guard in breaker.guards]


def needs_no_report(name: str, verdict: Verdict, counted_for: str | None) -> bool:
    """Whether a call adds nothing to what guards inside it have reported: it has no failure of its own.

    ``counted_for`` is the breaker for which one of them has counted the exception that has ended the call.
    """
    return verdict.outcome is not Outcome.FAILURE or name in (counted_for, parent_of(counted_for or ""))
