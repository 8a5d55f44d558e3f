"""The rules of a breaker: what a report, a request, a trial, a verb or the passing of time does to it.

Everything here is plain data and pure arithmetic: no clock, no lock, no I/O. ``now`` is handed in as
integer milliseconds, and all sums are integers, so that ``store/lua/lib``, which holds the same rules for
the shared store in ``rules.lua``, ``trials.lua`` and ``transitions.lua``, comes to the same answers to the
last bit. The two have the same functions: change them together; a property test compares them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilient_tasks.core.model import ADMITTING, Calls, Outcome, State, Transition, Verb
from resilient_tasks.core.record import COUNTING, Record
from resilient_tasks.core.shadow import Opening, with_calls, with_opening
from resilient_tasks.core.tripping import rate_trips, row_trips, trip_point, why, with_cause
from resilient_tasks.core.window import Totals, Vote

_TARGETS = {
    Verb.TRIP: State.OPEN,
    Verb.ISOLATE: State.FORCED_OPEN,
    Verb.DISABLE: State.DISABLED,
    Verb.SHADOW: State.SHADOW,
    Verb.RESET: State.CLOSED,
}


@dataclass(slots=True)
class Decision:
    """One decision about one breaker at one instant. It changes the record and remembers the transition.

    Args:
        record: the breaker; changed in place.
        now: the instant, milliseconds on the store's clock.
        jitter: random share, 0.0 to 1.0, of the policy's jitter that a new open time gets.
        has_room_to_open: False: it is a child, and as many others are held open as may be.
    """

    record: Record
    now: int
    jitter: float = 0.0
    has_room_to_open: bool = True
    transition: Transition | None = None
    changed: bool = False  # others should hear of it: the version has grown

    # --- what callers ask for -------------------------------------------------------------------

    def advance(self) -> None:
        """Do what time has made due: OPEN becomes HALF_OPEN, expired permits become failures."""
        record = self.record
        if record.state is State.OPEN and record.open_until is not None and self.now >= record.open_until:
            self._enter(State.HALF_OPEN, "open time is over")
        elif record.state is State.HALF_OPEN:
            self._expire()

    def acquire(self, holder: str, lease: int) -> tuple[bool, bool]:
        """Return whether ``holder`` is admitted, and whether with a permit; see :meth:`Store.acquire`."""
        self.advance()
        record, state = self.record, self.record.state
        offered = record.offers_slot(holder, self.now)
        granted = state is State.HALF_OPEN and offered and self._grant(holder, lease)
        admitted = granted or (state in ADMITTING and offered)
        if admitted and record.concurrency_limit(self.now) is not None:
            record.slots.take(holder, lease, now=self.now)
        return admitted, granted

    def report(self, epoch: int, runs: Sequence[Calls], cause: str = "", retry_after: int | None = None) -> None:
        """Count runs of equal outcomes; open the breaker at the first that trips it and drop the rest."""
        self._end_shadow_opening()
        for calls in runs:
            if self.record.state not in COUNTING or not self._is_current(epoch):
                return
            if calls.outcome is Outcome.IGNORED or calls.number < 1:
                continue
            if calls.voter and calls.outcome is not Outcome.SUCCESS:
                self._vote(calls, cause, retry_after)
            else:
                self._report_run(calls._replace(voter=""), cause, retry_after)

    def settle(
        self,
        holder: str,
        epoch: int,
        outcome: Outcome,
        cause: str = "",
        retry_after: int | None = None,
        runs: Sequence[Calls] = (),
    ) -> None:
        """Count the outcome of a call and free its permit and slot; a straggler's comes too late to count.

        ``runs`` may hold the call itself, with its voter, for one that has a slot and no permit.
        """
        record = self.record
        if record.state is State.HALF_OPEN:
            self._expire()
        if record.slots.holds(holder, self.now):
            self.report(epoch, runs or (Calls(outcome),), cause, retry_after)
        if epoch != record.epoch or holder not in record.trials:
            self._free_straggler(holder, outcome)
        elif outcome is not Outcome.OVERDUE or record.rules.slow_trial_fails:
            self._settle_trial(holder, outcome, cause, retry_after)
        if outcome is not Outcome.OVERDUE:
            record.slots.give_up(holder)

    def begin_health_check(self, since: int) -> bool:
        """Return whether it is the caller who makes a health check: nobody has begun one since ``since``."""
        last = self.record.checked_at
        if last is not None and last >= since:
            return False
        self.record.checked_at = self.now
        return True

    def report_health_check(
        self, epoch: int, outcome: Outcome, limit: int, cause: str = "", retry_after: int | None = None
    ) -> None:
        """Count a health check made while tasks are admitted; ``limit`` failures in a row open the breaker."""
        record = self.record
        if record.state not in COUNTING or not self._is_current(epoch):
            return
        self._end_shadow_opening()
        record.failed_checks = record.failed_checks + 1 if outcome is Outcome.FAILURE else 0
        if record.failed_checks >= limit and not record.would_open:
            failed = f"health check failed {record.failed_checks} times in a row"
            self._trip(with_cause(failed, cause), retry_after)

    def command(self, verb: Verb, reason: str = "", actor: str = "") -> None:
        """Carry out an operator's verb."""
        target = _TARGETS[verb]
        if self.record.state is target:
            if verb is Verb.RESET:
                self._start_afresh()
        elif verb is Verb.TRIP:
            self._open(reason, actor)
        else:
            self._enter(target, reason, actor)
            if verb is Verb.RESET:
                self.record.openings = 0

    # --- counting -------------------------------------------------------------------------------

    def _is_current(self, epoch: int) -> bool:
        # 0: admitted before the store knew this breaker; true for as long as it has not changed since.
        record = self.record
        return epoch == record.epoch or (epoch == 0 and record.epoch == record.first_epoch)

    def _vote(self, calls: Calls, cause: str, retry_after: int | None) -> None:
        """Count a task's calls: all of them, or if they are whole runs only its first vote in the window."""
        record, length, rest = self.record, self.record.rules.window, calls.number
        vote = record.window.vote(calls.voter, now=self.now, length=length)
        if vote is None:
            record.window.remember(calls, now=self.now, length=length)
            self._report_run(calls._replace(number=1, voter=""), cause, retry_after)
            rest -= 1
        elif vote.outcome is Outcome.OVERDUE or not calls.each:
            self._change(vote, calls, cause, retry_after)
            rest -= 1
        if calls.each and rest > 0 and record.state in COUNTING:
            record.window.remember(calls, now=self.now, length=length)
            self._report_run(calls._replace(number=rest), cause, retry_after)

    def _change(self, vote: Vote, calls: Calls, cause: str, retry_after: int | None) -> None:
        """Make of a vote what has become of its call, or what another run of its task has found."""
        if calls.outcome is Outcome.FAILURE and vote.outcome is not Outcome.FAILURE:
            vote.becomes_failure()
            self._note(calls._replace(number=1))
            rules, totals = self.record.rules, self.record.figures(self.now)
            if not self.record.would_open and (row_trips(rules, self.record.row, totals) or rate_trips(rules, totals)):
                self._trip(self._why(cause), retry_after)
        elif calls.outcome is Outcome.SLOW:
            if vote.outcome is Outcome.OVERDUE:
                vote.becomes(Outcome.SLOW)
            self._note(calls)

    def _report_run(self, calls: Calls, cause: str, retry_after: int | None) -> None:
        record, tripped_at = self.record, None
        if not record.would_open:
            tripped_at = trip_point(record.rules, record.figures(self.now), record.row, calls)
        self._count(calls._replace(number=tripped_at or calls.number))
        if tripped_at is None:
            return
        self._trip(self._why(cause), retry_after)
        if self.record.state in COUNTING:
            self._count(calls._replace(number=calls.number - tripped_at))

    def _why(self, cause: str) -> str:
        return why(self.record.rules, self.record.figures(self.now), self.record.row, cause)

    def _count(self, calls: Calls) -> None:
        record = self.record
        if calls.number > 0:
            record.window.add(calls, now=self.now, length=record.rules.window)
            if record.would_open:
                record.shadow = with_calls(record.shadow, calls.number)
            self._note(calls)
            self._learn(calls.outcome, calls.number)

    def _note(self, calls: Calls) -> None:
        """Note what outcomes mean beside the window; one that is OVERDUE may still turn out either way."""
        record = self.record
        if calls.outcome is Outcome.FAILURE:
            record.row += calls.number
            record.total_failures += calls.number
        elif calls.outcome is not Outcome.OVERDUE:
            record.row = 0
            record.last_success_at = self.now

    def _trip(self, reason: str, retry_after: int | None) -> None:
        if self.record.state is State.CLOSED and self.has_room_to_open:
            self._open(reason, retry_after=retry_after)
        elif self.record.state is State.SHADOW:
            self._open_in_shadow(retry_after)
            self._announce()
            self.transition = self._told(State.SHADOW, reason)

    def _open_in_shadow(self, retry_after: int | None) -> None:
        record, rules = self.record, self.record.rules
        row = record.shadow[-1].next_in_a_row(self.now, rules.max_open_time) if record.shadow else 1
        until = self.now + rules.open_for(row, retry_after, self.jitter)
        record.shadow = with_opening(record.shadow, Opening(self.now, until, in_a_row=row))
        record.would_open = True

    def _end_shadow_opening(self) -> None:
        """Take an opening in SHADOW whose time is over to have healed."""
        record = self.record
        if record.would_open and record.shadow[-1].until <= self.now:
            record.would_open = False
            record.window.clear()
            record.row = record.failed_checks = 0

    # --- trials ---------------------------------------------------------------------------------

    def _expire(self) -> None:
        """Count permits whose lease has run out: their holders died or hang."""
        expired = [holder for holder, end in self.record.trials.items() if end <= self.now]
        for holder in expired:
            del self.record.trials[holder]
            self._count_trial(Outcome.FAILURE)
        self._judge("permit expired")

    def _grant(self, holder: str, lease: int) -> bool:
        """Hand out a permit if one more trial can still matter, and is not one too many at once."""
        record = self.record
        used = len(record.trials) + record.trial_successes + record.trial_failures
        if holder not in record.trials and max(used, record.live_trials(self.now)) >= record.rules.trial_calls:
            return False
        record.trials[holder] = max(record.trials.get(holder, 0), self.now + lease)
        return True

    def _count_trial(self, outcome: Outcome) -> None:
        record = self.record
        self._learn(outcome, 1)
        if outcome in (Outcome.SUCCESS, Outcome.SLOW):
            record.last_success_at = self.now
        # A dependency that answers too late is not back: the same calls would open the breaker again.
        if outcome is Outcome.FAILURE or (outcome is not Outcome.SUCCESS and record.rules.slow_trial_fails):
            record.trial_failures += 1
            record.total_failures += 1
        else:
            record.trial_successes += 1

    def _judge(self, cause: str, retry_after: int | None = None) -> None:
        """Leave HALF_OPEN as soon as its trials have decided."""
        record, rules = self.record, self.record.rules
        if record.trial_successes >= rules.needed:
            self._enter(State.CLOSED, f"{record.trial_successes} of {rules.trial_calls} trials succeeded")
            record.ramp_since = self.now
        elif record.trial_failures > rules.trial_calls - rules.needed:
            failed = f"{record.trial_failures} of {rules.trial_calls} trials failed"
            self._open(with_cause(failed, cause), retry_after=retry_after)

    def _free_straggler(self, holder: str, outcome: Outcome) -> None:
        if outcome is not Outcome.OVERDUE and self.record.stragglers.pop(holder, None) is not None:
            self._announce()

    def _settle_trial(self, holder: str, outcome: Outcome, cause: str, retry_after: int | None) -> None:
        lease_end = self.record.trials.pop(holder)
        if outcome is Outcome.OVERDUE:  # it is counted and still in flight
            self.record.stragglers[holder] = lease_end
        if outcome is Outcome.IGNORED:
            self._announce()
        else:
            self._count_trial(outcome)
            self._judge(cause, retry_after)

    # --- slots ----------------------------------------------------------------------------------

    def _learn(self, outcome: Outcome, count: int) -> None:
        least, most = self.record.rules.least_in_flight, self.record.rules.most_in_flight
        if least:
            self.record.slots.learn(outcome, count, now=self.now, least=least, most=most)

    # --- transitions ----------------------------------------------------------------------------

    def _open(self, reason: str, actor: str = "", *, retry_after: int | None = None) -> None:
        self._enter(State.OPEN, reason, actor)
        record = self.record
        record.openings += 1
        record.open_until = self.now + record.rules.open_for(record.openings, retry_after, self.jitter)

    def _enter(self, state: State, reason: str, actor: str = "") -> None:
        """Make a transition: a new epoch with nothing counted and no permits but those of stragglers."""
        record, previous = self.record, self.record.state
        record.frozen = Totals() if state in COUNTING else record.figures(self.now)
        record.openings = record.openings_left(self.now)
        record.window.clear()
        running = {**record.stragglers, **record.trials}
        record.stragglers = {holder: end for holder, end in running.items() if end > self.now}
        record.trials = {}
        record.row = record.trial_successes = record.trial_failures = record.failed_checks = 0
        record.open_until = record.ramp_since = None
        record.would_open = False
        record.shadow = () if state is State.SHADOW else record.shadow
        record.state, record.since, record.reason, record.actor = state, self.now, reason, actor
        # Never an epoch that another store has been in: a replica that has missed the last transition, or the
        # breaker of a process that was cut off.
        record.epoch = max(record.epoch + 1, self.now)
        self._announce()
        self.transition = self._told(previous, reason, actor)

    def _start_afresh(self) -> None:
        """Reset a breaker that is CLOSED already: nobody needs to be told of a transition."""
        record = self.record
        record.window.clear()
        record.row = record.openings = record.failed_checks = 0
        record.ramp_since = None
        self._announce()

    def _announce(self) -> None:
        self.record.version += 1
        self.changed = True

    def _told(self, previous: State, reason: str, actor: str = "") -> Transition:
        """Return what the one caller that made the transition is told."""
        record = self.record
        figures = record.figures(self.now)
        return Transition(
            name=record.name,
            previous=previous,
            state=record.state,
            epoch=record.epoch,
            at=self.now / 1000,
            reason=reason,
            actor=actor,
            calls=figures.calls,
            failures=figures.failures,
            slow=figures.slow,
            would_open=record.would_open,
        )
