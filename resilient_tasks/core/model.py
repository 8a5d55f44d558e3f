"""Names, states, outcomes, verbs, and what a store answers, as types.

Names of breakers and namespaces become parts of keys, queues and metrics, so they are checked first. Times are seconds
(``float``) on the store's clock, which for a shared store is the server's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from difflib import get_close_matches
from enum import Enum
from typing import Any, NamedTuple
from urllib.parse import quote, unquote
from zlib import crc32

from resilient_tasks.errors import ConfigurationError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
#: Names of dead-letter queues that belong to no breaker.
RESERVED = frozenset({"undecodable"})
NAME_RULE = "1 to 100 letters, digits, '_', '.' and '-', beginning with a letter or a digit"


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may name a breaker or a namespace, its ``kind``; else raise ``ConfigurationError``."""
    if isinstance(name, str) and name in RESERVED:
        raise ConfigurationError(f"{kind} name {name!r}: it is reserved; allowed is another one")
    if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name, re.ASCII):
        return name
    raise ConfigurationError(f"{kind} name {name!r}: allowed is {NAME_RULE}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question for the end of a message about an unknown name; "" if none of the known is like it."""
    near = get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


# --- children ---------------------------------------------------------------------------------------

ALL_KEYS = "*"
KEY_RULE = "text or an integer, at most 99 characters as percent-encoded UTF-8, not empty"
_SEPARATOR = ":"
_LONGEST_KEY = 99


def child_name(parent: str, key: object) -> str:
    """Return the name of a parent's child: ``payments:acme``; what may not be part of a name is percent-encoded.

    Raises:
        ConfigurationError: the key cannot name a child.
    """
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        try:
            escaped = quote(str(key), safe="").replace("~", "%7E")
        except UnicodeEncodeError:  # half of a surrogate pair
            escaped = ""
        if 0 < len(escaped) <= _LONGEST_KEY:
            return f"{parent}{_SEPARATOR}{escaped}"
    raise ConfigurationError(f"key {key!r:.100} of breaker {parent!r}: allowed is {KEY_RULE}")


def parent_of(name: str) -> str | None:
    """Return the name of a child's parent; None for a breaker that is no child."""
    parent, separator, _ = name.partition(_SEPARATOR)
    return parent if separator else None


def is_child(name: str) -> bool:
    """Whether this is the name of a child, and in the one way in which its key is written."""
    parent, key = parent_of(name), key_of(name)
    return (
        parent is not None and quote(unquote(key), safe="").replace("~", "%7E") == key and 0 < len(key) <= _LONGEST_KEY
    )


def key_of(name: str) -> str:
    """Return the percent-encoded key in a child's name; "" for a breaker that is no child."""
    return name.partition(_SEPARATOR)[2]


class State(str, Enum):
    """State of a breaker. The last three are set by an operator only."""

    CLOSED = "CLOSED"
    OPEN = "OPEN"
    HALF_OPEN = "HALF_OPEN"
    FORCED_OPEN = "FORCED_OPEN"
    DISABLED = "DISABLED"
    SHADOW = "SHADOW"

    __str__ = str.__str__


#: States in which a breaker is held open.
HELD_OPEN = frozenset({State.OPEN, State.HALF_OPEN, State.FORCED_OPEN})

#: States in which calls need not ask for a permit.
ADMITTING = frozenset({State.CLOSED, State.DISABLED, State.SHADOW})


class Outcome(str, Enum):
    """Outcome of one guarded call. ``SLOW`` succeeded, too late; ``IGNORED`` says nothing.

    ``OVERDUE`` still runs and has passed another ``slow_call_duration``: it adds to the slow evidence, each time, and
    is counted nowhere else.
    """

    SUCCESS = "SUCCESS"
    FAILURE = "FAILURE"
    SLOW = "SLOW"
    IGNORED = "IGNORED"
    OVERDUE = "OVERDUE"

    __str__ = str.__str__


class Calls(NamedTuple):
    """Calls in a row that ended alike."""

    outcome: Outcome  # of each
    number: int = 1  # how many there were
    voter: str = ""  # the task that made them, as :func:`voter_of` calls it; "": each was made by a task of its own
    # each of them counts, as guards inside a task's body do. Whole runs of a task, its retries among them, have one
    # vote in the window: a failure replaces a slow one, what else is attributed to the dependency is not counted again
    each: bool = False
    # the calls have been reported as OVERDUE before they ended: their ends say nothing more to the slow evidence
    was_overdue: bool = False


def voter_of(task_id: str | None) -> str:
    """Return eight characters that identify a task; "" for a call outside any task."""
    return f"{crc32(task_id.encode()):08x}" if task_id else ""


class Verb(str, Enum):
    """What an operator can do to a breaker."""

    TRIP = "trip"
    ISOLATE = "isolate"
    DISABLE = "disable"
    SHADOW = "shadow"
    RESET = "reset"

    __str__ = str.__str__


#: The state that each leads to.
TARGETS = {
    Verb.RESET: State.CLOSED,  # without evidence
    Verb.TRIP: State.OPEN,  # as if it had tripped
    Verb.ISOLATE: State.FORCED_OPEN,
    Verb.DISABLE: State.DISABLED,
    Verb.SHADOW: State.SHADOW,
}


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A breaker as its store knows it at one instant.

    ``evidence`` decides. ``calls``, ``failures``, ``slow`` and the rates are sums over about the last ``window``, for
    people, and decide nothing. All stay as they were at the trip while the breaker does not count (OPEN, HALF_OPEN).
    """

    name: str
    state: State
    epoch: int  # grows with every transition
    version: int  # grows with every transition and every permit that becomes free in HALF_OPEN
    now: float  # the store's clock when this was read
    since: float  # when the state was entered
    reason: str = ""
    actor: str = ""  # who: "" for the rules themselves, else what the operator's verb was given
    calls: int = 0
    failures: int = 0
    slow: int = 0
    evidence: float = 0.0  # of failures, 0.0 to 1.0 of what opens the breaker; stays as at the trip
    slow_evidence: float = 0.0  # the same of slow calls
    minimum_calls: int = 0  # how many calls of evidence open the breaker
    openings: int = 0  # openings in a row, the exponent of the open time
    open_until: float | None = None  # OPEN: when trials may begin; None: not OPEN, or only by an operator
    trials: int = 0  # live permits
    last_success_at: float | None = None  # last SUCCESS or SLOW that was counted
    total_failures: int = 0  # failures ever counted, trials included
    ramp_since: float | None = None  # CLOSED out of HALF_OPEN: when; otherwise None
    would_open: bool = False  # SHADOW: it would be OPEN now
    would_have_opened: int = 0  # how often it would have opened since it last entered SHADOW
    failed_checks: int = 0  # CLOSED, SHADOW: failed health checks in a row
    checked_at: float | None = None  # when the last health check began that the store gave leave for
    in_flight: int = 0  # calls that hold one of a limited number of slots
    concurrency_limit: int | None = None  # how many may at present; None: any number, and they are not counted
    is_due: bool = False  # the rules ask for a change that no process has made yet
    deferred: int = 0
    oldest_deferred_at: float | None = None
    next_deadline_at: float | None = None  # earliest end of a deferred task's ``defer_for``
    active_children: int = 0  # children that are not plainly CLOSED, or that tasks wait for

    @property
    def failure_rate(self) -> float:
        """Share of calls that failed, 0.0 to 1.0."""
        return self.failures / self.calls if self.calls else 0.0

    @property
    def slow_rate(self) -> float:
        """Share of calls that succeeded too late, 0.0 to 1.0."""
        return self.slow / self.calls if self.calls else 0.0

    @property
    def has_room(self) -> bool:
        """Whether one more call may be in flight."""
        return self.concurrency_limit is None or self.in_flight < self.concurrency_limit

    @property
    def retry_after(self) -> float | None:
        """Seconds from ``now`` until trials may begin; 0.0 if they may already; None if an operator decides."""
        if self.state is State.FORCED_OPEN:
            return None
        return max(0.0, self.open_until - self.now) if self.open_until is not None else 0.0

    @property
    def next_probe_at(self) -> float | None:
        """When the next trial may begin, on the store's clock; None unless the breaker is OPEN."""
        return self.open_until

    def as_dict(self) -> dict[str, Any]:
        """Return all figures by name, the derived ones as well, for programs that read JSON."""
        return {name: getattr(self, name) for name in _FIGURES}


_FIGURES = (*(field.name for field in fields(Snapshot)), "failure_rate", "slow_rate", "retry_after", "next_probe_at")


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of state, returned to exactly one caller in the fleet."""

    name: str
    previous: State
    state: State
    epoch: int
    at: float
    reason: str
    actor: str
    calls: int
    failures: int
    slow: int
    would_open: bool = False  # SHADOW only: state did not change, the rules would have opened it


@dataclass(frozen=True, slots=True)
class Answer:
    """What a store answers to a report, a tick or a verb."""

    snapshot: Snapshot
    transition: Transition | None = None  # set for the one caller that made it


@dataclass(frozen=True, slots=True)
class Grant:
    """A store's answer to a request for admission.

    ``trial`` is true when the caller now holds a permit, which it must settle or let expire.
    The same goes for a slot: a caller admitted to a breaker with a limit holds one.
    """

    admitted: bool
    trial: bool
    snapshot: Snapshot
    transition: Transition | None = None  # OPEN became HALF_OPEN by this very request

    @property
    def leased(self) -> bool:
        """Whether the caller holds a permit or a slot, and has to settle it."""
        return self.admitted and (self.trial or self.snapshot.concurrency_limit is not None)
