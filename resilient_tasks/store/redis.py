"""``RedisStore``: the breakers of a whole fleet, in one Redis or Valkey server or cluster.

Lua scripts (``store/lua``) count, lease, and make a change if the breaker is still as it was seen, atomically and on
the server's clock. What follows from their answers is decided by ``core/rules.py``, as for every store.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import redis
from redis.client import PubSub

from resilient_tasks.core.model import Calls, Outcome, Snapshot, key_of
from resilient_tasks.core.rules import KINDS, OLDEST, PARTS, Change, Seen, to_ms
from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.store.base import RuledStore, Spec
from resilient_tasks.store.history import History
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.store.server import UNREADABLE, Argument, Server, is_unreadable, portions

logger = logging.getLogger("resilient_tasks")


class RedisStore(RuledStore):
    """A store on a server that many processes share; safe to use from several threads, and after a fork.

    Args:
        url: as in :mod:`resilient_tasks.store.address`.
        namespace: what keeps the keys of several applications on one server apart.
        timeout: longest wait in seconds for a connection, and for a reply.
        cooldown: seconds for which a server that did not answer is tried by one caller only.
        clock: Lua text that defines ``now_ms()``, for tests that advance the time; ``None``: the server's.
        client_options: more arguments for redis-py's connections, e.g. ``ssl_ca_certs``.

    Raises:
        ConfigurationError: the URL, an option or the namespace is of no use. No connection is made.
    """

    def __init__(
        self,
        url: str,
        *,
        namespace: str,
        timeout: float = 0.5,
        cooldown: float = 1.0,
        clock: str | None = None,
        **client_options: Any,
    ) -> None:
        self._keys = Keys(namespace)
        self._server = Server(url, timeout=timeout, cooldown=cooldown, clock=clock, **client_options)
        self._channel = self._keys.changes(self._server.database)
        self.history = History(self._server, self._keys)
        self.ledger = Ledger(self._server, self._keys, self.history.drain)

    def __repr__(self) -> str:
        return f"RedisStore({self._server.address!r}, namespace={self._keys.namespace!r})"

    def ping(self) -> float:
        """Return the server's time in seconds, which shows that it speaks Redis and runs scripts."""
        try:
            return self._server.now() / 1000
        except StoreError as error:
            answered = isinstance(error.__cause__, redis.ResponseError)
            needed = (
                "it must run Lua scripts (EVAL, EVALSHA, TIME)" if answered else "it must be a Redis or Valkey server"
            )
            raise StoreError(f"{error}; {needed}") from error.__cause__

    def check(self) -> None:
        try:
            self.ping()
            self._server.check_kind()
        except StoreError as error:
            no_cluster = "Cluster mode is not enabled" in str(error)
            if no_cluster or isinstance(error.__cause__, redis.InvalidResponse):
                raise ConfigurationError(str(error)) from None
        else:
            self._check_channel()

    def _check_channel(self) -> None:
        try:
            self._server.run(lambda client: client.publish(self._channel, ""))  # subscribers read nothing in it
        except StoreError as error:
            if isinstance(error.__cause__, redis.exceptions.NoPermissionError):
                what = "the store's user may not use the channel %s: changes are found by polling (docs/permissions.md)"
                logger.warning(what, self._channel)

    # --- primitives -------------------------------------------------------------------------------

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        return [snapshot for some in portions(specs) for snapshot in self._read(some)]

    def _read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        calls = [(self._keys.breaker(spec.name), (*self._common(spec), 0)) for spec in specs]
        try:
            replies = self._server.script_each("read", calls)
            return [_seen(spec, reply).snapshot() for spec, reply in zip(specs, replies, strict=True)]
        except StoreError as error:
            if not is_unreadable(error.__cause__):
                raise
        except UNREADABLE:
            pass
        return [self._run("read", spec, 0).snapshot() for spec in specs]  # finds which it is

    def _look(self, spec: Spec) -> Seen:
        return self._run("read", spec, 1)

    def _count(self, spec: Spec, epoch: int, runs: Sequence[Calls], check: tuple[Outcome, int] | None = None) -> Seen:
        checked = ("", 0) if check is None else (check[0].value, check[1])
        flat = [part for run in runs for part in (*run[:3], "1" if run.each else "", "1" if run.was_overdue else "")]
        return self._run("count", spec, epoch, *checked, *flat)

    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        seen = self._run("lease", spec, holder, lease)
        return seen, seen.done > 0

    def _settle(self, spec: Spec, holder: str, epoch: int, outcome: Outcome) -> tuple[Seen, bool]:
        seen = self._run("settle", spec, holder, epoch, outcome.value)
        return seen, seen.done > 0

    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        share = seen.rules.max_open_ratio if change.opens_child and spec.parent else 0.0
        written = [part for item in _packed(change.fields).items() for part in item]
        after = self._run("transition", spec, seen.version, int(change.forgets), share, *written)
        if after.done and change.transition is not None:
            with suppress(StoreError):  # the transition has been made
                self.history.follow(change.transition, spec.policy.window)
        return after, after.done > 0

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        keys = self._keys.breaker(name)
        return [bool(one) for one in self._server.script("renew", [keys.trials, keys.slots], to_ms(lease), *holders)]

    # --- children -------------------------------------------------------------------------------

    def register(self, spec: Spec) -> Snapshot | None:
        seen = self._run("read", spec, 0, spec.policy.max_keys)
        return seen.snapshot() if seen.done else None

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        index, end = self._keys.breaker(name).children, -1 if count is None else start + count - 1
        keys = self._server.command("ZRANGE", index, start, end) or ()
        return [f"{name}:{key.decode()}" for key in keys]

    def active_children(self, name: str, *, start: int = 0, count: int = 500) -> list[str]:
        keys = self._server.command("ZRANGE", self._keys.breaker(name).active, start, start + count - 1) or ()
        return [f"{name}:{key.decode()}" for key in keys]

    def mark_idle(self, spec: Spec) -> bool:
        index, key = self._keys.breaker(spec.name).active, key_of(spec.name)
        if not self._run("read", spec, 0).is_plain:
            return False
        self._server.command("ZREM", index, key)
        seen = self._run("read", spec, 0)
        if not seen.is_plain:  # something has happened in between
            self._server.command("ZADD", index, seen.now, key)
            return False
        self.history.close(spec.name)  # its state may have ended by itself
        return True

    # --- small values -------------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        entry, now, kept_for = self._keys.value(kind, key), self._server.now(), to_ms(ttl)
        # ``until`` decides when it ends; the key's expiry only tidies up
        written = ("HSET", entry, "value", value, "at", now, "until", now + kept_for)
        self._server.commands([written, ("PEXPIRE", entry, kept_for)])

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        entry = self._keys.value(kind, key)
        kept: tuple[bytes, int, int] | None = self._server.command("HMGET", entry, "value", "at", "until", read=_value)
        now = self._server.now() if kept else 0
        return (kept[0], (now - kept[1]) / 1000) if kept and now < kept[2] else None

    # --- changes --------------------------------------------------------------------------------------

    def changed(self, since: float) -> dict[str, float]:
        flat = self._server.command("ZRANGEBYSCORE", self._keys.changed, to_ms(since), "+inf", "WITHSCORES") or ()
        return {name.decode(): float(at) / 1000 for name, at in zip(flat[::2], flat[1::2], strict=True)}

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        with closing(self._server.run(self._subscribe)) as subscription:
            yield None
            while True:
                with self._server.errors_translated(remember=False):
                    message = subscription.get_message(ignore_subscribe_messages=True, timeout=timeout)
                yield message and _published(message["data"])

    def close(self) -> None:
        self._server.close()

    # --- inside ---------------------------------------------------------------------------------------

    def _run(self, script: str, spec: Spec, *args: Argument) -> _Answer:
        """Run a script; what is kept and cannot be read is deleted, and the breaker is CLOSED."""
        keys = self._keys.breaker(spec.name)
        try:
            return _seen(spec, self._server.script(script, keys, *self._common(spec), *args))
        except StoreError as error:
            if not is_unreadable(error.__cause__):
                raise
            trouble: Exception = error
        except UNREADABLE as error:
            trouble = error
        self._server.discard([keys.state, keys.failures, keys.slow, keys.trials, keys.slots], trouble)
        self.history.close(spec.name)
        return _seen(spec, self._server.script(script, keys, *self._common(spec), *args))

    def _common(self, spec: Spec) -> tuple[Argument, ...]:
        rules = spec.rules()
        return (rules.text(), key_of(spec.name), self._channel, spec.name, *rules.numbers())

    def _subscribe(self, client: redis.Redis) -> PubSub:
        subscription: PubSub = client.pubsub()  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(self._channel)
            subscription.parse_response()  # type: ignore[no-untyped-call] # the confirmation: nothing is missed from here
        except BaseException:
            subscription.close()
            raise
        return subscription


