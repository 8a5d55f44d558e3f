"""``BreakerPolicy``: the immutable settings of one breaker, checked when it is created."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, Final, Literal, TypedDict

from pydantic import Field

from resilient_tasks.core.classification import Classify, Matcher, dependency_errors
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.validation import Count, NumberOf, Rate, Seconds, SecondsOrZero, check_fields

FAIL: Final = "fail"
BLOCK: Final = "block"
FIXED: Final = "fixed"
ADAPTIVE: Final = "adaptive"
MOST_IN_FLIGHT = 1000  # bound of an adaptive limit whose policy has none of its own

# a description is what the message about a mistake says is allowed
_Few = Annotated[int, Field(ge=1, le=100, description="an integer from 1 to 100")]  # fewer than a store remembers
_Window = Annotated[Seconds, Field(ge=0.1, description="from 0.1 to 2,592,000 seconds (30 days)")]
_Multiplier = Annotated[float, Field(ge=1, le=100, description="a number from 1 to 100")]
_Share = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
_Pace = Annotated[float, Field(gt=0, le=1_000_000_000, description="a positive number per second up to 1,000,000,000")]
_Text = Annotated[str, Field(max_length=1000, description="a text of up to 1,000 characters")]
_Link = Annotated[
    str, Field(max_length=2000, pattern=r"^(https?://\S+)?$", description="a URL that begins with https:// or http://")
]
_Classify = Annotated[Classify, Field(description="a callable")]
_Matchers = Annotated[tuple[Matcher, ...], Field(description="exception types or predicates")]


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a breaker opens, for how long, how it heals, and what it limits. Durations are seconds.

    Args:
        failure_rate_threshold: *Trip.* Share ``t`` of failures from which on they add up: a failure adds 1 to the
            score of failures, a success subtracts ``t / (1 - t)``, never below 0.
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
        open_duration: *Open.* First open time.
        open_multiplier: growth of the open time with every opening in a row.
        max_open_duration: longest open time, also if the server's ``Retry-After`` is longer. After this long in
            CLOSED the next outage starts one step lower.
        open_jitter: random lengthening of the open time, as a share of it.
        trial_calls: *Heal.* Trials at once in HALF_OPEN.
        trial_successes: successful trials that close the breaker; ``None``: ``trial_calls``.
        trial_timeout: a trial that takes longer counts as failed; a task's time limit wins.
        ramp: time after a recovery in which the share of admitted tasks grows from 10 % to all; 0: none.
        resume_rate: ceiling for resumed tasks per second.
        max_concurrency: *Limit.* Most calls in flight at once in the whole fleet; ``None``: any number. Tasks beyond
            it wait in the deferred queue. With ``concurrency="adaptive"`` the upper bound of the limit, by default
            1,000.
        max_concurrency_per_worker: most tasks that one worker runs at once; ``None``: any number.
        concurrency: ``"fixed"``, or ``"adaptive"``: the limit begins at ``min_concurrency``, grows by one with each
            success while at least half of it is used, and falls by a tenth with each failure or slow call.
        min_concurrency: lower bound of an adaptive limit.
        max_deferred: most messages the deferred queue may hold; ``None``: unbounded.
        overflow: what happens to a task for which there is no room: ``"fail"`` with
            :class:`DeferredQueueFullError`, or ``"block"``: it stays on its queue, which the worker no longer consumes.
        max_keys: most children, one per key of ``breaker_key``. When full, a key unused for an hour is evicted; if
            there is none, new keys use the parent.
        max_open_ratio: largest share of the active children that is held open at once, except those an operator opened;
            ``None``: all.
        classify: *Judge.* ``(exception or returned value) -> Outcome``; the default is :func:`dependency_errors`,
            for which every value is a SUCCESS. It is not called for ``with`` blocks that end without an exception.
        failures: exception types or predicates that always count as failures, regardless of ``classify``.
        ignore: exception types or predicates that are never counted; they win over ``failures``.
        description: *About.* What the dependency is, and whom to call when it is down; shown to people.
        runbook: URL of what to do then.

    Raises:
        ConfigurationError: a value is out of range; the message names field, value and what is allowed.
    """

    failure_rate_threshold: Rate = 0.5
    slow_call_duration: Seconds | None = None
    slow_call_rate_threshold: Rate = 0.5
    consecutive_failures: Count | None = None
    minimum_calls: Count = 10
    minimum_tasks: _Few | None = None
    window: _Window = 30.0
    open_duration: Seconds = 10.0
    open_multiplier: _Multiplier = 2.0
    max_open_duration: Seconds = 300.0
    open_jitter: _Share = 0.1
    trial_calls: Count = 3
    trial_successes: Count | None = None
    trial_timeout: Seconds = 60.0
    ramp: SecondsOrZero = 10.0
    resume_rate: _Pace | None = None
    max_concurrency: NumberOf | None = None
    max_concurrency_per_worker: NumberOf | None = None
    concurrency: Literal["fixed", "adaptive"] = FIXED
    min_concurrency: NumberOf = 1
    max_deferred: Count | None = None
    overflow: Literal["fail", "block"] = FAIL
    max_keys: NumberOf = 10_000
    max_open_ratio: Rate | None = None
    classify: _Classify = dependency_errors
    failures: _Matchers = ()
    ignore: _Matchers = ()
    description: _Text = ""
    runbook: _Link = ""

    def __post_init__(self) -> None:
        for name in ("failures", "ignore"):
            value: object = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
            elif callable(value):
                object.__setattr__(self, name, (value,))
        check_fields(self)
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

    failure_rate_threshold: Rate
    slow_call_duration: Seconds | None
    slow_call_rate_threshold: Rate
    consecutive_failures: Count | None
    minimum_calls: Count
    minimum_tasks: _Few | None
    window: _Window
    open_duration: Seconds
    open_multiplier: _Multiplier
    max_open_duration: Seconds
    open_jitter: _Share
    trial_calls: Count
    trial_successes: Count | None
    trial_timeout: Seconds
    ramp: SecondsOrZero
    resume_rate: _Pace | None
    max_concurrency: NumberOf | None
    max_concurrency_per_worker: NumberOf | None
    concurrency: Literal["fixed", "adaptive"]
    min_concurrency: NumberOf
    max_deferred: Count | None
    overflow: Literal["fail", "block"]
    max_keys: NumberOf
    max_open_ratio: Rate | None
    classify: _Classify
    failures: Matcher | Sequence[Matcher]
    ignore: Matcher | Sequence[Matcher]
    description: _Text
    runbook: _Link
