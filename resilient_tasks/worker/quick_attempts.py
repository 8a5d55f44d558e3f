"""Quick attempts inside one run of a task (``retrying=``), bounded by its breakers and by its time limits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import tenacity
from celery.exceptions import Ignore, Reject, Retry

from resilient_tasks.core.classification import refusal_in
from resilient_tasks.errors import ResilienceError
from resilient_tasks.worker.run import limits_of

if TYPE_CHECKING:
    from resilient_tasks.dependency import Dependency

_CONTROL_FLOW = (Ignore, Reject, Retry, ResilienceError)
_GLANCE = 0.1  # seconds between two looks at the breakers during a wait


def bounded(retrying: tenacity.Retrying, breakers: Sequence[Dependency], limit: float | None) -> tenacity.Retrying:
    """Return a task's ``retrying`` within bounds: no attempt after a breaker opened, no wait past the time limit.

    Args:
        retrying: as the user wrote it; a ``sleep`` of the user's own is kept.
        breakers: all must admit before each attempt, and during each wait.
        limit: seconds that the run may take; ``None``: no limit.
    """
    stop = _StopWhenOpen(breakers, retrying.stop)
    return retrying.copy(
        stop=stop if limit is None else tenacity.stop_any(stop, tenacity.stop_before_delay(limit)),
        retry=_RetryErrors(retrying.retry),
        sleep=partial(_sleep, breakers) if retrying.sleep is tenacity.nap.sleep else retrying.sleep,
        reraise=True,
    )


def time_limit(task: Any) -> float | None:
    """Return the shortest time limit of a task's run, in seconds; None if it has none."""
    return min((float(limit) for limit in limits_of(task, task.request.timelimit) if limit), default=None)


def _all_admit(breakers: Sequence[Dependency]) -> bool:
    return all(guard.standing.admits for breaker in breakers for guard in breaker.guards)


def _sleep(breakers: Sequence[Dependency], seconds: float) -> None:
    """Wait for the next attempt; no longer than the breakers admit it, which will then refuse it."""
    end = time.monotonic() + seconds
    while _all_admit(breakers) and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _GLANCE))


class _StopWhenOpen(tenacity.stop.stop_base):
    """Ends quick attempts when the user's own condition does, or as soon as a breaker no longer admits."""

    def __init__(self, breakers: Sequence[Dependency], otherwise: Any) -> None:
        self._breakers = breakers
        self._otherwise = otherwise

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        return not _all_admit(self._breakers) or bool(self._otherwise(retry_state))


class _RetryErrors(tenacity.retry_base):
    """Repeats what the user's own condition does, but no control flow: ``self.retry()`` has sent a message already."""

    def __init__(self, otherwise: Any) -> None:
        self._otherwise = otherwise

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        outcome = retry_state.outcome
        error = outcome.exception() if outcome is not None else None
        is_over = isinstance(error, _CONTROL_FLOW) or (error is not None and refusal_in(error) is not None)
        return not is_over and bool(self._otherwise(retry_state))
