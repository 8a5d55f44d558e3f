"""``Batch``: outcomes that wait to be sent, packed into as few messages as possible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import groupby

from resilient_tasks.core.counts import CAUSE
from resilient_tasks.core.model import Calls, Outcome, State
from resilient_tasks.store.base import Evidence
from resilient_tasks.store.standing import Standing

_SUCCESS = Calls(Outcome.SUCCESS)


class Batch:
    """Outcomes of one epoch, run-length encoded, oldest first."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.runs: list[Calls] = []
        self.cause = ""
        self.retry_after: float | None = None
        self.causes: Counter[str] = Counter()

    def add(self, call: Calls, count: int, cause: str, retry_after: float | None) -> None:
        """Append ``count`` calls like this one."""
        if call.outcome is Outcome.FAILURE:
            self.causes[cause] += count
        if self.runs and self.runs[-1]._replace(number=1) == call:
            count += self.runs.pop().number
        self.runs.append(call._replace(number=count))
        self.cause = cause or self.cause
        if retry_after is not None:
            self.retry_after = max(retry_after, self.retry_after or 0.0)

    def evidence(self) -> Evidence:
        """Return the batch as the store takes it."""
        return Evidence(self.epoch, tuple(self.runs), self.cause, self.retry_after, tuple(self.causes.items()))

    @property
    def may_open(self) -> bool:
        """Whether there is anything but successes in it."""
        return any(calls.outcome is not Outcome.SUCCESS for calls in self.runs)

    def counts(self) -> Iterable[tuple[str, int]]:
        """Yield what is in the batch by the kinds of :mod:`~resilient_tasks.core.counts`."""
        ended = (calls for calls in self.runs if calls.outcome is not Outcome.OVERDUE)
        yield from ((calls.outcome.value, calls.number) for calls in ended)
        yield from ((CAUSE + cause, count) for cause, count in self.causes.items())


def collect(standing: Standing) -> tuple[list[Batch], list[Batch]]:
    """Take what is pending about a breaker; return what to send, and what is too late for a decision but counts."""
    batches: list[Batch] = []
    items = [standing.pending.popleft() for _ in range(len(standing.pending))]
    for item, group in groupby(items):
        epoch, call, cause, retry_after = item if isinstance(item, tuple) else (item, _SUCCESS, "", None)
        if not batches or batches[-1].epoch != epoch:
            batches.append(Batch(epoch))
        batches[-1].add(call, len(list(group)), cause, retry_after)
    if standing.snapshot.state is State.DISABLED:
        return [], []
    # epoch 0: admitted before the store had ever heard of this breaker; the store decides what it is worth
    epochs = 0, standing.epoch
    return [each for each in batches if each.epoch in epochs], [each for each in batches if each.epoch not in epochs]
