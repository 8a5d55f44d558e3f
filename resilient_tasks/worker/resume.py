"""Resuming: deferred tasks go back to the queues they came from, slowly at first."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from resilient_tasks.core.model import Snapshot
from resilient_tasks.core.outage import LONGEST_WAIT, RESUMED
from resilient_tasks.core.pace import LARGEST_BATCH, Pace, next_pace, refill_count
from resilient_tasks.dependency import Dependency
from resilient_tasks.worker.deferred_tasks import DeferredTasks
from resilient_tasks.worker.queues import Entry, Move

if TYPE_CHECKING:
    from resilient_tasks.worker.context import Runtime

logger = logging.getLogger("resilient_tasks")

#: Seconds after which resumed tasks that no worker takes up no longer count as outstanding.
STUCK = 10.0


def no_limit(_: Dependency) -> int:
    """Return the room that a process has which holds no tasks."""
    return LARGEST_BATCH


class Resumer:
    """Decides for the ticks of one worker how many tasks are resumed, and which."""

    def __init__(self, runtime: Runtime, tasks: DeferredTasks, room: Callable[[Dependency], int] = no_limit) -> None:
        self._runtime, self._tasks, self._room = runtime, tasks, room
        self._origins: dict[str, set[str]] = {}  # breaker -> queues that its tasks were resumed to
        self._untouched: dict[str, tuple[int, float]] = {}  # breaker -> outstanding tasks, and since when

    def resume(self, breaker: Dependency, snapshot: Snapshot) -> None:
        """Resume the next batch of a breaker that admits calls; where its calls are limited, into the free slots."""
        ledger, policy, interval = self._runtime.fleet.ledger, breaker.policy, self._runtime.settings.tick_interval
        pace = ledger.pace(breaker.name)
        outstanding = self._outstanding(breaker, pace)
        is_limited = snapshot.concurrency_limit is not None or policy.max_concurrency_per_worker is not None
        if is_limited:
            limit = snapshot.concurrency_limit
            free = LARGEST_BATCH if limit is None else limit - snapshot.in_flight
            if policy.max_concurrency_per_worker is not None:
                free = min(free, self._room(breaker))
            following, count = refill_count(pace, snapshot, policy, free=max(0, free), interval=interval)
            count -= outstanding
        else:
            following, count = next_pace(pace, snapshot, policy, outstanding=outstanding, interval=interval)
        if following != pace:
            ledger.save_pace(breaker.name, following)
        if count > 0 and (is_limited or self._has_not_moved(breaker, snapshot)):
            self.release(breaker, snapshot, count)

    def release_trials(self, breaker: Dependency, snapshot: Snapshot) -> None:
        """Resume as many tasks as there are permits; those that have never failed first."""
        outstanding = self._outstanding(breaker, self._runtime.fleet.ledger.pace(breaker.name))
        free = breaker.policy.trial_calls - snapshot.trials - outstanding
        if free > 0:
            self.release(breaker, snapshot, free, unfailed_first=True)

    def release(
        self, breaker: Dependency, snapshot: Snapshot, limit: int, *,
        only: Collection[str] | None = None, unfailed_first: bool = False, early: bool = False,
    ) -> list[str]:  # fmt: skip
        """Resume up to ``limit`` tasks of a breaker, those that wait longest first; return their ids.

        ``only`` those with these ids; ``unfailed_first``: those of a page that have never failed come before the
        others; ``early``: also those whose own wait after a failure is not over.
        """
        ledger, left, going = self._runtime.fleet.ledger, limit, 0
        why = f"resumed, breaker {breaker.name!r} is {snapshot.state}"

        def choose(entries: Sequence[Entry]) -> list[Move]:
            nonlocal left, going
            wanted = [entry for entry in entries if only is None or entry.task_id in only]
            due = [entry for entry in wanted if early or _is_due(breaker, entry, snapshot.now)]
            ends, fit = self._tasks.remove_ended(due)
            if unfailed_first:
                fit.sort(key=lambda entry: entry.envelope.attempted_at > 0)
            chosen = fit[:left]
            left -= len(chosen) if only is None else len(wanted)
            going += len(chosen)
            ledger.resumed(breaker.name, len(chosen))  # before they can be taken up
            return [*ends, *self._tasks.resume(chosen, snapshot.epoch, why)]

        resumed: list[str] = []
        for moves in self._tasks.transfer_all(breaker.name, choose, enough=lambda: left <= 0):
            gone = [move for move in moves if move.resumes]
            self._origins.setdefault(breaker.name, set()).update(str(move.queue) for move in gone)
            if gone:
                since = (move.entry.envelope.since for move in gone)
                longest = max((snapshot.now - at for at in since if at), default=0.0)
                self._runtime.fleet.reporter.tally(breaker.name, RESUMED, len(gone), peak=(LONGEST_WAIT, longest))
            resumed += [move.entry.task_id for move in gone]
        if len(resumed) < going:
            ledger.taken_up(breaker.name, going - len(resumed))  # another process has moved them
        if resumed:
            logger.info("breaker %r is %s: %d tasks resumed", breaker.name, snapshot.state, len(resumed))
        return resumed

    def _has_not_moved(self, breaker: Dependency, snapshot: Snapshot) -> bool:
        """Resuming stops in the tick in which the breaker leaves the state that allowed it."""
        return bool(self._runtime.fleet.store.read([breaker.spec])[0].epoch == snapshot.epoch)

    def _outstanding(self, breaker: Dependency, pace: Pace) -> int:
        """Resumed tasks that no worker has taken up: never more than lie in the queues that they went to.

        None once that is so for too long: tasks for a queue without workers must not hold up those of others.
        """
        if not pace.outstanding:
            return 0
        consumed = {queue.name for queue in self._runtime.app.amqp.queues.consume_from.values()}
        outstanding = min(pace.outstanding, self._tasks.queues.size(*self._origins.get(breaker.name, consumed)))
        before, since = self._untouched.get(breaker.name, (0, 0.0))
        now = time.monotonic()
        if outstanding < before or not before:
            since = now
        self._untouched[breaker.name] = outstanding, since
        if outstanding > 0 and now - since > STUCK:
            self._runtime.fleet.ledger.taken_up(breaker.name, pace.outstanding)
            return 0
        return outstanding


def _is_due(breaker: Dependency, entry: Entry, now: float) -> bool:
    """Whether a task has waited long enough; a wait longer than any of ours is of another clock."""
    return not 0 < entry.envelope.not_before - now <= breaker.policy.max_open_duration
