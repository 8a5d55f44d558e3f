"""``Overruns``: runs of tasks that pass ``slow_call_duration``, counted in the main process while they still run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Outcome, parent_of
from resilient_tasks.store.background import Watch, overdue

if TYPE_CHECKING:
    from resilient_tasks.worker.request import GatedRequest

OVERDUE = Verdict(Outcome.OVERDUE)


class Overruns:
    """The runs of one worker that are watched, each for one of the breakers that have admitted it.

    Not those of tasks whose own guards have turned out to report on the breaker: how long they take says nothing.
    """

    def __init__(self) -> None:
        self._watches: dict[tuple[GatedRequest, str], Watch] = {}
        self._guarded_inside: set[tuple[str, str]] = set()  # task, and breaker without its key: as many as the code has

    def watches(self, request: GatedRequest, breaker: str) -> bool:
        """Whether a run would be watched, as far as is known of its task."""
        return _guard_inside(request, breaker) not in self._guarded_inside

    def begin(
        self, request: GatedRequest, breaker: str, seconds: float, report: Callable[[], object], *, once: bool
    ) -> None:
        """Watch a run that begins now; ``report`` is called each time that it has taken so many seconds more."""
        self._watches[request, breaker] = overdue.begin(seconds, report, once=once)

    def end(self, request: GatedRequest, breaker: str, verdict: Verdict | None) -> bool:
        """Watch a run no longer; return whether it has been overdue. Without a verdict guards inside have reported."""
        watch = self._watches.pop((request, breaker), None)
        if watch is None:
            return False
        if verdict is None:
            self._guarded_inside.add(_guard_inside(request, breaker))
        return overdue.end(watch)


def _guard_inside(request: GatedRequest, breaker: str) -> tuple[str, str]:
    return request.task.name, parent_of(breaker) or breaker
