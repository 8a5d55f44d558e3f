"""``Overruns``: runs of tasks that pass ``slow_call_duration``, counted in the main process while they still run."""

from __future__ import annotations

from collections.abc import Callable

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome
from resilient_tasks.store.overdue import Overdue, Watch

OVERDUE = Verdict(Outcome.OVERDUE)
_SLOW = Verdict(Outcome.SLOW)

_Run = tuple[str, str]  # who holds it, and the breaker that has admitted it


class Overruns:
    """The runs of one worker that are watched.

    Not those of tasks whose own guards have turned out to report on the breaker: how long they take says nothing.
    """

    def __init__(self) -> None:
        self._overdue = Overdue()
        self._watches: dict[_Run, Watch] = {}
        self._guarded_inside: set[tuple[str, str]] = set()  # task and breaker

    def begin(self, run: _Run, task: str, seconds: float, tell: Callable[[], object]) -> None:
        """Watch a run that begins now; ``tell`` is called when it has taken so many seconds."""
        if (task, run[1]) not in self._guarded_inside:
            self._watches[run] = self._overdue.begin(seconds, tell)

    def end(self, run: _Run, task: str, verdict: Verdict | None) -> Verdict | None:
        """Return the verdict on a run that has ended: one that was overdue has been slow at best."""
        watch = self._watches.pop(run, None)
        if watch is None:
            return verdict
        if verdict is None:
            self._guarded_inside.add((task, run[1]))
        was_overdue = self._overdue.end(watch)
        return _SLOW if was_overdue and verdict is not None and verdict.outcome is Outcome.SUCCESS else verdict
