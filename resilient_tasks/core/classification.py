"""What a finished call means for the dependency that was called.

``dependency_errors`` is the default of ``BreakerPolicy.classify``: the call has failed if the dependency cannot be
reached, does not answer in time, breaks the connection, is overloaded, or answers 5xx or 429. Everything else (other
4xx, programming errors, file errors, a task that retries or rejects itself) is not counted.

``judge`` puts a policy's ``classify``, ``failures`` and ``ignore`` together into one ``Verdict``;
``judge_result`` asks a user's ``classify`` about a value that was returned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http import HTTPStatus
from typing import Any, NamedTuple, Union

from resilient_tasks.core.answer import attribute, retry_after_of, status_of, unwrapped
from resilient_tasks.core.client_errors import Meaning, is_one_of, meaning_of
from resilient_tasks.core.model import Outcome
from resilient_tasks.errors import BreakerOpenError, ResilienceError

logger = logging.getLogger(__name__)

# An exception that ended a call, or the value that it returned.
Classify = Callable[[Any], Outcome]
# Union, not "|": Callable[...] aliases do not support the operator on Python 3.10.
Matcher = Union[type[BaseException], Callable[[BaseException], bool]]  # noqa: UP007

_MISTAKES = (AttributeError, LookupError, NameError, TypeError)
_CONTROL_FLOW = {"asyncio": frozenset({"CancelledError"}), "celery": frozenset({"Ignore", "Reject", "Retry"})}


class Verdict(NamedTuple):
    """What one finished call means for its dependency."""

    outcome: Outcome  # what is counted
    cause: str = ""  # the exception's type or its HTTP status, never its text, which may hold secrets
    retry_after: float | None = None  # seconds that the dependency asked to be left alone
    undecided: bool = False  # no rule knows the exception: it is not counted, and the user should say what it is


def dependency_errors(exc: BaseException) -> Outcome:
    """Return FAILURE if ``exc`` is the dependency's fault, else IGNORED."""
    carried = carried_by(exc)
    if carried is None or _is_control_flow(carried):
        return Outcome.IGNORED
    return _root_cause(carried)[0] or Outcome.IGNORED


def judge(
    policy_classify: Classify,
    failures: Iterable[Matcher],
    ignore: Iterable[Matcher],
    exc: BaseException,
    *,
    clock: Callable[[], float] = time.time,
) -> Verdict:
    """Classify the exception that ended a guarded call, by a policy's three settings.

    ``ignore`` wins over ``failures``, which win over ``policy_classify``. A user's function that raises
    is logged once and the call is not counted; nothing is raised from here. A Celery ``Retry`` is classified by the
    exception that it carries.
    """
    carried = carried_by(exc)
    if carried is None or _is_control_flow(carried):
        return Verdict(Outcome.IGNORED, type(exc).__name__)
    by_rule, root = _root_cause(carried)
    outcome = _by_policy(policy_classify, failures, ignore, carried, by_rule)
    status = status_of(root)
    cause = f"HTTP {status}" if status is not None and status >= HTTPStatus.BAD_REQUEST else type(root).__name__
    if outcome is None:
        return Verdict(Outcome.IGNORED, cause, undecided=True)
    return Verdict(outcome, cause, retry_after_of(root, clock) if outcome is Outcome.FAILURE else None)


def _by_policy(
    policy_classify: Classify,
    failures: Iterable[Matcher],
    ignore: Iterable[Matcher],
    exc: BaseException,
    by_rule: Outcome | None,
) -> Outcome | None:
    function: Any = None
    try:
        for matchers, outcome in ((ignore, Outcome.IGNORED), (failures, Outcome.FAILURE)):
            for function in matchers:
                if isinstance(exc, function) if isinstance(function, type) else function(exc):
                    return outcome
        function = policy_classify
        return by_rule if function is dependency_errors else Outcome(function(exc))
    except Exception as error:  # noqa: BLE001  a user's function may raise anything; it must not mask the task's own
        _log_once(function, error)
        return Outcome.IGNORED


_logged: dict[int, object] = {}  # holds on to the functions, so that no other gets the same id


def _log_once(function: object, error: Exception) -> None:
    if id(function) not in _logged:
        _logged[id(function)] = function
        logger.error("%r failed; calls that it cannot classify are not counted", function, exc_info=error)


_undecided: set[str] = set()
_MOST_UNDECIDED = 100  # types that a process logs and counts; more are made up on the fly


def log_undecided(breaker: str, exc: BaseException) -> bool:
    """Log, once per type, that no rule knows an exception, and what to write; return whether to count it."""
    kind = type(carried_by(exc) or exc)
    name, full_name = kind.__name__, f"{kind.__module__}.{kind.__qualname__}"
    if full_name not in _undecided and len(_undecided) < _MOST_UNDECIDED:
        _undecided.add(full_name)
        logger.warning(
            "a call of breaker %r ended with %s, which no rule knows and which is not counted: write failures=(%s,)"
            " if it means that the dependency has failed, else ignore=(%s,)",
            *(breaker, full_name, name, name),
        )
    return full_name in _undecided


