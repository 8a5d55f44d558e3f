"""What a store keeps of one breaker (:class:`Record`) and a policy in the machine's units (:class:`Rules`).

All times are integer milliseconds on the store's clock; ``core/machine.py`` decides over them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.core.shadow import Openings
from resilient_tasks.core.slots import Slots
from resilient_tasks.core.window import Totals, Window
from resilient_tasks.policy import ADAPTIVE, BreakerPolicy

COUNTING = frozenset({State.CLOSED, State.SHADOW})
_UNLIMITED = frozenset({State.DISABLED, State.SHADOW})
_LONGEST = 10**13  # ms, 317 years; more would lose digits on its way through Lua
_LONGEST_TEXT = 200
OLDEST = -(2**53)  # a revision: every other replaces it
_MOST_GROWTH_STEPS = 1000  # a multiplier close to 1 must not make a loop of a breaker's whole life


def to_ms(seconds: float) -> int:
    """Return whole milliseconds from 0 to 317 years; what is no number at all counts as 0."""
    if math.isnan(seconds):
        return 0
    return round(min(max(seconds * 1000, 0), _LONGEST))


def to_seconds(ms: int | None) -> float | None:
    """Return seconds, None for None."""
    return None if ms is None else ms / 1000


def brief(text: str) -> str:
    """Return ``text`` as one line of at most 200 characters that every store can keep."""
    return " ".join(text.encode("utf-8", "replace").decode().split())[:_LONGEST_TEXT]


def ramp_share(elapsed: float, ramp: float) -> float:
    """Return the share, from a tenth to all, that is let through ``elapsed`` after a recovery."""
    return (ramp + 9 * elapsed) / (10 * ramp)


class Rules(NamedTuple):
    """A policy in the machine's units: durations are milliseconds, 0 stands for "off"."""

    revision: int
    failure_rate: float
    slow_rate: float
    slow_trial_fails: bool
    consecutive: int
    minimum_calls: int
    minimum_tasks: int
    window: int
    open_time: int
    open_growth: float
    max_open_time: int
    open_jitter: float
    trial_calls: int
    needed: int
    ramp: int
    most_in_flight: int
    least_in_flight: int  # of an adaptive limit
    max_open_ratio: float

    @classmethod
    def of(cls, policy: BreakerPolicy, revision: int, in_a_row: int | None = None) -> Rules:
        """Translate a policy.

        Args:
            policy: of the breaker.
            revision: orders declarations of one breaker.
            in_a_row: so many trials are made and none may fail, whatever the policy says of trials.
        """
        return cls(
            revision=revision,
            failure_rate=policy.failure_rate_threshold,
            slow_rate=policy.slow_call_rate_threshold,
            slow_trial_fails=policy.slow_call_duration is not None,
            consecutive=policy.consecutive_failures or 0,
            minimum_calls=policy.minimum_calls,
            minimum_tasks=policy.needed_tasks,
            window=max(1, to_ms(policy.window)),
            open_time=max(1, to_ms(policy.open_duration)),
            open_growth=policy.open_multiplier,
            max_open_time=max(1, to_ms(policy.max_open_duration)),
            open_jitter=policy.open_jitter,
            trial_calls=in_a_row or policy.trial_calls,
            needed=in_a_row or policy.needed_successes,
            ramp=to_ms(policy.ramp),
            most_in_flight=policy.most_in_flight or 0,
            least_in_flight=policy.min_concurrency if policy.concurrency == ADAPTIVE else 0,
            max_open_ratio=policy.max_open_ratio or 0.0,
        )

    def or_newer(self, declared: Rules) -> Rules:
        """Return the rules with the higher revision; of equal ones those declared last."""
        return self if self.revision > declared.revision else declared

    def open_for(self, openings: int, retry_after: int | None, jitter: float) -> int:
        """Return the open time of the ``openings``-th opening in a row, lengthened by a ``jitter`` of 0.0 to 1.0."""
        own = float(self.open_time)
        for _ in range(min(openings - 1, _MOST_GROWTH_STEPS)):
            own *= self.open_growth
            if own >= self.max_open_time:
                break
        length = max(min(own, self.max_open_time), min(retry_after or 0, self.max_open_time))
        return math.floor(length * (1 + self.open_jitter * jitter) + 0.5)


