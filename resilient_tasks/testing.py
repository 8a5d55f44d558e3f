"""For tests of code that uses breakers: no server, no worker, no waiting.

::

    @pytest.fixture
    def clock():
        with in_memory(resilience) as clock:
            yield clock

    def test_balance_has_a_fallback(clock):
        force(payments, "OPEN")
        assert balance.apply(args=[1]).get() == 0

    def test_payments_heals(clock):
        force(payments, "OPEN")
        clock.advance(payments.snapshot().retry_after)
        assert payments.state == "HALF_OPEN"

Inside the block every breaker begins CLOSED, and changes of one test are not visible in others.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from resilient_tasks.app import Resilience
from resilient_tasks.breaker import Breaker
from resilient_tasks.core.model import TARGETS, Snapshot, State
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.local import LocalStore

_BEGINNING = 1_000_000.0
_TIMEOUT = 5.0  # seconds for outcomes of calls to reach the store in memory
_POLL_INTERVAL = 0.02  # seconds

_VERB_TO = {str(state): verb for verb, state in TARGETS.items()}


class Clock:
    """The clock of a store in memory. It does not move until a test advances it."""

    def __init__(self, resilience: Resilience) -> None:
        self._resilience = resilience
        self._now = _BEGINNING

    def __call__(self) -> float:
        """Return the time in seconds."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass, and make the transitions that become due, as the periodic tick would.

        Raises:
            ValueError: ``seconds`` is negative.
        """
        if seconds < 0:
            raise ValueError(f"seconds={seconds!r}: allowed is 0 or more")
        self.settle()
        self._now += seconds
        fleet = self._resilience.fleet
        for cached in fleet.view.states():
            asked = fleet.view.asking()
            fleet.learn(fleet.store.advance(cached.spec), asked)

    def settle(self) -> None:
        """Wait until the outcomes of all calls so far are counted; a success is otherwise counted a moment later."""
        self._resilience.fleet.reporter.flush(_TIMEOUT)


class _StoreInMemory(LocalStore):
    """Polls often, so that leaving it does not cost every test half a second."""

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        return super().changes(timeout=min(timeout, _POLL_INTERVAL))


@contextmanager
def in_memory(resilience: Resilience) -> Iterator[Clock]:
    """Keep the breakers of ``resilience`` in this process's memory for as long as the block lasts.

    Yields:
        Their clock. Afterwards the breakers use their former store again.
    """
    outside = resilience._fleet  # noqa: SLF001  asking for ``resilience.fleet`` would connect to the store
    clock = Clock(resilience)
    resilience.use_store(_StoreInMemory(clock))
    inside = resilience.fleet
    try:
        yield clock
    finally:
        resilience._fleet = outside  # noqa: SLF001
        resilience._detach()  # noqa: SLF001
        inside.close()


def force(breaker: Breaker, state: State | str) -> None:
    """Bring a breaker into ``state``, whatever it has counted.

    Args:
        breaker: which one.
        state: any state but HALF_OPEN, which comes by time: force OPEN, then advance the clock.

    Raises:
        ConfigurationError: there is no such state, or it is HALF_OPEN.
    """
    verb = _VERB_TO.get(str(state))
    if verb is None:
        allowed = ", ".join(_VERB_TO)
        raise ConfigurationError(
            f"force(..., {state!r}): allowed are {allowed}; HALF_OPEN comes by advancing the clock"
        )
    getattr(breaker, verb)(reason="forced by a test")
