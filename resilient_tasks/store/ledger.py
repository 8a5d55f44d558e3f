"""``Ledger``: what the fleet's workers must know in common beside the breakers' states.

Which tasks wait and until when, how fast they are resumed, which were revoked, who ticks, and which breakers some
worker still defines. It is kept in the shared store; no process can make it up for itself.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, NamedTuple

from resilient_tasks.core.memory import Memory
from resilient_tasks.core.model import key_of
from resilient_tasks.core.pace import Pace
from resilient_tasks.core.rules import to_ms
from resilient_tasks.errors import StoreError
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.server import Command, Server, portions

REVOKED_FOR = 7 * 24 * 3600.0  # s for which a revoke is remembered
MOST_REVOKED = 50_000  # ids and stamps
CLAIMED_FOR = 7 * 24 * 3600.0  # s for which it is remembered which task is the latest of its kind
_SKEW = 1.0  # s by which two answers of one server may differ
LONGEST_ABSENCE = 30.0  # s after which a worker that has not attended is no longer alive


class Wait(NamedTuple):
    """How long a deferred task waits, in seconds of the store's time."""

    deadline: float | None = None  # None: it may wait for ever
    since: float | None = None  # when it was first deferred, however often it was resumed since; None: now


class Ledger:
    """The fleet's ledger, in the same server and namespace as its breakers.

    Every method may raise :class:`~resilient_tasks.errors.StoreError`, within the server's time limit. ``drain`` is
    called with the name of a breaker for which the last task waits no longer.
    """

    def __init__(self, server: Server, keys: Keys, drain: Callable[[str], None]) -> None:
        self._server = server
        self._keys = keys
        self._drain = drain

    # --- deferred tasks -----------------------------------------------------------------------------

    def add_deferred(
        self, name: str, task_id: str, *, deadline: float | None = None, since: float | None = None,
        now: float | None = None,
    ) -> None:  # fmt: skip
        """Index a deferred task; see :class:`Wait`. ``now``: the store's time, if the caller knows it."""
        self._add_deferred(name, {task_id: Wait(deadline, since)}, self._server.now() if now is None else to_ms(now))

    def add_all_deferred(self, name: str, waits: Mapping[str, Wait]) -> None:
        """Index deferred tasks under the time of their first deferral, and the ends of their waits, if any."""
        self._add_deferred(name, waits, self._server.now())

    def _add_deferred(self, name: str, waits: Mapping[str, Wait], now: int) -> None:
        keys, key = self._keys.breaker(name), key_of(name)
        for some in portions(waits.items()):
            since = [(now if wait.since is None else to_ms(wait.since), task_id) for task_id, wait in some]
            ends = [(to_ms(wait.deadline), task_id) for task_id, wait in some if wait.deadline is not None]
            endless = [task_id for task_id, wait in some if wait.deadline is None]
            commands: list[Command] = [("ZADD", keys.deferred, "NX", *chain.from_iterable(since))]
            commands += [("ZADD", keys.deadlines, *chain.from_iterable(ends))] if ends else []
            commands += [("ZREM", keys.deadlines, *endless)] if endless else []
            # last: a child that is taken off the active ones meanwhile is looked at once more after that
            commands += [("ZADD", keys.active, "NX", now, key)] if key else []
            # half a millisecond later, which is never the time of a transition: see CachedState.has_seen
            commands += self._keys.note_change(name, now + 0.5)
            self._server.commands(commands)

    def hasten(self, names: Iterable[str], task_ids: Iterable[str]) -> None:
        """Have the tick look at once at those of ``task_ids`` that wait for a breaker among ``names``."""
        keys = [self._keys.breaker(name) for name in names]
        calls = [([each.deferred, each.deadlines], some) for some in portions(task_ids) for each in keys]
        self._server.script_each("hasten", calls)

    def remove_deferred(self, name: str, task_ids: Iterable[str]) -> None:
        """Forget deferred tasks that were resumed, dead-lettered or dropped."""
        keys = self._keys.breaker(name)
        indexes = keys.deferred, keys.deadlines
        self._server.commands([("ZREM", key, *some) for some in portions(task_ids) for key in indexes])
        self._drain(name)

    def deferred_since(self, name: str, task_id: str) -> float | None:
        """Return when a waiting task was first deferred, in seconds; None if it is not indexed."""
        since = self._server.command("ZSCORE", self._keys.breaker(name).deferred, task_id)
        return None if since is None else since / 1000

    def clear_deferred(self, name: str) -> None:
        """Forget all deferred tasks of a breaker, because its deferred queue is known to be empty."""
        keys = self._keys.breaker(name)
        self._server.command("DEL", keys.deferred, keys.deadlines)
        self._drain(name)

    def pace(self, name: str) -> Pace:
        """Return the resume pace of a breaker."""
        return self._server.command("HGETALL", self._keys.pace(name), read=_pace) or Pace()

    def save_pace(self, name: str, pace: Pace) -> None:
        """Keep ``pace``, but for ``outstanding``, which is only moved by the methods below."""
        kept = "batch", "failures_seen", "too_large", "decided_at", "released_at"
        fields = chain.from_iterable((field, getattr(pace, field)) for field in kept)
        self._server.command("HSET", self._keys.pace(name), *fields)

    def resumed(self, name: str, count: int) -> None:
        """Add ``count`` to the resumed tasks that no worker has taken up yet; below 0 they do not fall."""
        key = self._keys.pace(name)
        outstanding = self._server.command("HINCRBY", key, "outstanding", count)
        if outstanding is not None and outstanding < 0:
            self._server.command("HINCRBY", key, "outstanding", -outstanding)

    def taken_up(self, name: str, count: int) -> None:
        """Take ``count`` off them again."""
        self.resumed(name, -count)

    def revoke(self, names: Iterable[str]) -> None:
        """Remember what was revoked now, tasks by id and stamps by name: seven days, the latest 50,000 of them."""
        now, key = self._server.now(), self._keys.revoked
        for some in portions(names):
            self._server.commands([
                ("ZADD", key, *chain.from_iterable((now, name) for name in some)),
                ("ZREMRANGEBYSCORE", key, "-inf", now - to_ms(REVOKED_FOR)),
                ("ZREMRANGEBYRANK", key, 0, -1 - MOST_REVOKED),
            ])  # fmt: skip

    def revoked(self, names: Sequence[str]) -> dict[str, float]:
        """Return those of ``names`` that were revoked, with the time of the latest revoke, in seconds."""
        asked = portions(names)
        found = self._server.commands([("ZMSCORE", self._keys.revoked, *some) for some in asked])
        scores = chain.from_iterable(each or [None] * len(some) for each, some in zip(found, asked, strict=True))
        return {name: float(at) / 1000 for name, at in zip(names, scores, strict=True) if at is not None}

    # --- coalescing ---------------------------------------------------------------------------------

    def claim(self, digest: str, task_id: str) -> None:
        """Note the latest of the deferred tasks that are coalesced under a digest."""
        self._server.command("SET", self._keys.claim(digest), task_id, "PX", to_ms(CLAIMED_FOR))

    def claims(self, digests: Iterable[str]) -> dict[str, str]:
        """Return the latest task of each digest, as far as it is known."""
        wanted = list(digests)
        found = self._server.commands([("GET", self._keys.claim(digest)) for digest in wanted])
        return {digest: task_id.decode() for digest, task_id in zip(wanted, found, strict=True) if task_id is not None}

    def withdraw(self, digest: str, task_id: str, *, keep_for: float = 0.0) -> None:
        """Give a claim back, if it is still the task's; ``keep_for``: not before so many seconds have passed."""
        self._server.script("withdraw", [self._keys.claim(digest)], task_id, to_ms(keep_for))

    # --- the tick -----------------------------------------------------------------------------------

    @contextmanager
    def tick_lease(self, holder: str, *, ttl: float, scope: str = "") -> Iterator[bool]:
        """Hold the one tick lease of ``scope`` while in the context; False when another worker has it."""
        token = f"{holder}:{uuid.uuid4().hex}"
        held = bool(self._server.script("tick", [self._keys.tick(scope)], token, to_ms(ttl)))
        try:
            yield held
        finally:
            if held:
                with suppress(StoreError):  # then it runs out by itself
                    self._server.script("tick", [self._keys.tick(scope)], token, 0)

    def tick_completed(self, scope: str = "") -> None:
        """Note that a tick has run to its end."""
        self._note_tick(scope, "completed")

    def tick_sender_seen(self, scope: str = "") -> None:
        """Note that the sender of ticks, beat as a rule, is alive."""
        self._note_tick(scope, "sender_seen")

    def last_tick_age(self, scope: str = "") -> float | None:
        """Seconds since a tick last ran to its end; None if never."""
        return self._tick_age(scope, "completed")

    def tick_sender_age(self, scope: str = "") -> float | None:
        """Seconds since the sender of ticks was last seen alive; None if never."""
        return self._tick_age(scope, "sender_seen")

    def _note_tick(self, scope: str, what: str) -> None:
        self._server.command("HSET", self._keys.tick(scope), what, self._server.now())

    def _tick_age(self, scope: str, what: str) -> float | None:
        noted = self._server.command("HGET", self._keys.tick(scope), what, read=_number)
        age = None if noted is None else (self._server.now() - noted) / 1000
        return age if age is None or age >= -_SKEW else None  # noted on a clock that was ahead

    # --- who is who ---------------------------------------------------------------------------------

    def declare(self, names: Iterable[str]) -> None:
        """Note that a living worker defines these breakers."""
        now = self._server.now()
        for some in portions(names):
            self._server.command("ZADD", self._keys.breakers, *chain.from_iterable((now, name) for name in some))

    def attend(self, worker: str, queues: Iterable[str] = ()) -> None:
        """Note that a worker is alive, and which queues it consumes."""
        noted = (self._keys.workers, worker), *((self._keys.consumed, queue) for queue in queues)
        now = self._server.now()
        self._server.commands([("ZADD", key, now, name) for key, name in noted])

    def workers(self) -> int:
        """Return the number of workers that have attended within the last half minute."""
        return len(self._attended(self._keys.workers))

    def consumed_queues(self) -> set[str]:
        """Return the queues that those workers consume."""
        return {name.decode() for name in self._attended(self._keys.consumed)}

    def _attended(self, key: str) -> Sequence[bytes]:
        absent = self._server.now() - to_ms(LONGEST_ABSENCE)
        [_, names] = self._server.commands([("ZREMRANGEBYSCORE", key, "-inf", absent), ("ZRANGE", key, 0, -1)])
        return names or ()

    def abandoned(self, *, unseen_for: float) -> list[str]:
        """Return breakers that workers used to define and none has declared for so many seconds."""
        seen_before = self._server.now() - to_ms(unseen_for)
        found = self._server.command("ZRANGEBYSCORE", self._keys.breakers, "-inf", seen_before)
        return [name.decode() for name in found or ()]

    def retire(self, names: Iterable[str]) -> None:
        """Forget that breakers were ever declared."""
        self._server.commands([("ZREM", self._keys.breakers, name) for name in names])

    # --- memory ---------------------------------------------------------------------------------------

    def memory(self) -> Memory | None:
        """Return how much memory the server uses, in a cluster the fullest; None if it does not say."""
        memories = map(Memory.read, self._server.infos("memory"))
        return max((memory for memory in memories if memory), default=None)

    def server_info(self) -> tuple[dict[str, Any], object]:
        """Return the server's INFO, in a cluster one node's, and its setting ``save``; None if that is not shown."""
        saves = None
        with suppress(StoreError):  # managed servers keep their settings to themselves
            saves = self._server.run(lambda client: client.config_get("save").get("save"))
        return self._server.infos("default")[0], saves


def _number(text: bytes | None) -> int | None:
    return None if text is None else int(text)


def _pace(fields: Mapping[bytes, bytes]) -> Pace:
    numbers = {name.decode(): float(value) for name, value in fields.items()}
    times = decided_at, released_at = numbers.pop("decided_at", 0.0), numbers.pop("released_at", 0.0)
    counts = {name: int(value) for name, value in numbers.items()}
    pace = Pace(**counts, decided_at=decided_at, released_at=released_at)
    if not (pace.batch >= 0 and pace.outstanding >= 0 and all(map(math.isfinite, times))):
        raise ValueError(fields)
    return pace
