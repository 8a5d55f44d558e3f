"""Every task accounted for, after the model of Jepsen's total-queue checker."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.ledger import Entry, Event

#: Seconds after a fault in which workers may still be without the connection that they had before it.
AFTERMATH = 5.0
#: Seconds from the end of a run, or from a move, to its acknowledgement, at most.
ACKNOWLEDGING = 1.0
UNEXPLAINED = "unexplained"


@dataclass(frozen=True)
class Redelivery:
    """A time in which the broker may have delivered what was under way once more."""

    fault: str
    began: float
    ended: float


@dataclass
class History:
    """What happened to one task. Times as in the ledger."""

    sent: float | None = None
    acknowledged: float | None = None
    begun: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    failed: bool = False

    def note(self, entry: Entry) -> None:
        """Add one entry of the ledger."""
        if entry.event is Event.SENT:
            self.sent = entry.at
        elif entry.event is Event.ACKNOWLEDGED:
            self.acknowledged = entry.at
        elif entry.event is Event.FAILED:
            self.failed = True
        else:
            getattr(self, entry.event.value).append(entry.at)

    def explain(self, redeliveries: Iterable[Redelivery]) -> str:
        """Return the fault that led to the second run, as far as is known."""
        first = self.done[0]
        start = max([at for at in self.begun if at <= first], default=first)
        under_way = [(start, first + ACKNOWLEDGING), *((at, at + ACKNOWLEDGING) for at in self.moved if at <= first)]
        if self.sent is not None:
            under_way.append((self.sent, self.acknowledged or self.sent + AFTERMATH))
        for redelivery in sorted(redeliveries, key=lambda redelivery: redelivery.began, reverse=True):
            if any(redelivery.began <= end and begin <= redelivery.ended + AFTERMATH for begin, end in under_way):
                return redelivery.fault
        return UNEXPLAINED


@dataclass
class Account:
    """The ids of the tasks of one run, by what became of them.

    Attributes:
        acknowledged: how many publishes the broker has acknowledged.
        ok: acknowledged and run.
        lost: acknowledged and never run to the end.
        failed: acknowledged, and Celery has given it up.
        recovered: not acknowledged, but run.
        unexpected: run, and never published.
        duplicated: run to the end more than once, with the reason.
    """

    acknowledged: int = 0
    ok: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    recovered: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    duplicated: dict[str, str] = field(default_factory=dict)

    @property
    def gone(self) -> list[str]:
        """Those that were acknowledged and never run to the end, whether it was noticed or not."""
        return self.lost + self.failed

    @property
    def unexplained(self) -> list[str]:
        """Those that ran more than once without a fault that would explain it."""
        return [task_id for task_id, reason in self.duplicated.items() if reason == UNEXPLAINED]

    @property
    def clean(self) -> bool:
        """Whether nothing is missing and nothing too much."""
        return not (self.gone or self.unexpected or self.unexplained)

    def reasons(self) -> Counter[str]:
        """Count the reasons of second runs."""
        return Counter(self.duplicated.values())


def histories(entries: Iterable[Entry]) -> dict[str, History]:
    """Sort the ledger by task."""
    found: dict[str, History] = defaultdict(History)
    for entry in entries:
        found[entry.task_id].note(entry)
    return dict(found)


def balance(tasks: dict[str, History], redeliveries: Sequence[Redelivery] = ()) -> Account:
    """Account for every task."""
    account = Account()
    for task_id, history in tasks.items():
        acknowledged = history.acknowledged is not None
        account.acknowledged += acknowledged
        column = _column(history)
        if column is not None:
            getattr(account, column).append(task_id)
        if len(history.done) > 1:
            account.duplicated[task_id] = history.explain(redeliveries)
    return account


def _column(history: History) -> str | None:
    """Return the one column that a task belongs to; None if it came to nothing before it was acknowledged."""
    if history.sent is None:
        return "unexpected"
    if history.done:
        return "ok" if history.acknowledged is not None else "recovered"
    if history.failed:
        return "failed"
    return "lost" if history.acknowledged is not None else None
