"""``Outbox``: the outcomes of one breaker that wait to be sent, packed into as few messages as possible."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from itertools import groupby

from resilient_tasks.core.counts import CAUSE
from resilient_tasks.core.model import Calls, Outcome, State
from resilient_tasks.store.base import Evidence
from resilient_tasks.store.standing import Standing

MOST_RUNS = 1_000  # per breaker, waiting for a store that is away
_SUCCESS = Calls(Outcome.SUCCESS)


class Batch:
    """Outcomes of one epoch, run-length encoded, oldest first."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.runs: deque[Calls] = deque()
        self.cause = ""
        self.retry_after: float | None = None
        self.causes: Counter[str] = Counter()

    def add(self, call: Calls, count: int, cause: str, retry_after: float | None) -> None:
        """Append ``count`` calls like this one."""
        if self.runs and self.runs[-1]._replace(number=1) == call:
            count += self.runs.pop().number
        self.runs.append(call._replace(number=count))
        self.cause = cause or self.cause
        if call.outcome is Outcome.FAILURE:
            self.causes[cause] += count
        if retry_after is not None:
            self.retry_after = max(retry_after, self.retry_after or 0.0)

    def drop_oldest(self) -> int:
        """Return the number of outcomes dropped to stay within bounds."""
        return sum(self.runs.popleft().number for _ in range(len(self.runs) - MOST_RUNS))

    def evidence(self) -> Evidence:
        """Return the batch as the store takes it."""
        return Evidence(self.epoch, tuple(self.runs), self.cause, self.retry_after, tuple(self.causes.items()))

    def counts(self) -> Iterable[tuple[str, int]]:
        """Yield what is in the batch by the kinds of :mod:`~resilient_tasks.core.counts`."""
        ended = (calls for calls in self.runs if calls.outcome is not Outcome.OVERDUE)
        yield from ((calls.outcome.value, calls.number) for calls in ended)
        yield from ((CAUSE + cause, count) for cause, count in self.causes.items())


class Outbox:
    """What waits to be sent about one breaker; touched by the sending thread only, but for ``urgent``."""

    __slots__ = ("batches", "due_at", "standing", "urgent")  # a process may have thousands

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.batches: list[Batch] = []
        self.urgent = False
        self.due_at = 0.0

    def collect(self) -> list[Batch]:
        """Move what is pending into batches; return those that came too late for a decision, and count all the same."""
        pending = self.standing.pending
        items = [pending.popleft() for _ in range(len(pending))]
        for item, group in groupby(items):
            epoch, call, cause, retry_after = item if isinstance(item, tuple) else (item, _SUCCESS, "", None)
            self._batch(epoch).add(call, len(list(group)), cause, retry_after)
        batches, epochs = self.batches, (0, self.standing.epoch)
        if self.standing.snapshot.state is State.DISABLED:
            self.batches = []
            return []
        # epoch 0: admitted before the store had ever heard of this breaker; the store decides what it is worth
        self.batches = [batch for batch in batches if batch.epoch in epochs]
        return [batch for batch in batches if batch.epoch not in epochs]

    def _batch(self, epoch: int) -> Batch:
        if not self.batches or self.batches[-1].epoch != epoch:
            self.batches.append(Batch(epoch))
        return self.batches[-1]
