"""Exhaustive search through the states of a model, breadth first, so that it finds the shortest way to each.

A model says where it starts and what may happen next; it raises :class:`BrokenRule` when a step breaks a rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Generic, NamedTuple, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)


class BrokenRule(AssertionError):  # noqa: N818 - it is what a test expects to see
    """A step has broken a rule of the protocol."""


def see(holds: bool, what: str) -> None:  # noqa: FBT001 - reads like assert
    """Raise BrokenRule with ``what`` unless something ``holds``."""
    if not holds:
        raise BrokenRule(what)


class Step(NamedTuple, Generic[S]):
    """Something that may happen. A ``fault`` is what happens to no purpose: progress must not depend on it."""

    what: str
    after: S
    fault: bool = False


class Model(Protocol[S]):
    """What can be explored."""

    def start(self) -> S:
        """Return the first state."""

    def steps(self, state: S) -> Iterable[Step[S]]:
        """Yield all that may happen in a state.

        Raises:
            BrokenRule: one of them must not happen.
        """


class Space(Generic[S]):
    """All states that a model can reach.

    Raises:
        BrokenRule: a rule can be broken; the message has the steps of the shortest way there.
    """

    def __init__(self, model: Model[S]) -> None:
        self._origins: dict[S, tuple[S, str] | None] = {model.start(): None}
        self._before: dict[S, list[S]] = {}  # without faults
        self.transitions = 0
        waiting = deque(self._origins)
        while waiting:
            waiting.extend(self._visit(model, waiting.popleft()))

    def __len__(self) -> int:
        return len(self._origins)

    def __str__(self) -> str:
        return f"{len(self):,} states, {self.transitions:,} transitions"

    def _visit(self, model: Model[S], state: S) -> Iterator[S]:
        try:
            for what, after, fault in model.steps(state):
                self.transitions += 1
                if not fault:
                    self._before.setdefault(after, []).append(state)
                if after not in self._origins:
                    self._origins[after] = state, what
                    yield after
        except BrokenRule as broken:
            raise BrokenRule(f"{broken}\n{self.steps_to(state)}") from None

    def steps_to(self, state: S) -> str:
        """Return the steps by which a state can be reached."""
        lines = [f"in {state}"]
        while (origin := self._origins[state]) is not None:
            state, what = origin
            lines.append(what)
        return "\n".join(reversed(lines))

    def always_leads_to(self, goal: Callable[[S], bool], what: str) -> None:
        """See that a goal can be reached from every state without any further fault.

        Raises:
            BrokenRule: from some state it cannot.
        """
        reaching = {state for state in self._origins if goal(state)}
        waiting = deque(reaching)
        while waiting:
            for before in self._before.get(waiting.popleft(), ()):
                if before not in reaching:
                    reaching.add(before)
                    waiting.append(before)
        for state in self._origins:
            if state not in reaching:
                raise BrokenRule(f"{what} cannot be reached any more\n{self.steps_to(state)}")
