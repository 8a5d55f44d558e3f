"""``Overruns``: runs of tasks that pass ``slow_call_duration``, counted in the main process while they still run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome
from resilient_tasks.core.names import parent_of
from resilient_tasks.store.overdue import Overdue, Watch

if TYPE_CHECKING:
    from resilient_tasks.worker.request import GatedRequest

OVERDUE = Verdict(Outcome.OVERDUE)
_SLOW = Verdict(Outcome.SLOW)


class Overruns:
    """The runs of one worker that are watched, each for one of the breakers that have admitted it.

    Not those of tasks whose own guards have turned out to report on the breaker: how long they take says nothing.
    """

    def __init__(self) -> None:
        self._overdue = Overdue()
        self._watches: dict[tuple[GatedRequest, str], Watch] = {}
        self._guarded_inside: set[tuple[str, str]] = set()  # task, and breaker without its key: as many as the code has

    def begin(self, request: GatedRequest, breaker: str, seconds: float, tell: Callable[[], object]) -> None:
        """Watch a run that begins now; ``tell`` is called when it has taken so many seconds."""
        if _guard_inside(request, breaker) not in self._guarded_inside:
            self._watches[request, breaker] = self._overdue.begin(seconds, tell)

    def end(self, request: GatedRequest, breaker: str, verdict: Verdict | None) -> Verdict | None:
        """Return the verdict on a run that has ended: one that was overdue has been slow at best."""
        watch = self._watches.pop((request, breaker), None)
        if watch is None:
            return verdict
        if verdict is None:
            self._guarded_inside.add(_guard_inside(request, breaker))
        was_overdue = self._overdue.end(watch)
        return _SLOW if was_overdue and verdict is not None and verdict.outcome is Outcome.SUCCESS else verdict


def _guard_inside(request: GatedRequest, breaker: str) -> tuple[str, str]:
    return request.task.name, parent_of(breaker) or breaker
