"""``Outbox``: the outcomes of one breaker that wait to be sent, packed into as few messages as possible."""

from __future__ import annotations

from collections import deque
from itertools import groupby

from resilient_tasks.core.model import Outcome, State
from resilient_tasks.store.base import Evidence
from resilient_tasks.store.standing import Standing

MOST_RUNS = 1_000  # per breaker, waiting for a store that is away


class Batch:
    """Outcomes of one epoch, run-length encoded, oldest first."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.runs: deque[tuple[Outcome, int]] = deque()
        self.cause = ""
        self.retry_after: float | None = None

    def add(self, outcome: Outcome, count: int, cause: str, retry_after: float | None) -> None:
        """Append ``count`` equal outcomes."""
        if self.runs and self.runs[-1][0] is outcome:
            count += self.runs.pop()[1]
        self.runs.append((outcome, count))
        self.cause = cause or self.cause
        if retry_after is not None:
            self.retry_after = max(retry_after, self.retry_after or 0.0)

    def drop_oldest(self) -> int:
        """Return the number of outcomes dropped to stay within bounds."""
        return sum(self.runs.popleft()[1] for _ in range(len(self.runs) - MOST_RUNS))

    def evidence(self) -> Evidence:
        """Return the batch as the store takes it."""
        return Evidence(self.epoch, tuple(self.runs), self.cause, self.retry_after)


class Outbox:
    """What waits to be sent about one breaker; touched by the sending thread only, but for ``urgent``."""

    def __init__(self, standing: Standing) -> None:
        self.standing = standing
        self.batches: list[Batch] = []
        self.urgent = False
        self.due_at = 0.0

    def collect(self) -> None:
        """Move what is pending into batches; outcomes of an epoch that is over are worth nothing."""
        pending = self.standing.pending
        items = [pending.popleft() for _ in range(len(pending))]
        for item, group in groupby(items):
            epoch, outcome, cause, retry_after = item if isinstance(item, tuple) else (item, Outcome.SUCCESS, "", None)
            self._batch(epoch).add(outcome, len(list(group)), cause, retry_after)
        self.batches = [batch for batch in self.batches if self._is_current(batch)]

    def _batch(self, epoch: int) -> Batch:
        if not self.batches or self.batches[-1].epoch != epoch:
            self.batches.append(Batch(epoch))
        return self.batches[-1]

    def _is_current(self, batch: Batch) -> bool:
        # epoch 0: admitted before the store had ever heard of this breaker; the store decides what it is worth
        standing = self.standing
        return standing.snapshot.state is not State.DISABLED and batch.epoch in (0, standing.epoch)
