"""The rules of a breaker: what is evidence, when it opens and for how long, and how it heals.

A store counts and leases; what follows from that is decided here, by :func:`decide`, after every answer of a store and
in whichever process has got it. Nothing here has a clock, a lock or I/O. Times are integer milliseconds on the store's
clock, scores integers in millionths, so that every process, and the script that counts, come to the same result.

Evidence is a score (Page's CUSUM, the quickest test for a change): a bad call adds one, a good one takes
``threshold / (1 - threshold)`` away, never below 0. It opens the breaker at ``minimum_calls``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from resilient_tasks.core.model import TARGETS, Calls, Outcome, Snapshot, State, Transition, Verb
from resilient_tasks.policy import ADAPTIVE, BreakerPolicy

COUNTING = frozenset({State.CLOSED, State.SHADOW})
OLDEST = -(2**53)  # a revision: every other replaces it
LONGEST_LEASE = 60_000  # ms; a lease that ends later is from a clock that was ahead
_UNLIMITED = frozenset({State.DISABLED, State.SHADOW})
_LONGEST = 10**13  # ms, 317 years; more would lose digits on its way through Lua
_LONGEST_TEXT = 200
_MOST_GROWTH_STEPS = 1000  # a multiplier close to 1 must not make a loop of a breaker's whole life

UNIT = 1_000_000  # one bad call
_ALL = 10**15  # more than any score: a success takes all of it
MOST_TASKS = 1000  # remembered per score; a run of one more adds again
BUCKETS = 5  # of a quarter of the window each: sums for people cover one window to one and a quarter


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
    """A policy as stores keep it: durations are milliseconds, shares of a score millionths, 0 means "off"."""

    revision: int
    minimum_calls: int
    minimum_tasks: int
    failure_take: int  # what a success takes from the failure score
    slow_take: int
    slow_counts: bool  # slow calls matter: failures add to the slow score, a slow trial has failed
    consecutive: int
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
    def from_policy(cls, policy: BreakerPolicy, revision: int, in_a_row: int | None = None) -> Rules:
        """Translate a policy; if ``in_a_row``, so many trials are made and none may fail, whatever it says."""
        return cls(
            revision=revision,
            minimum_calls=policy.minimum_calls,
            minimum_tasks=policy.needed_tasks,
            failure_take=_taken_by_success(policy.failure_rate_threshold),
            slow_take=_taken_by_success(policy.slow_call_rate_threshold),
            slow_counts=policy.slow_call_duration is not None,
            consecutive=policy.consecutive_failures or 0,
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

    def text(self) -> str:
        """Return the rules as stores keep them: JSON."""
        return _as_text(self)

    def numbers(self) -> tuple[int, ...]:
        """Return those that most scripts need; see ``store/lua/lib/breaker.lua``."""
        return (
            self.window, self.max_open_time, self.most_in_flight, self.minimum_calls, self.minimum_tasks,
            self.failure_take, self.slow_take, int(self.slow_counts), self.revision,
        )  # fmt: skip

    def or_newer(self, stored: str | None) -> Rules:
        """Return the stored rules if their revision is higher, else these."""
        if not stored or stored == self.text():
            return self
        fields: dict[str, Any] = json.loads(stored)
        if fields["revision"] <= self.revision:
            return self
        # stored by another release: what it does not know is as declared here
        return Rules(**{**self._asdict(), **{name: fields[name] for name in self._fields if name in fields}})

    def open_for(self, openings: int, retry_after: int | None, jitter: float) -> int:
        """Return the open time of the ``openings``-th opening in a row, lengthened by a ``jitter`` of 0.0 to 1.0."""
        own = float(self.open_time)
        for _ in range(min(openings - 1, _MOST_GROWTH_STEPS)):
            own *= self.open_growth
            if own >= self.max_open_time:
                break
        length = max(min(own, self.max_open_time), min(retry_after or 0, self.max_open_time))
        return math.floor(length * (1 + self.open_jitter * jitter) + 0.5)


@lru_cache(maxsize=10_000)
def _as_text(rules: Rules) -> str:
    return json.dumps(rules._asdict())


def _taken_by_success(threshold: float) -> int:
    # rounded down: at the threshold itself the score grows
    return _ALL if threshold >= 1 else min(_ALL, math.floor(UNIT * threshold / (1 - threshold) + 0.001))


# --- counting: the same lines as in store/lua/count.lua ---------------------------------------------------

KINDS = "failure", "slow"
PARTS = "score", "tasks", "calls", "bad", "at", "peak"
NO_EVIDENCE: dict[str, int | str] = {
    **{f"{kind}_{part}": 0 for kind in KINDS for part in PARTS},
    **{f"bucket_{number}": "" for number in range(BUCKETS)},
    "row": 0,
    "row_peak": 0,
    "failed_checks": 0,
    "would_open": 0,
}


@dataclass(slots=True)
class Kept:
    """A breaker as a store in memory keeps it; the shared store has a hash, two sets and two sorted sets."""

    fields: dict[str, Any]  # as in the hash; see ``store/lua/lib/breaker.lua``
    # by score, the tasks that have added to it since it was 0
    tasks: dict[str, set[str]] = field(default_factory=lambda: {"failure": set(), "slow": set()})
    trials: dict[str, int] = field(default_factory=dict)  # ``epoch:holder`` of permits -> end of the lease
    slots: dict[str, int] = field(default_factory=dict)  # holder -> end of the lease


class Counter:
    """Counts outcomes of one breaker at one instant."""

    def __init__(self, kept: Kept, rules: Rules, now: int) -> None:
        self._kept, self._fields, self._rules, self._now = kept, kept.fields, rules, now

    def count(self, runs: Iterable[Calls]) -> None:
        """Count runs of equal outcomes, oldest first."""
        for kind in KINDS:
            if _is_over(self._fields[f"{kind}_at"], self._now, self._rules.window):
                self._fields[f"{kind}_peak"] = 0
                self._clear(kind)
        for run in runs:
            if run.outcome is Outcome.OVERDUE:
                if self._rules.slow_counts:
                    self._add("slow", run._replace(each=True))
            elif run.outcome is not Outcome.IGNORED and run.number > 0:
                self._sum_up(run)
                self._weigh(run)

    def _weigh(self, run: Calls) -> None:
        fields, rules = self._fields, self._rules
        if run.outcome is Outcome.FAILURE:
            fields["row"] += self._add("failure", run)
            if fields["failure_tasks"] >= rules.minimum_tasks:
                fields["row_peak"] = max(fields["row_peak"], fields["row"])
        else:
            fields["row"] = 0
            fields["last_success_at"] = self._now
            self._take("failure", run.number, rules.failure_take)
        if run.was_overdue:
            return
        if run.outcome is Outcome.SUCCESS:
            self._take("slow", run.number, rules.slow_take)
        elif run.outcome is Outcome.SLOW or rules.slow_counts:
            self._add("slow", run)

    def _add(self, kind: str, run: Calls) -> int:
        """Add bad calls to a score; return how many. Whole runs of a task add once while it is above 0."""
        fields, tasks, added, new = self._fields, self._kept.tasks[kind], run.number, run.number
        if run.voter:
            new = run.voter not in tasks
            if new and len(tasks) < MOST_TASKS:
                tasks.add(run.voter)
            added = run.number if run.each else int(new)
        fields[f"{kind}_tasks"] += new
        if added:
            fields[f"{kind}_calls"] += added
            fields[f"{kind}_bad"] += added
            fields[f"{kind}_at"] = self._now
            score = fields[f"{kind}_score"] + added * UNIT
            if fields["would_open"]:  # it ends as soon after the outage as an opening would
                score = min(score, max(fields[f"{kind}_score"], self._rules.minimum_calls * UNIT))
            fields[f"{kind}_score"] = score
        if fields[f"{kind}_tasks"] >= self._rules.minimum_tasks:
            fields[f"{kind}_peak"] = max(fields[f"{kind}_peak"], fields[f"{kind}_score"])
        return added

    def _take(self, kind: str, number: int, each: int) -> None:
        fields = self._fields
        if fields[f"{kind}_score"]:
            fields[f"{kind}_calls"] += number
            fields[f"{kind}_score"] = max(0, fields[f"{kind}_score"] - number * each)
            if not fields[f"{kind}_score"]:
                self._clear(kind)

    def _clear(self, kind: str) -> None:
        self._fields.update({f"{kind}_{part}": 0 for part in ("score", "tasks", "calls", "bad")})
        self._kept.tasks[kind].clear()

    def _sum_up(self, run: Calls) -> None:
        """Add to the sums for people."""
        index = self._now // bucket_width(self._rules.window)
        slot = f"bucket_{index % BUCKETS}"
        kept, calls, failures, slow = map(int, (self._fields[slot] or "0 0 0 0").split())
        if kept != index:
            calls = failures = slow = 0
        failed, late = run.outcome is Outcome.FAILURE, run.outcome is Outcome.SLOW
        self._fields[slot] = f"{index} {calls + run.number} {failures + run.number * failed} {slow + run.number * late}"
        if failed:
            self._fields["total_failures"] += run.number


def bucket_width(window: int) -> int:
    """Return the milliseconds of which a bucket holds the sums."""
    return -(-window // (BUCKETS - 1))


def _is_over(at: int, now: int, window: int) -> bool:
    """Whether an instant lies a window or more back; or that far ahead, on a clock that was wrong."""
    return abs(now - at) >= window


def learn(fields: MutableMapping[str, Any], rules: Rules, in_flight: int, outcome: Outcome) -> None:
    """Adapt the limit of calls in flight to one outcome; the same lines as in ``store/lua/settle.lua``.

    A success adds one while at least half of the limit is used, anything else takes a tenth. After the first of these
    a limit's worth of successes adds one, or a small limit would mostly be exceeded.
    """
    limit = _adapted(fields["learned"], rules)
    if outcome is not Outcome.SUCCESS:
        fields.update(learned=max(rules.least_in_flight, limit * 9 // 10), credit=0, backed_off=1)
    elif 2 * in_flight >= limit and limit < rules.most_in_flight:
        fields["credit"] += 1
        if not fields["backed_off"] or fields["credit"] >= limit:
            fields.update(learned=limit + 1, credit=0)


def _adapted(learned: int, rules: Rules) -> int:
    if not rules.least_in_flight:
        return rules.most_in_flight
    return min(max(learned, rules.least_in_flight), rules.most_in_flight)


def concurrency_limit(state: State, learned: int, ramp_since: int | None, rules: Rules, now: int) -> int | None:
    """Return how many calls may be in flight; None: any number. It grows from a tenth during a ramp."""
    if not rules.most_in_flight or state in _UNLIMITED:
        return None
    limit = _adapted(learned, rules)
    elapsed = rules.ramp if ramp_since is None else now - ramp_since
    return limit if not 0 <= elapsed < rules.ramp else max(1, math.floor(limit * ramp_share(elapsed, rules.ramp)))


# --- what a store has answered ---------------------------------------------------------------------------


class Change(NamedTuple):
    """What becomes of a breaker, if it is still as it was seen."""

    fields: dict[str, Any]  # to be written
    forgets: bool = False  # the evidence is emptied
    # to be reported by the one caller that makes the change; None: nothing to report
    transition: Transition | None = None
    opens_child: bool = False  # the rules open it, so that a child needs room among ``max_open_ratio``


class Seen:
    """One breaker as a store has answered, with the rules in force. What is stored may be invalid: ``ValueError``.

    ``fields`` and ``trials`` are those of :class:`Kept`, ``waiting`` the number of live slots and of deferred tasks,
    the earliest instant of a deferral and the earliest deadline.
    """

    def __init__(
        self,
        name: str,
        now: int,
        rules: Rules,
        fields: Mapping[str, Any],
        trials: Mapping[str, int],
        waiting: tuple[int, int, int | None, int | None] = (0, 0, None, None),
    ) -> None:
        self.name, self.now, self.rules = name, now, rules
        self._fields, self._trials, self._waiting = fields, trials, waiting
        self._snapshot: Snapshot | None = None
        number = self._number
        self.state = State(fields.get("state") or State.CLOSED)
        self.epoch, self.version, self.since = number("epoch"), number("version"), number("since") or now
        self.open_until, self.ramp_since = self._instant("open_until"), self._instant("ramp_since")
        self.ok, self.ko, self.checked_at = number("ok"), number("ko"), number("checked_at")
        own = f"{self.epoch}:"
        self.expired = sum(end <= now for member, end in trials.items() if member.startswith(own))
        if self.state is State.OPEN and self.open_until is None:
            raise ValueError("OPEN without an end")

    def _number(self, name: str) -> int:
        return int(self._fields.get(name) or 0)

    def _instant(self, name: str) -> int | None:
        return self._number(name) or None

    @property
    def openings(self) -> int:
        """Openings in a row, less one for each ``max_open_time`` spent CLOSED."""
        spent = max(0, self.now - self.since) // self.rules.max_open_time if self.state is State.CLOSED else 0
        return max(0, self._number("openings") - spent)

    @property
    def sums(self) -> tuple[int, int, int]:
        """Calls, failures and slow calls of about the last window; while nothing is counted those of the trip."""
        if self.state not in COUNTING:
            calls, failures, slow, _, _ = self._frozen()
            return calls, failures, slow
        latest = self.now // bucket_width(self.rules.window)
        texts = [self._fields.get(f"bucket_{number}") or "" for number in range(BUCKETS)]
        buckets = [[int(part) for part in text.split()] for text in texts if text.count(" ") == 3]  # noqa: PLR2004
        live = [sums for index, *sums in buckets if latest - BUCKETS < index <= latest]
        calls, failures, slow = (sum(column) for column in zip(*live, strict=True)) if live else (0, 0, 0)
        return calls, failures, slow

    def _frozen(self) -> list[int]:
        return [int(part) for part in (self._fields.get("frozen") or "0 0 0 0 0").split()]

    def score(self, kind: str) -> int:
        """Return a score, in millionths; 0 when nothing has added to it for a window."""
        return 0 if self._is_forgotten(kind) else self._number(f"{kind}_score")

    def _is_forgotten(self, kind: str) -> bool:
        return _is_over(self._number(f"{kind}_at"), self.now, self.rules.window)

    def evidence(self, kind: str) -> float:
        """Return a score as the share, 0.0 to 1.0, of what opens the breaker."""
        if self.state not in COUNTING:
            return self._frozen()[3 if kind == "failure" else 4] / UNIT
        return min(1.0, self.score(kind) / (UNIT * self.rules.minimum_calls))

    def trips(self, cause: str) -> str:
        """Return why the breaker opens, or "" while the evidence does not suffice."""
        for kind in KINDS:
            if self._suffices(kind):
                return self._in_words(kind, cause)
        row = max(self._number("row_peak"), self._number("row") * self._has_tasks("failure"))
        if 0 < self.rules.consecutive <= row and not self._is_forgotten("failure"):
            return with_cause(f"{row} consecutive failures", cause)
        checks, limit = self._number("failed_checks"), self._number("check_limit")
        if 0 < limit <= checks:
            return with_cause(f"health check failed {checks} times in a row", cause)
        return ""

    def _suffices(self, kind: str) -> bool:
        needed = self.rules.minimum_calls * UNIT
        if self._is_forgotten(kind):
            return False
        peak, score = self._number(f"{kind}_peak"), self._number(f"{kind}_score")
        return peak >= needed or (score >= needed and self._has_tasks(kind))

    def _has_tasks(self, kind: str) -> bool:
        return self._number(f"{kind}_tasks") >= self.rules.minimum_tasks

    def _in_words(self, kind: str, cause: str) -> str:
        peak = max(self._number(f"{kind}_peak"), self._number(f"{kind}_score"))
        reached = f"evidence {min(round(peak / UNIT, 1), self.rules.minimum_calls):g} of {self.rules.minimum_calls}"
        calls, bad = self._number(f"{kind}_calls"), self._number(f"{kind}_bad")
        if kind == "slow":
            return f"slow {reached}: slow, hanging or failed {bad} times, in time {calls - bad} times"
        if not calls:  # successes of the same report came after it
            calls, bad, _ = self.sums
        return with_cause(f"{reached}: of the last {calls} calls {bad} failed", cause)

    @property
    def is_plain(self) -> bool:
        """Whether there is nothing to watch: CLOSED, past its ramp, and no task waits."""
        is_ramping = self.ramp_since is not None and 0 <= self.now - self.ramp_since < self.rules.ramp
        return self.state is State.CLOSED and not is_ramping and not self._waiting[1]

    @property
    def is_opened_in_shadow(self) -> bool:
        """Whether SHADOW has spared an opening that has not healed."""
        return bool(self._number("would_open"))

    @property
    def is_calm(self) -> bool:
        """Whether an opening that SHADOW has spared would be over, and nothing speaks for another one."""
        would_be_over = self.now - self._number("would_open") >= self.rules.open_time
        return would_be_over and not (self.score("failure") or self.score("slow") or self._number("failed_checks"))

    @property
    def concurrency_limit(self) -> int | None:
        """How many calls may be in flight now; None: any number."""
        return concurrency_limit(self.state, self._number("learned"), self.ramp_since, self.rules, self.now)

    def snapshot(self) -> Snapshot:
        """Return the breaker as others see it, in seconds."""
        calls, failures, slow = self.sums
        in_flight, deferred, oldest, deadline = self._waiting
        due = decide(self)
        return Snapshot(
            name=self.name,
            state=self.state,
            epoch=self.epoch,
            version=self.version,
            now=self.now / 1000,
            since=self.since / 1000,
            reason=self._fields.get("reason") or "",
            actor=self._fields.get("actor") or "",
            calls=calls,
            failures=failures,
            slow=slow,
            evidence=self.evidence("failure"),
            slow_evidence=self.evidence("slow"),
            minimum_calls=self.rules.minimum_calls,
            openings=self.openings,
            open_until=to_seconds(self.open_until),
            trials=sum(end > self.now for end in self._trials.values()),
            last_success_at=to_seconds(self._instant("last_success_at")),
            total_failures=self._number("total_failures"),
            ramp_since=to_seconds(self.ramp_since),
            would_open=self.is_opened_in_shadow,
            would_have_opened=self._number("would_have_opened"),
            failed_checks=self._number("failed_checks"),
            checked_at=to_seconds(self.checked_at or None),
            in_flight=in_flight if self.rules.most_in_flight else 0,
            concurrency_limit=self.concurrency_limit,
            active_children=self._number("active_children"),
            # the end of an open time waits for the tick
            is_due=due is not None and (self.state is not State.OPEN or due.transition is None),
            deferred=deferred,
            oldest_deferred_at=to_seconds(oldest),
            next_deadline_at=to_seconds(deadline),
        )

    # --- changes ------------------------------------------------------------------------------------

    def enter(
        self,
        state: State,
        reason: str,
        actor: str = "",
        *,
        retry_after: int | None = None,
        jitter: float = 0.0,
        openings: int | None = None,
    ) -> Change:
        """Return the change to another state: a new epoch, with nothing counted if it counts."""
        counts, sums = state in COUNTING, self.sums
        following = self.openings + (state is State.OPEN) if openings is None else openings
        # Never an epoch that another store has been in: a replica that has missed the last transition, or the
        # breaker of a process that was cut off.
        epoch = max(self.epoch + 1, self.now)
        evidence = [round(self.evidence(kind) * UNIT) for kind in KINDS]
        fields: dict[str, Any] = {
            "state": state.value, "epoch": epoch, "version": self.version + 1, "since": self.now, "reason": reason,
            "actor": actor, "openings": following, "ok": 0, "ko": 0,
            "open_until": self.now + self.rules.open_for(following, retry_after, jitter) if state is State.OPEN else "",
            "ramp_since": self.now if state is State.CLOSED and self.state is State.HALF_OPEN and not actor else "",
            "frozen": "" if counts else " ".join(map(str, (*sums, *evidence))),
            **NO_EVIDENCE,
        }  # fmt: skip
        if self.expired:
            fields["total_failures"] = self._number("total_failures") + self.expired
        if state is State.SHADOW:
            fields["would_have_opened"] = 0
        calls, failures, slow = (0, 0, 0) if counts else sums
        made = Transition(self.name, self.state, state, epoch, self.now / 1000, reason, actor, calls, failures, slow)
        return Change(fields, forgets=True, transition=made)

    def would_open(self, reason: str) -> Change:
        """Return that SHADOW has spared an opening."""
        fields = {"would_open": self.now, "version": self.version + 1}
        made = Transition(
            self.name, self.state, self.state, self.epoch, self.now / 1000, reason, "", *self.sums, would_open=True
        )
        return Change({**fields, "would_have_opened": self._number("would_have_opened") + 1}, transition=made)

    def quietly(self, **fields: Any) -> Change:
        """Return a change within the same state that nothing reports."""
        return Change({**fields, "version": self.version + 1})


def with_cause(reason: str, cause: str) -> str:
    """Return a reason with what the last failure was, if that is known."""
    return f"{reason}, last: {cause}" if cause else reason


# --- decisions ---------------------------------------------------------------------------------------------


def decide(seen: Seen, cause: str = "", retry_after: int | None = None, jitter: float = 0.0) -> Change | None:
    """Return what has to become of a breaker; None: it stays as it is.

    ``cause`` is what the last failure was, ``retry_after`` the milliseconds for which the dependency asked to be left
    alone, ``jitter`` the random share, 0.0 to 1.0, of the policy's jitter that a new open time gets.
    """
    if seen.state is State.OPEN:
        return _after_open_time(seen)
    if seen.state is State.HALF_OPEN:
        return _after_trials(seen, cause, retry_after, jitter)
    reason = seen.trips(cause) if seen.state in COUNTING else ""
    if reason and seen.state is State.CLOSED:
        return seen.enter(State.OPEN, reason, retry_after=retry_after, jitter=jitter)._replace(opens_child=True)
    if reason and not seen.is_opened_in_shadow:
        return seen.would_open(reason)
    if seen.is_opened_in_shadow and seen.is_calm:
        return seen.quietly(**NO_EVIDENCE)._replace(forgets=True)
    return None


def _after_open_time(seen: Seen) -> Change | None:
    until = seen.open_until or seen.now
    longest = math.ceil(seen.rules.max_open_time * (1 + seen.rules.open_jitter))
    if seen.since > seen.now or until > seen.now + longest:  # the store's clock was ahead
        left = min(max(0, until - seen.since), longest)
        return seen.quietly(since=seen.now, open_until=seen.now + left)
    return seen.enter(State.HALF_OPEN, "open time is over") if until <= seen.now else None


def _after_trials(seen: Seen, cause: str, retry_after: int | None, jitter: float) -> Change | None:
    """Leave HALF_OPEN as soon as its trials have decided; a permit whose lease has run out is a failed trial."""
    rules, failed = seen.rules, seen.ko + seen.expired
    if seen.ok >= rules.needed:
        return seen.enter(State.CLOSED, f"{seen.ok} of {rules.trial_calls} trials succeeded")
    if failed <= rules.trial_calls - rules.needed:
        return None
    reason = f"{failed} of {rules.trial_calls} trials failed"
    cause = "permit expired" if seen.expired else cause
    return seen.enter(State.OPEN, with_cause(reason, cause), retry_after=retry_after, jitter=jitter)


def command(seen: Seen, verb: Verb, reason: str, actor: str, jitter: float) -> Change | None:
    """Return what an operator's verb makes of a breaker; None: it is in that state already."""
    target = TARGETS[verb]
    if seen.state is not target:
        openings = 0 if verb is Verb.RESET else None
        change = seen.enter(target, reason, actor, jitter=jitter, openings=openings)
        return change._replace(fields={**change.fields, "ramp_since": ""})
    if verb is not Verb.RESET:
        return None
    return seen.quietly(openings=0, ramp_since="", **NO_EVIDENCE)._replace(forgets=True)
