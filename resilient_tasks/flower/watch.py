"""``Watch``: what Flower last read from the store. Pages are made of it, so that a store that is away delays none."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from resilient_tasks.core.model import State
from resilient_tasks.errors import StoreError
from resilient_tasks.flower.errands import Errands, NoAnswerError

logger = logging.getLogger("resilient_tasks")

#: What is told of one breaker, as JSON has it.
Told = dict[str, Any]

#: Seconds between two readings while somebody looks.
REFRESH = 1.0
#: Seconds after the last look for which that goes on.
INTEREST = 10.0
#: Readings are so many times rarer while nobody looks, so that whoever looks next need not wait.
_RARER = 5
#: Seconds that who looks first waits for a new reading before the last one is shown.
_BRIEFLY = 0.05
#: Seconds that a page waits for what somebody has just changed.
_PATIENCE = 1.0
#: The same where nothing was read before.
_PATIENCE_AT_FIRST = 5.0
#: Seconds after which the next attempt to read begins, whatever has become of the former.
_GIVE_UP = 10.0


@dataclass(frozen=True)
class Look:
    """All breakers at one moment.

    Args:
        breakers: what is told of each, by name.
        read_at: when they were read, seconds since the epoch; None: they never were.
        problem: why they could not be read since; "" if nobody knows of any.
    """

    breakers: Mapping[str, Told] = field(default_factory=dict)
    read_at: float | None = None
    problem: str = ""

    @property
    def age(self) -> float | None:
        """Seconds since they were read."""
        return None if self.read_at is None else max(0.0, time.time() - self.read_at)

    def freshness(self) -> dict[str, Any]:
        """Return how new this is, for whoever is shown it."""
        return {"read_at": self.read_at, "age": self.age, "problem": self.problem}

    def as_json(self) -> str:
        """Return everything as a JSON object."""
        return f'{json.dumps(self.freshness())[:-1]}, "breakers": {self.breakers_json}}}'

    @cached_property
    def breakers_json(self) -> str:
        """All breakers as a JSON array; made once, because it is sent to many."""
        return json.dumps(list(self.breakers.values()))


class Watch:
    """Reads breakers, once a second for all who look, and now and then while nobody does.

    Args:
        read: reads all breakers from the store; blocks.
        errands: who calls it.
    """

    def __init__(self, read: Callable[[], Sequence[Told]], errands: Errands) -> None:
        self._read = read
        self._errands = errands
        self._latest = Look()
        self._looked_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._patience = _BRIEFLY
        self._going_on: asyncio.Task[None] | None = None

    @property
    def busy(self) -> list[str]:
        """Names of the breakers that were not plainly CLOSED when they were last read, or that tasks waited for."""
        told = self._latest.breakers.values()
        return [each["name"] for each in told if each["state"] != State.CLOSED or each["deferred"]]

    def start(self) -> None:
        """Begin to read, and go on for as long as the event loop runs."""
        self._going_on = asyncio.ensure_future(self._go_on())

    async def look(self) -> Look:
        """Return what the store says; what it said before, if it does not answer at once."""
        self.expect_looks()
        if self._reading is not None:
            patience = _PATIENCE_AT_FIRST if self._latest.read_at is None else self._patience
            await asyncio.wait({self._reading}, timeout=patience)
        return self._latest

    def expect_looks(self) -> None:
        """Read at once and often, if nobody has looked for a while."""
        if not self._is_watched:
            self._begin(_BRIEFLY)
        self._looked_at = time.monotonic()

    def forget(self) -> None:
        """Read at once: something has just been changed."""
        self._begin(_PATIENCE)

    @property
    def _is_watched(self) -> bool:
        return time.monotonic() < self._looked_at + INTEREST

    def _begin(self, patience: float) -> None:
        self._reading, self._patience = asyncio.ensure_future(self._refresh()), patience

    async def _go_on(self) -> None:
        for turn in itertools.count():
            if self._is_watched or turn % _RARER == 0:
                await self._refresh()
            await asyncio.sleep(REFRESH)

    async def _refresh(self) -> None:
        try:
            self._latest = await self._errands.run(self._take, patience=_GIVE_UP)
        except (StoreError, NoAnswerError) as error:
            self._latest = replace(self._latest, problem=str(error))
        except Exception as error:
            logger.exception("Flower cannot read the breakers")
            self._latest = replace(self._latest, problem=f"the breakers cannot be read: {type(error).__name__}")
        if self._reading is asyncio.current_task():
            self._reading = None

    def _take(self) -> Look:
        look = Look({told["name"]: told for told in self._read()}, time.time())
        _ = look.breakers_json  # made here, and not in the event loop
        return look
