"""What the contract tests hold in their hands: a store with a clock that is advanced, and a breaker in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from resilient_tasks.core.model import Answer, Calls, Grant, Outcome, Snapshot, State, Transition, Verb
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec, Store
from resilient_tasks.store.history import History
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.store.redis import RedisStore

START = 1_789_000_000.437  # no round number: buckets and milliseconds are not aligned with it
CLOCK_KEYS = [f"clock-of-the-test-{{{tag}}}" for tag in "afk"]  # of three nodes of a cluster each has one
CLOCK_LUA = f"""
local function now_ms()
  for _, key in ipairs({{{str(CLOCK_KEYS)[1:-1]}}}) do
    local now = redis.pcall('GET', key)
    if type(now) == 'string' then
      return tonumber(now)
    end
  end
end
"""
OUTCOMES = {
    "S": Outcome.SUCCESS,
    "F": Outcome.FAILURE,
    "L": Outcome.SLOW,
    "I": Outcome.IGNORED,
    "O": Outcome.OVERDUE,
}


#: For tests of what only a shared store has.
SHARED = pytest.mark.parametrize("lab", ["fakeredis", "server", "cluster"], indirect=True)
#: For long runs: each set of primitives once. How a script is reached, other tests of it show.
ONE_OF_EACH = pytest.mark.parametrize("lab", ["local", "server"], indirect=True)
ONE_SHARED = pytest.mark.parametrize("lab", ["server"], indirect=True)


def ledger_of(store: Store) -> Ledger:
    """Return the ledger of a shared store."""
    assert isinstance(store, RedisStore)
    return store.ledger


@dataclass
class LocalClock:
    """A clock that stops until it is advanced."""

    now: float = START

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now = round(self.now + seconds, 3)


@dataclass
class ServerClock(LocalClock):
    """The time in keys of the server, where ``CLOCK_LUA`` reads it: a script reads only keys of its own node."""

    client: redis.Redis = field(kw_only=True)

    def __post_init__(self) -> None:
        self.advance(0)

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for key in CLOCK_KEYS:
            self.client.set(key, round(self.now * 1000))


@dataclass
class Lab:
    """A store, the clock it goes by, and a way to open it a second time under another namespace."""

    store: Store
    clock: LocalClock
    other_namespace: Callable[[], Store]

    @property
    def ledger(self) -> Ledger:
        """The ledger beside a shared store's breakers."""
        return ledger_of(self.store)

    @property
    def history(self) -> History:
        """What a shared store remembers of its breakers."""
        assert isinstance(self.store, RedisStore)
        return self.store.history

    def breaker(self, name: str = "payments", *, revision: int = 0, **policy: Any) -> Subject:
        """Return a breaker with the policy that the scenarios are written for, unless given otherwise."""
        default: dict[str, Any] = {
            "failure_rate_threshold": 0.5, "minimum_calls": 5, "window": 20.0, "open_duration": 5.0, "open_jitter": 0.0,
        }  # fmt: skip
        return Subject(self.store, self.clock, Spec(name, BreakerPolicy(**{**default, **policy}), revision))


@dataclass
class Subject:
    """A breaker under test. ``calls`` are letters: S success, F failure, L slow (late), I ignored, O overdue."""

    store: Store
    clock: LocalClock
    spec: Spec
    transitions: list[Transition] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def state(self) -> State:
        return self.snapshot().state

    def snapshot(self) -> Snapshot:
        return self.store.read([self.spec])[0]

    def calls(
        self,
        outcomes: str,
        *,
        epoch: int | None = None,
        voter: str = "",
        each: bool = False,
        was_overdue: bool = False,
        **evidence: Any,
    ) -> Answer:
        """Report one outcome after the other, as calls admitted in the present epoch, or in ``epoch``."""
        for letter in outcomes:
            admitted_in = self.snapshot().epoch if epoch is None else epoch
            runs = (Calls(OUTCOMES[letter], 1, voter, each, was_overdue),)
            answer = self._noted(self.store.record(self.spec, Evidence(admitted_in, runs, **evidence)))
        return answer

    def batch(self, *runs: tuple[str, int], **evidence: Any) -> Answer:
        """Report runs of equal outcomes at once."""
        encoded = tuple(Calls(OUTCOMES[letter], count) for letter, count in runs)
        return self._noted(self.store.record(self.spec, Evidence(self.snapshot().epoch, encoded, **evidence)))

    def ask(self, holder: str = "holder", *, lease: float = 10.0) -> Grant:
        grant = self.store.acquire(self.spec, holder, lease=lease)
        self.transitions += [grant.transition] if grant.transition else []
        return grant

    def settle(self, holder: str, letter: str, *, epoch: int | None = None, **evidence: Any) -> Answer:
        admitted_in = self.snapshot().epoch if epoch is None else epoch
        reported = Evidence(admitted_in, (), **evidence)
        return self._noted(self.store.settle(self.spec, holder, OUTCOMES[letter], reported))

    def trials(self, outcomes: str) -> State:
        """Make one trial after the other and return the state after the last."""
        for number, letter in enumerate(outcomes):
            holder = f"trial {number} at {self.clock()}"
            assert self.ask(holder).trial
            self.settle(holder, letter)
        return self.state

    def advance(self) -> Answer:
        return self._noted(self.store.advance(self.spec))

    def health_checks(self, outcomes: str, *, limit: int = 3, **evidence: Any) -> Answer:
        """Report one health check after the other, as made in the present epoch."""
        for letter in outcomes:
            reported = Evidence(self.snapshot().epoch, (), **evidence)
            answer = self._noted(self.store.report_health_check(self.spec, OUTCOMES[letter], reported, limit=limit))
        return answer

    def command(self, verb: Verb, *, reason: str = "", actor: str = "") -> Answer:
        return self._noted(self.store.command(self.spec, verb, reason=reason, actor=actor))

    def open(self) -> Subject:
        """Trip it with failures."""
        assert self.batch(("F", self.spec.policy.minimum_calls)).snapshot.state is State.OPEN
        return self

    def half_open(self) -> Subject:
        """Trip it and wait until trials may begin."""
        snapshot = self.open().snapshot()
        assert snapshot.retry_after is not None
        self.clock.advance(snapshot.retry_after)
        assert self.advance().snapshot.state is State.HALF_OPEN
        return self

    def _noted(self, answer: Answer) -> Answer:
        self.transitions += [answer.transition] if answer.transition else []
        return answer
