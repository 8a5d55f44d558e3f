"""``Probe``: a breaker's health check, and when it is due.

In HALF_OPEN it replaces trials with real tasks. An *active* one also runs while the breaker admits
tasks, so that it may open before any of them has to fail.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any
from urllib.parse import unquote

from pydantic import Field

from resilient_tasks.core.model import Snapshot, State, key_of
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.validation import Count, PositiveSeconds, check_fields

LONGEST_RUN = 10.0  # seconds, unless the user says otherwise
ACTIVE_INTERVAL = 10.0  # seconds
FAILURES_BEFORE_OPEN = 3

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_CHECKED_WHILE = frozenset({State.CLOSED, State.SHADOW})


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What :meth:`Breaker.probe` registered; its arguments are explained there."""

    breaker: str
    function: Annotated[Callable[..., Any], Field(description="a function without arguments, or with a child's key")]
    timeout: PositiveSeconds | None = None
    interval: PositiveSeconds | None = None
    active: bool = False
    failures_before_open: Count | None = None
    successes_before_close: Count | None = None

    def __post_init__(self) -> None:
        subject = f"probe of breaker {self.breaker!r}: "
        check_fields(self, subject)
        if self.failures_before_open is not None and not self.active:
            given = f"failures_before_open={self.failures_before_open!r}"
            raise ConfigurationError(f"{subject}{given}: allowed is None unless active=True")
        if self.timeout is not None and self.timeout > self._longest_run:
            longest = f"{self.interval or ACTIVE_INTERVAL:g} seconds"
            raise ConfigurationError(f"{subject}timeout={self.timeout!r}: allowed is up to the interval of {longest}")

    @property
    def takes_key(self) -> bool:
        """Whether it checks one child after the other: a function with one argument, the child's key."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # of a builtin
            return False
        needed = [each for each in parameters if each.default is each.empty and each.kind not in _VARIADIC]
        return len(needed) == 1

    def of_child(self, name: str) -> Probe:
        """Return the probe of one child. It only replaces trials: healthy children may be many, and are not checked."""
        function = partial(self.function, unquote(key_of(name)))
        return replace(self, breaker=name, function=function, active=False, failures_before_open=None)

    @property
    def _longest_run(self) -> float:
        """Runs of one breaker do not overlap."""
        if self.interval is None:
            return ACTIVE_INTERVAL if self.active else math.inf
        return self.interval

    @property
    def limit(self) -> float:
        """Seconds that one run may take."""
        return min(LONGEST_RUN, self._longest_run) if self.timeout is None else self.timeout

    @property
    def failures_allowed(self) -> int:
        """Failed runs in a row that open the breaker."""
        return self.failures_before_open or FAILURES_BEFORE_OPEN

    def is_due(self, snapshot: Snapshot) -> bool:
        """Whether it should run now, while tasks are admitted or, spaced by the interval, in HALF_OPEN."""
        checked_at = -math.inf if snapshot.checked_at is None else snapshot.checked_at
        if snapshot.state is State.HALF_OPEN:
            return checked_at < self.turn_began(snapshot)
        if not self.active or snapshot.state not in _CHECKED_WHILE:
            return False
        # A breaker that was never used must be created before its interval can begin.
        return snapshot.epoch == 0 or max(checked_at, snapshot.since) < self.turn_began(snapshot)

    def turn_began(self, snapshot: Snapshot) -> float:
        """Return the instant since when one worker of the fleet may run it once, on the store's clock.

        While tasks are admitted each breaker has instants of its own, so that many are not checked at once.
        """
        if snapshot.state is State.HALF_OPEN:
            return snapshot.now - (self.interval or 0.0)
        interval = self.interval or ACTIVE_INTERVAL
        own_share = zlib.crc32(self.breaker.encode()) / 2**32
        return snapshot.now - (snapshot.now - own_share * interval) % interval