@dataclass(slots=True)
class Record:
    """Everything a store keeps of one breaker. Times are milliseconds on the store's clock."""

    name: str
    rules: Rules
    state: State = State.CLOSED
    epoch: int = 0
    first_epoch: int = 0  # the epoch of its creation
    version: int = 0
    since: int = 0
    reason: str = ""
    actor: str = ""
    openings: int = 0
    open_until: int | None = None
    frozen: Totals = field(default_factory=Totals)  # the window's sums when the breaker last stopped counting
    row: int = 0  # failures since the last success
    trial_successes: int = 0  # counted since HALF_OPEN was entered
    trial_failures: int = 0
    last_success_at: int | None = None
    total_failures: int = 0
    ramp_since: int | None = None
    would_open: bool = False  # SHADOW: the last of ``shadow`` has not been taken to be over
    shadow: Openings = ()  # since SHADOW was entered last
    failed_checks: int = 0  # in a row, while no task decides
    checked_at: int | None = None  # when somebody last began a health check
    window: Window = field(default_factory=Window)
    trials: dict[str, int] = field(default_factory=dict)  # holder of a permit -> end of its lease
    stragglers: dict[str, int] = field(default_factory=dict)  # the same, of trials that outlived their HALF_OPEN
    slots: Slots = field(default_factory=Slots)

    @classmethod
    def created(cls, name: str, rules: Rules, now: int) -> Record:
        """Return a new CLOSED breaker.

        Epoch and version start from the clock: outcomes admitted before the store lost its data
        must not match, and views that remember the old version must see the new one as newer.
        """
        return cls(name, rules, epoch=now, first_epoch=now, version=now, since=now)

    @classmethod
    def continued(cls, snapshot: Snapshot, now: int) -> Record:
        """Return a record that goes on from ``snapshot``, with its times moved to another clock.

        Calls counted so far and permits are not known and start empty; so are the rules, until
        somebody comes with a declaration.
        """

        def here(at: float | None) -> int | None:
            return None if at is None else now + round((at - snapshot.now) * 1000)

        counts = snapshot.state in COUNTING
        return cls(
            name=snapshot.name,
            rules=Rules.of(BreakerPolicy(), OLDEST),
            state=snapshot.state,
            epoch=snapshot.epoch,
            version=snapshot.version,
            since=here(snapshot.since) or now,
            reason=snapshot.reason,
            actor=snapshot.actor,
            openings=snapshot.openings,
            open_until=here(snapshot.open_until),
            frozen=Totals() if counts else _totals(snapshot),
            last_success_at=here(snapshot.last_success_at),
            total_failures=snapshot.total_failures,
            ramp_since=here(snapshot.ramp_since),
            failed_checks=snapshot.failed_checks,
            checked_at=here(snapshot.checked_at),
            slots=Slots(learned=snapshot.concurrency_limit or 0, backed_off=True),
        )

    def figures(self, now: int) -> Totals:
        """Return the sums of the window, or what they were when the breaker stopped counting."""
        if self.state in COUNTING:
            return self.window.totals(now=now, length=self.rules.window)
        return self.frozen

    def openings_left(self, now: int) -> int:
        """Return the openings in a row, less one for each ``max_open_time`` spent CLOSED."""
        if self.state is not State.CLOSED:
            return self.openings
        return max(0, self.openings - max(0, now - self.since) // self.rules.max_open_time)

    def live_trials(self, now: int) -> int:
        """Return the number of permits whose lease has not run out, those of stragglers included."""
        return sum(end > now for permits in (self.trials, self.stragglers) for end in permits.values())

    def concurrency_limit(self, now: int) -> int | None:
        """Return how many calls may be in flight; None: any number. It grows from a tenth during a ramp."""
        rules = self.rules
        if not rules.most_in_flight or self.state in _UNLIMITED:
            return None
        limit = self.slots.size(rules.least_in_flight, rules.most_in_flight)
        elapsed = rules.ramp if self.ramp_since is None else max(0, now - self.ramp_since)
        return limit if elapsed >= rules.ramp else max(1, math.floor(limit * ramp_share(elapsed, rules.ramp)))

    def in_flight(self, now: int) -> int:
        """Return the number of slots in use; nobody counts them where there is no limit."""
        return self.slots.in_flight(now) if self.rules.most_in_flight else 0

    def offers_slot(self, holder: str, now: int) -> bool:
        """Return whether the limit of calls in flight, if there is one, lets ``holder`` in."""
        limit = self.concurrency_limit(now)
        return limit is None or self.slots.holds(holder, now) or self.slots.in_flight(now) < limit

    def is_ramping(self, now: int) -> bool:
        """Return whether the breaker is fresh from a recovery."""
        return self.ramp_since is not None and now - self.ramp_since < self.rules.ramp

    def renew(self, holder: str, *, lease: int, now: int) -> bool:
        """Lengthen a live permit or slot to ``lease`` from now; False if there is none."""
        leases = self.trials, self.stragglers, self.slots.leases
        held = [permits for permits in leases if permits.get(holder, now) > now]
        for permits in held:
            permits[holder] = max(permits[holder], now + lease)
        return bool(held)

    def snapshot(
        self, now: int, *, deferred: int = 0, oldest_deferred_at: int | None = None, next_deadline_at: int | None = None
    ) -> Snapshot:
        """Return the breaker as others see it, in seconds."""
        figures = self.figures(now)
        return Snapshot(
            name=self.name,
            state=self.state,
            epoch=self.epoch,
            version=self.version,
            now=now / 1000,
            since=self.since / 1000,
            reason=self.reason,
            actor=self.actor,
            calls=figures.calls,
            failures=figures.failures,
            slow=figures.slow,
            openings=self.openings_left(now),
            open_until=to_seconds(self.open_until),
            trials=self.live_trials(now),
            last_success_at=to_seconds(self.last_success_at),
            total_failures=self.total_failures,
            ramp_since=to_seconds(self.ramp_since),
            would_open=self.would_open and now < self.shadow[-1].until,
            would_have_opened=len(self.shadow),
            failed_checks=self.failed_checks,
            checked_at=to_seconds(self.checked_at),
            in_flight=self.in_flight(now),
            concurrency_limit=self.concurrency_limit(now),
            deferred=deferred,
            oldest_deferred_at=to_seconds(oldest_deferred_at),
            next_deadline_at=to_seconds(next_deadline_at),
        )


def _totals(snapshot: Snapshot) -> Totals:
    return Totals(snapshot.calls, snapshot.failures, snapshot.slow)
