"""What a finished call says about the dependency that was called.

``dependency_errors`` is the default of ``BreakerPolicy.classify``: the dependency is to blame when it
cannot be reached, does not answer in time, breaks the connection, or answers 5xx or 429. Everything
else (other 4xx, programming errors, file errors, a task that retries or rejects itself) says nothing.

``judge`` puts a policy's ``classify``, ``failures`` and ``ignore`` together into one ``Verdict``;
``judge_result`` asks a user's ``classify`` about a value that was returned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Union

from resilient_tasks.core.answer import retry_after_of, status_of
from resilient_tasks.core.blame import carried_by, is_control_flow, witness
from resilient_tasks.core.model import Outcome

logger = logging.getLogger(__name__)

# An exception that ended a call, or the value that it returned.
Classify = Callable[[Any], Outcome]
# Union, not "|": Callable[...] aliases do not support the operator on Python 3.10.
Matcher = Union[type[BaseException], Callable[[BaseException], bool]]  # noqa: UP007


class Verdict(NamedTuple):
    """What one finished call says about its dependency.

    Args:
        outcome: what is counted.
        cause: the exception's type or its HTTP status, never its text, which may hold secrets.
        retry_after: seconds the dependency asked to be left alone.
    """

    outcome: Outcome
    cause: str = ""
    retry_after: float | None = None


def dependency_errors(exc: BaseException) -> Outcome:
    """Return FAILURE if ``exc`` is the dependency's fault, else IGNORED."""
    carried = carried_by(exc)
    if carried is None or is_control_flow(carried):
        return Outcome.IGNORED
    return witness(carried)[0]


def judge(
    policy_classify: Classify,
    failures: Iterable[Matcher],
    ignore: Iterable[Matcher],
    exc: BaseException,
    *,
    clock: Callable[[], float] = time.time,
) -> Verdict:
    """Judge the exception that ended a guarded call, by a policy's three settings.

    ``ignore`` wins over ``failures``, which win over ``policy_classify``. A user's function that raises
    is logged once and the call says nothing; nothing is raised from here.

    Args:
        policy_classify: ``BreakerPolicy.classify``.
        failures: ``BreakerPolicy.failures``.
        ignore: ``BreakerPolicy.ignore``.
        exc: what the call raised; a Celery ``Retry`` is judged by the exception that it carries.
        clock: wall clock in seconds, for a ``Retry-After`` that is a date.
    """
    carried = carried_by(exc)
    if carried is None or is_control_flow(carried):
        return Verdict(Outcome.IGNORED, type(exc).__name__)
    outcome = _outcome(policy_classify, failures, ignore, carried)
    speaker = witness(carried)[1]
    if outcome is not Outcome.FAILURE:
        return Verdict(outcome, _label(speaker))
    return Verdict(outcome, _label(speaker), retry_after_of(speaker, clock))


def _outcome(
    policy_classify: Classify, failures: Iterable[Matcher], ignore: Iterable[Matcher], exc: BaseException
) -> Outcome:
    asked: object = None
    try:
        for asked in ignore:
            if _matches(asked, exc):
                return Outcome.IGNORED
        for asked in failures:
            if _matches(asked, exc):
                return Outcome.FAILURE
        asked = policy_classify
        return Outcome(policy_classify(exc))
    except Exception as error:  # noqa: BLE001  a user's function may raise anything; it must not mask the task's own
        _log_once(asked, error)
        return Outcome.IGNORED


def _matches(matcher: Any, exc: BaseException) -> bool:
    return isinstance(exc, matcher) if isinstance(matcher, type) else bool(matcher(exc))


_logged: dict[int, object] = {}  # holds on to the functions, so that no other gets the same id


def _log_once(function: object, error: Exception) -> None:
    if id(function) not in _logged:
        _logged[id(function)] = function
        logger.error("%r failed; calls that it cannot classify say nothing", function, exc_info=error)


def judge_result(classify: Classify, value: object) -> Verdict:
    """Ask a policy's own ``classify`` about the value that a call returned; by default every value is a SUCCESS.

    A ``classify`` that raises, or has nothing to say about values, leaves it at that.
    """
    if classify is dependency_errors:
        return _SUCCEEDED
    try:
        said = classify(value)
    except Exception as error:  # noqa: BLE001  written for exceptions alone, or broken
        _log_once(classify, error)
        return _SUCCEEDED
    outcomes = {outcome.value: outcome for outcome in Outcome}
    outcome = outcomes.get(said, Outcome.SUCCESS) if isinstance(said, str) else Outcome.SUCCESS
    return Verdict(outcome, "" if outcome is Outcome.SUCCESS else "result")


_SUCCEEDED = Verdict(Outcome.SUCCESS)


def _label(exc: BaseException) -> str:
    status = status_of(exc)
    return f"HTTP {status}" if status is not None and status >= 400 else type(exc).__name__
