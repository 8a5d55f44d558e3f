"""``BreakerPolicy``: the immutable settings of one breaker, checked when it is created."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

from resilient_tasks.core.classification import Classify, Matcher, dependency_errors
from resilient_tasks.errors import ConfigurationError

_RATE = "a number above 0 and up to 1"
_SECONDS = "a positive number of seconds up to 2,592,000 (30 days)"
_COUNT = "an integer of 1 or more"
_NUMBER_OF = "an integer from 1 to 1,000,000"

FAIL, BLOCK = "fail", "block"
FIXED, ADAPTIVE = "fixed", "adaptive"
MOST_IN_FLIGHT = 1000  # bound of an adaptive limit whose policy has none of its own


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _is_rate(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


def _is_seconds(value: Any) -> bool:
    return _number(value) and 0 < value <= _LONGEST


def _is_pace(value: Any) -> bool:
    return _number(value) and 0 < value <= _MOST


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST


def _is_number_of(value: Any) -> bool:
    return _is_count(value) and value <= _MOST_OF_A_KIND


def _is_few(value: Any) -> bool:
    return _is_count(value) and value <= _MOST_TASKS


_LONGEST = 30 * 24 * 3600.0
_MOST = 1_000_000_000
_MOST_OF_A_KIND = 1_000_000
_MOST_TASKS = 100  # fewer than a store remembers


def _is_matchers(value: Any) -> bool:
    return isinstance(value, tuple) and all(callable(item) for item in value)


def _setting(default: Any, check: Callable[[Any], bool], allowed: str, *, optional: bool = False) -> Any:
    def accepts(value: Any) -> bool:
        return (optional and value is None) or check(value)

    metadata = {"accepts": accepts, "allowed": f"{allowed} or None" if optional else allowed}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a breaker opens, for how long, and how it heals. Durations are seconds.

    Args:
        failure_rate_threshold: share ``t`` of failures from which on they add up: a failure adds 1 to the score of
            failures, a success subtracts ``t / (1 - t)``, never below 0.
        slow_call_duration: a call that takes longer is SLOW. It adds 1 to the score of slow calls as soon as it
            passes this time, and 1 more for each further such time; ``None``: no call is slow.
        slow_call_rate_threshold: the same share for slow calls.
        consecutive_failures: failures in a row that open the breaker, whatever the scores; ``None``: off.
        minimum_calls: the score, of failures or of slow calls, that opens it.
        minimum_tasks: different tasks that must have added to the score before it opens. All runs of a task add once;
            a call outside any task counts as a task of its own.
            ``None``: 2; or 1 where ``minimum_calls`` or ``consecutive_failures`` is 1.
        window: a score is forgotten when nothing has added to it for so long; calls and rates are summed over about
            this time.
        open_duration: first open time.
        open_multiplier: growth of the open time with every opening in a row.
        max_open_duration: longest open time, also if the server's ``Retry-After`` is longer. After this long in
            CLOSED the next outage starts one step lower.
        open_jitter: random lengthening of the open time, as a share of it.
        trial_calls: trials at once in HALF_OPEN.
        trial_successes: successful trials that close the breaker; ``None``: ``trial_calls``.
        trial_timeout: a trial that takes longer counts as failed; a task's time limit wins.
        ramp: time after a recovery in which the share of admitted tasks grows from 10 % to all; 0: none.
        max_concurrency: most calls in flight at once in the whole fleet; ``None``: any number. Tasks beyond it
            wait in the deferred queue. With ``concurrency="adaptive"`` the upper bound of the limit, by default 1,000.
        max_concurrency_per_worker: most tasks that one worker runs at once; ``None``: any number.
        concurrency: ``"fixed"``, or ``"adaptive"``: the limit begins at ``min_concurrency``, grows by one with each
            success while at least half of it is used, and falls by a tenth with each failure or slow call.
        min_concurrency: lower bound of an adaptive limit.
        resume_rate: ceiling for resumed tasks per second.
        max_deferred: most messages the deferred queue may hold; ``None``: unbounded.
        overflow: what happens to a task for which there is no room: ``"fail"`` with
            :class:`DeferredQueueFullError`, or ``"block"``: it stays on its queue, which the worker no longer consumes.
        max_keys: most children, one per key of ``breaker_key``. When full, a key unused for an hour is evicted; if
            there is none, new keys use the parent.
        max_open_ratio: largest share of the active children that is held open at once, except those an operator opened;
            ``None``: all.
        classify: ``(exception or returned value) -> Outcome``; the default is :func:`dependency_errors`,
            for which every value is a SUCCESS. It is not called for ``with`` blocks that end without an exception.
        failures: exception types or predicates that always count as failures, regardless of ``classify``.
        ignore: exception types or predicates that are never counted; they win over ``failures``.

    Raises:
        ConfigurationError: a value is out of range; the message names field, value and what is allowed.
    """

    failure_rate_threshold: float = _setting(0.5, _is_rate, _RATE)
    slow_call_duration: float | None = _setting(None, _is_seconds, _SECONDS, optional=True)
    slow_call_rate_threshold: float = _setting(0.5, _is_rate, _RATE)
    consecutive_failures: int | None = _setting(None, _is_count, _COUNT, optional=True)
    minimum_calls: int = _setting(10, _is_count, _COUNT)
    minimum_tasks: int | None = _setting(None, _is_few, "an integer from 1 to 100", optional=True)
    window: float = _setting(30.0, lambda v: _is_seconds(v) and v >= 0.1, "from 0.1 to 2,592,000 seconds (30 days)")
    open_duration: float = _setting(10.0, _is_seconds, _SECONDS)
    open_multiplier: float = _setting(2.0, lambda v: _number(v) and 1 <= v <= 100, "a number from 1 to 100")
    max_open_duration: float = _setting(300.0, _is_seconds, _SECONDS)
    open_jitter: float = _setting(0.1, lambda v: _number(v) and 0 <= v <= 1, "a number from 0 to 1")
    trial_calls: int = _setting(3, _is_count, _COUNT)
    trial_successes: int | None = _setting(None, _is_count, _COUNT, optional=True)
    trial_timeout: float = _setting(60.0, _is_seconds, _SECONDS)
    ramp: float = _setting(10.0, lambda v: _number(v) and 0 <= v <= _LONGEST, "from 0 to 2,592,000 seconds (30 days)")
    max_concurrency: int | None = _setting(None, _is_number_of, _NUMBER_OF, optional=True)
    max_concurrency_per_worker: int | None = _setting(None, _is_number_of, _NUMBER_OF, optional=True)
    concurrency: Literal["fixed", "adaptive"] = _setting(
        FIXED, lambda v: v in (FIXED, ADAPTIVE), "'fixed' or 'adaptive'"
    )
    min_concurrency: int = _setting(1, _is_number_of, _NUMBER_OF)
    resume_rate: float | None = _setting(
        None, _is_pace, "a positive number per second up to 1,000,000,000", optional=True
    )
    max_deferred: int | None = _setting(None, _is_count, _COUNT, optional=True)
    overflow: Literal["fail", "block"] = _setting(FAIL, lambda v: v in (FAIL, BLOCK), "'fail' or 'block'")
    max_keys: int = _setting(10_000, _is_number_of, _NUMBER_OF)
    max_open_ratio: float | None = _setting(None, _is_rate, _RATE, optional=True)
    classify: Classify = _setting(dependency_errors, callable, "a callable")
    failures: tuple[Matcher, ...] = _setting((), _is_matchers, "exception types or predicates")
    ignore: tuple[Matcher, ...] = _setting((), _is_matchers, "exception types or predicates")

    def __post_init__(self) -> None:
        for name in ("failures", "ignore"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif callable(value):
                object.__setattr__(self, name, (value,))
        for setting in fields(self):
            value = getattr(self, setting.name)
            if not setting.metadata["accepts"](value):
                raise ConfigurationError(f"{setting.name}={value!r}: allowed is {setting.metadata['allowed']}")
        self._check_pairs()

    def _check_pairs(self) -> None:
        if self.max_open_duration < self.open_duration:
            raise ConfigurationError(
                f"max_open_duration={self.max_open_duration!r}: allowed is open_duration={self.open_duration!r} or more"
            )
        if self.trial_successes is not None and self.trial_successes > self.trial_calls:
            raise ConfigurationError(
                f"trial_successes={self.trial_successes!r}: allowed is up to trial_calls={self.trial_calls!r}"
            )
        if self.concurrency == ADAPTIVE and self.min_concurrency > (self.most_in_flight or 0):
            raise ConfigurationError(
                f"min_concurrency={self.min_concurrency!r}: allowed is up to max_concurrency={self.most_in_flight!r}"
            )

    def differences(self, other: BreakerPolicy) -> list[tuple[str, Any, Any]]:
        """Return each field that ``other`` has another value of, with both values."""
        pairs = ((each.name, getattr(self, each.name), getattr(other, each.name)) for each in fields(self))
        return [(name, mine, theirs) for name, mine, theirs in pairs if mine != theirs]

    @property
    def most_in_flight(self) -> int | None:
        """Most calls in flight in the fleet that are counted; None: they are not counted."""
        if self.max_concurrency is not None:
            return self.max_concurrency
        return MOST_IN_FLIGHT if self.concurrency == ADAPTIVE else None

    @property
    def needed_successes(self) -> int:
        """Successful trials that close the breaker."""
        return self.trial_calls if self.trial_successes is None else self.trial_successes

    @property
    def needed_tasks(self) -> int:
        """Different tasks that must have failed before the breaker opens."""
        if self.minimum_tasks is not None:
            return self.minimum_tasks
        return 1 if 1 in (self.minimum_calls, self.consecutive_failures) else 2


class PolicyFields(TypedDict, total=False):
    """The fields of a :class:`BreakerPolicy` as keyword arguments, for type checkers."""

    failure_rate_threshold: float
    slow_call_duration: float | None
    slow_call_rate_threshold: float
    consecutive_failures: int | None
    minimum_calls: int
    minimum_tasks: int | None
    window: float
    open_duration: float
    open_multiplier: float
    max_open_duration: float
    open_jitter: float
    trial_calls: int
    trial_successes: int | None
    trial_timeout: float
    ramp: float
    max_concurrency: int | None
    max_concurrency_per_worker: int | None
    concurrency: Literal["fixed", "adaptive"]
    min_concurrency: int
    resume_rate: float | None
    max_deferred: int | None
    overflow: Literal["fail", "block"]
    max_keys: int
    max_open_ratio: float | None
    classify: Classify
    failures: Matcher | Sequence[Matcher]
    ignore: Matcher | Sequence[Matcher]
