"""Every error of the library, under one root.

::

    ResilienceError
    ├── ConfigurationError        a mistake in code or settings, found at definition or start-up
    │   └── UnknownBreakerError   no breaker of this name is defined
    ├── BreakerOpenError          a breaker refused a call; carries breaker, state, retry_after
    ├── DeferralExpiredError      a task waited longer than its ``defer_for``
    ├── DeferredQueueFullError    no more tasks may be deferred: ``max_deferred``, or the memory limit
    ├── DeadLetterError           there is no such dead letter, or it cannot be replayed
    └── StoreError                the shared store cannot be reached or is not what it should be

All of them survive pickling (they cross process boundaries) and Celery's JSON result backends
(which rebuild an exception from its ``args``): the data *is* the ``args``.
"""

from __future__ import annotations


class ResilienceError(Exception):
    """Root of all errors raised by ``resilient_tasks``."""


class ConfigurationError(ResilienceError, ValueError):
    """A definition or a setting is wrong. The message names the thing, the value and what is allowed."""


class UnknownBreakerError(ConfigurationError, KeyError):
    """No breaker of this name is defined; raised by ``resilience[name]`` and whatever else looks one up."""

    __str__ = Exception.__str__  # KeyError's own quotes the message


class StoreError(ResilienceError):
    """The shared store is unavailable, too slow, or not a Redis-compatible server."""


#: In place of a state: the breaker is CLOSED, and its limit of calls in flight is reached.
AT_CAPACITY = "AT_CAPACITY"


class BreakerOpenError(ResilienceError):
    """A breaker refused a call.

    Args:
        breaker: name of the breaker.
        state: state in which it refused, ``"OPEN"``, ``"HALF_OPEN"``, ``"FORCED_OPEN"`` or, during
            the ramp after a recovery, ``"CLOSED"``; ``"AT_CAPACITY"`` when its limit of calls in flight is reached.
        retry_after: seconds until the breaker may admit calls again; ``None`` when only an operator
            can end the refusal.
    """

    def __init__(self, breaker: str, state: str = "OPEN", retry_after: float | None = None) -> None:
        super().__init__(breaker, state, retry_after)
        self.breaker = breaker
        self.state = state
        self.retry_after = retry_after

    def __str__(self) -> str:
        if self.state == "CLOSED":
            return f"breaker {self.breaker!r} has just closed and admits a growing share of tasks"
        if self.state == AT_CAPACITY:
            return f"breaker {self.breaker!r} is at capacity"
        when = "" if self.retry_after is None else f", retry after {self.retry_after:.1f} s"
        return f"breaker {self.breaker!r} is {self.state}{when}"


class DeferralExpiredError(ResilienceError):
    """A deferred task waited longer than its ``defer_for``.

    Args:
        breaker: name of the breaker the task waited for.
        waited: seconds it spent in deferral.
        defer_for: longest time in seconds that it was allowed to wait.
    """

    def __init__(self, breaker: str, waited: float = 0.0, defer_for: float = 0.0) -> None:
        super().__init__(breaker, waited, defer_for)
        self.breaker = breaker
        self.waited = waited
        self.defer_for = defer_for

    def __str__(self) -> str:
        return f"waited {self.waited:.1f} s for breaker {self.breaker!r}, longer than defer_for={self.defer_for:g} s"


class DeferredQueueFullError(ResilienceError):
    """A task should have been deferred and there was no room for it.

    Args:
        breaker: name of the breaker.
        max_deferred: the bound of the deferred queue, if that is what was reached.
        memory_limit: bytes of a server's memory that deferring may fill, if that is what was reached.
    """

    def __init__(self, breaker: str, max_deferred: int | None = None, memory_limit: int | None = None) -> None:
        super().__init__(breaker, max_deferred, memory_limit)
        self.breaker = breaker
        self.max_deferred = max_deferred
        self.memory_limit = memory_limit

    def __str__(self) -> str:
        if self.memory_limit is not None:
            return f"no room to defer for breaker {self.breaker!r}: memory is at its limit of {self.memory_limit} bytes"
        return f"the deferred queue of breaker {self.breaker!r} is full (max_deferred={self.max_deferred})"


class DeadLetterError(ResilienceError, LookupError):
    """There is no such dead letter, or it cannot be replayed.

    Args:
        complaint: names it and says why.
        done: how many others were replayed or dropped all the same, by breaker.
    """

    def __init__(self, complaint: str, done: dict[str, int] | None = None) -> None:
        super().__init__(complaint, done)
        self.complaint = complaint
        self.done = done or {}

    def __str__(self) -> str:
        return self.complaint