_ANY = Spec("", revision=OLDEST)  # whatever rules are kept are newer
_TEXTS = frozenset({"state", "reason", "actor", "rules"})  # the other fields are numbers
_NUMBERS = re.compile(r"(-?\d{1,18}( \d{1,18})*)?")


class _Answer(Seen):
    """A breaker as a script has answered."""

    done = 0


def _seen(spec: Spec, reply: str | bytes) -> _Answer:
    """Return what a script has answered; see ``lua/lib/breaker.lua``."""
    text = reply.decode(errors="surrogateescape") if isinstance(reply, bytes) else reply
    now, fields, permits, in_flight, deferred, oldest, deadline, active, done = json.loads(text)
    for name, value in fields.items():
        if name not in _TEXTS and not _NUMBERS.fullmatch(value):
            raise ValueError(f"{name}={value}")
    for kind in KINDS:
        fields.update(zip([f"{kind}_{part}" for part in PARTS], fields.pop(kind, "").split(), strict=False))
    trials = dict(zip(permits[::2], [int(float(end)) for end in permits[1::2]], strict=True)) if permits else {}
    waiting = int(in_flight), int(deferred), _instant(oldest), _instant(deadline)
    rules = spec.rules().or_newer(fields.get("rules"))
    answer = _Answer(spec.name, int(now), rules, {**fields, "active_children": active}, trials, waiting)
    answer.done = int(done)
    return answer


def _packed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with the parts of each score in one, as the scripts keep them."""
    packed = dict(fields)
    for kind in KINDS:
        if f"{kind}_score" in packed:
            packed[kind] = " ".join(str(packed.pop(f"{kind}_{part}")) for part in PARTS)
    return packed


def _value(kept: Sequence[bytes | None]) -> tuple[bytes, int, int] | None:
    value, at, until = kept
    return None if value is None else (value, int(at or b""), int(until or b""))


def _instant(score: Any) -> int | None:
    return int(float(score)) if score else None


def _published(data: bytes) -> Snapshot | None:
    """Return the snapshot in a message; None for one that is not ours, which the next read makes up for."""
    try:
        name, _, reply = data.decode(errors="surrogateescape").partition("\n")
        return _seen(replace(_ANY, name=name), reply).snapshot()
    except (ValueError, KeyError, TypeError):
        return None