def judge_result(classify: Classify, value: object) -> Verdict:
    """Ask a policy's own ``classify`` about the value that a call returned; by default every value is a SUCCESS.

    So it is for a ``classify`` that raises, or returns anything but an outcome.
    """
    if classify is not dependency_errors:
        try:
            outcome = classify(value)
        except Exception as error:  # noqa: BLE001  written for exceptions alone, or broken
            _log_once(classify, error)
        else:
            if isinstance(outcome, str) and outcome in (Outcome.FAILURE, Outcome.SLOW, Outcome.IGNORED):
                return Verdict(Outcome(outcome), "result")
    return Verdict(Outcome.SUCCESS)


# --- what an exception wraps ----------------------------------------------------------------------------


def carried_by(exc: BaseException) -> BaseException | None:
    """Return the exception to classify: what a Celery ``Retry`` carries, otherwise ``exc`` itself."""
    if not is_one_of(exc, {"celery": frozenset({"Retry"})}):
        return exc
    carried = attribute(exc, "exc")
    # Retry keeps a picklable stand-in when it cannot keep the original, which Python still knows as the context.
    for original in (exc.__cause__, exc.__context__):
        if original is not None and carried is not None:
            is_named = attribute(carried, "exc_cls_name") == type(original).__name__
            if is_named or isinstance(original, type(carried)):
                return original
    return carried if isinstance(carried, BaseException) else None


def attribute_to(exc: BaseException, breaker: str) -> None:
    """Note that a guard of ``breaker`` has counted ``exc`` as a failure: guards of others around it do not."""
    with suppress(AttributeError):  # of a class that has no room for it
        exc._resilient_tasks_breaker = breaker  # type: ignore[attr-defined]  # noqa: SLF001 - a note of our own


def attributed_to(exc: BaseException) -> str | None:
    """Return the breaker whose guard has counted ``exc``, or what it was raised from or wraps, as a failure."""
    carried = carried_by(exc)
    if carried is None:
        return None

    def opens(one: BaseException) -> bool:
        """One that decides for itself hides what it wraps, but not what it was explicitly raised from."""
        return one.__cause__ is not None or _is_open(one)

    noted = (attribute(one, "_resilient_tasks_breaker") for one in unwrapped(carried, opens=opens))
    return next((name for name in noted if name is not None), None)


def _is_control_flow(exc: BaseException) -> bool:
    """Whether ``exc`` is Celery's, asyncio's, the interpreter's or our own way to end a call."""
    ends_process = (GeneratorExit, KeyboardInterrupt, SystemExit)
    if isinstance(exc, (ResilienceError, *ends_process)) or is_one_of(exc, _CONTROL_FLOW):
        return True
    is_group = attribute(exc, "exceptions") is not None
    return not isinstance(exc, Exception) and not is_group and meaning_of(exc) is not Meaning.FAILED


def _root_cause(exc: BaseException) -> tuple[Outcome | None, BaseException]:
    """Return what ``exc`` means, None if nothing decides, and the exception that decides: ``exc`` or a wrapped one."""
    found: dict[Meaning | None, BaseException] = {}
    for one in unwrapped(exc, opens=_is_open):
        found.setdefault(meaning_of(one), one)
    if Meaning.FAILED in found:
        return Outcome.FAILURE, found[Meaning.FAILED]
    for meaning in (Meaning.CLEARED, Meaning.PROBABLY_CLEARED):
        if meaning in found:
            return Outcome.IGNORED, found[meaning]
    return (Outcome.FAILURE, exc) if found.keys() == {Meaning.RETRIED} else (None, exc)


def _is_open(exc: BaseException) -> bool:
    return meaning_of(exc) not in {Meaning.FAILED, Meaning.CLEARED}


def refusal_in(exc: BaseException, *, in_groups: bool = True) -> BreakerOpenError | None:
    """Return the refusal that ``exc`` is or wraps, unless it wraps a failure that a guard has counted before that.

    A mistake in code, made while a refusal was handled, wraps none. Without ``in_groups`` members of exception groups
    are not looked at, for others of them may be failures.
    """

    def opens(one: BaseException) -> bool:
        is_group = any(cls.__name__ == "BaseExceptionGroup" for cls in type(one).__mro__)
        return not isinstance(one, _MISTAKES) and (in_groups or not is_group)

    for one in unwrapped(exc, opens):
        if isinstance(one, BreakerOpenError):
            return one
        if attributed_to(one) is not None:
            return None
    return None
