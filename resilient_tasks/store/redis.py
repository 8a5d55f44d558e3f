"""``RedisStore``: the breakers of a whole fleet, in one Redis or Valkey server or cluster.

Lua scripts (``store/lua``) count, lease, and make a change if the breaker is still as it was seen, atomically and on
the server's clock. What follows from their answers is decided by ``core/rules.py``, as for every store.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain
from typing import Any

import redis
from redis.client import PubSub

from resilient_tasks.core.model import Calls, Outcome, Snapshot, key_of, parent_of
from resilient_tasks.core.rules import OLDEST, Change, Rules, Seen, sums_of, to_ms, weigh
from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.store.base import IDLE_AFTER, RuledStore, Spec
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
        self._newer_rules: dict[str, str] = {}  # than this process declares: what others have declared, by breaker
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
        calls = [(self._keys.breaker(spec.name), (*self._common(spec, *self._rules(spec)), 0)) for spec in specs]
        try:
            replies = self._server.script_each("read", calls)
            return [self._seen(spec, reply).snapshot for spec, reply in zip(specs, replies, strict=True)]
        except StoreError as error:
            if not is_unreadable(error.__cause__):
                raise
        except UNREADABLE:
            pass
        return [self._peek(spec).snapshot for spec in specs]  # finds which it is

    def _peek(self, spec: Spec) -> Seen:
        return self._run("read", spec, lambda _: (0,))

    def _look(self, spec: Spec) -> Seen:
        return self._run("read", spec, lambda _: (1,))

    def _count(self, spec: Spec, epoch: int, runs: Sequence[Calls]) -> Seen:
        def arguments(rules: Rules) -> Iterator[Argument]:
            yield from (epoch, rules.minimum_tasks, *sums_of(runs))
            for weight in chain.from_iterable(weigh(run, rules) for run in runs):
                yield from (*weight[:4], "1" if weight.each else "")

        return self._run("count", spec, arguments)

    def _lease(self, spec: Spec, holder: str, lease: int) -> tuple[Seen, bool]:
        def arguments(rules: Rules) -> tuple[Argument, ...]:
            return holder, lease, rules.trial_calls, rules.least_in_flight, rules.most_in_flight, rules.ramp

        seen = self._run("lease", spec, arguments)
        return seen, seen.done > 0

    def _settle(self, spec: Spec, holder: str, epoch: int, outcome: Outcome) -> tuple[Seen, bool]:
        def arguments(rules: Rules) -> tuple[Argument, ...]:
            trial = rules.worth_as_trial(outcome)
            return holder, epoch, outcome.value, trial, rules.least_in_flight, rules.most_in_flight

        seen = self._run("settle", spec, arguments)
        return seen, seen.done > 0

    def _change(self, spec: Spec, seen: Seen, change: Change) -> tuple[Seen, bool]:
        share = seen.rules.max_open_ratio if change.opens_child and spec.parent else 0.0
        written = chain.from_iterable(change.fields.items())
        arguments = (seen.version, int(change.forgets), share, *written)
        after = self._run("transition", spec, lambda _: arguments)
        if after.done and change.transition is not None:
            with suppress(StoreError):  # the transition has been made
                self.history.follow(change.transition, spec.policy.window)
        return after, after.done > 0

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        keys = self._keys.breaker(name)
        return [bool(one) for one in self._server.script("renew", [keys.trials, keys.slots], to_ms(lease), *holders)]

    # --- children -------------------------------------------------------------------------------

    def register(self, spec: Spec) -> Snapshot | None:
        seen, index, key = self._read([spec])[0], self._keys.breaker(spec.name).children, key_of(spec.name)
        now, idle_at = to_ms(seen.now), to_ms(seen.now) - IDLE_AFTER
        is_new, count = self._server.commands([("ZADD", index, "NX", now, key), ("ZCARD", index)])
        is_full = is_new and count > spec.policy.max_keys
        if is_full and not self._server.command("ZREMRANGEBYSCORE", index, "-inf", idle_at):
            self._server.command("ZREM", index, key)
            return None
        return seen

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        index, end = self._keys.breaker(name).children, -1 if count is None else start + count - 1
        keys = self._server.command("ZRANGE", index, start, end) or ()
        return [f"{name}:{key.decode()}" for key in keys]

    def active_children(self, name: str, *, start: int = 0, count: int = 500) -> list[str]:
        keys = self._server.command("ZRANGE", self._keys.breaker(name).active, start, start + count - 1) or ()
        return [f"{name}:{key.decode()}" for key in keys]

    def mark_idle(self, spec: Spec) -> bool:
        index, key = self._keys.breaker(spec.name).active, key_of(spec.name)
        if not self._peek(spec).is_plain:
            return False
        self._server.command("ZREM", index, key)
        seen = self._peek(spec)
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

    def _run(self, script: str, spec: Spec, arguments: Callable[[Rules], Iterable[Argument]]) -> _Answer:
        """Run a script with arguments that follow from the rules; what cannot be read is deleted: it is CLOSED then."""
        try:
            return self._ask(script, spec, arguments)
        except StoreError as error:
            if not is_unreadable(error.__cause__):
                raise
            trouble: Exception = error
        except UNREADABLE as error:
            trouble = error
        keys = self._keys.breaker(spec.name)
        self._server.discard([keys.state, keys.failures, keys.slow, keys.trials, keys.slots], trouble)
        self.history.close(spec.name)
        return self._ask(script, spec, arguments)

    def _ask(self, script: str, spec: Spec, arguments: Callable[[Rules], Iterable[Argument]]) -> _Answer:
        keys = self._keys.breaker(spec.name)
        while True:
            rules, text = self._rules(spec)
            reply = self._server.script(script, keys, *self._common(spec, rules, text), *arguments(rules))
            answer = self._seen(spec, reply)
            if answer.done >= 0:
                return answer

    def _rules(self, spec: Spec) -> tuple[Rules, str]:
        """Return the newest rules that this process knows, and how they are kept."""
        own, newer = spec.rules(), self._newer_rules.get(parent_of(spec.name) or spec.name)
        rules = own.or_newer(newer)
        return rules, own.text() if rules == own or newer is None else newer

    def _common(self, spec: Spec, rules: Rules, text: str) -> tuple[Argument, ...]:
        numbers = rules.revision, rules.window, rules.max_open_time
        return text, key_of(spec.name), self._channel, spec.name, *numbers

    def _seen(self, spec: Spec, reply: str | bytes) -> _Answer:
        rules, _ = self._rules(spec)
        answer = _read_answer(spec.name, rules, reply)
        if answer.rules != rules and answer.kept_rules:
            self._newer_rules[parent_of(spec.name) or spec.name] = answer.kept_rules
        return answer

    def _subscribe(self, client: redis.Redis) -> PubSub:
        subscription: PubSub = client.pubsub()  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(self._channel)
            subscription.parse_response()  # type: ignore[no-untyped-call] # the confirmation: nothing is missed from here
        except BaseException:
            subscription.close()
            raise
        return subscription


_ANY = Spec("", revision=OLDEST).rules()  # whatever rules are kept are newer


class _Answer(Seen):
    """A breaker as a script has answered."""

    done = 0
    kept_rules: str | None = None  # None: those that were sent


def _read_answer(name: str, rules: Rules, reply: str | bytes) -> _Answer:
    """Return what a script has answered; see ``lua/lib/breaker.lua``."""
    text = reply.decode(errors="surrogateescape") if isinstance(reply, bytes) else reply
    now, fields, permits, in_flight, deferred, oldest, deadline, active, done = json.loads(text)
    trials = dict(zip(permits[::2], [int(float(end)) for end in permits[1::2]], strict=True)) if permits else {}
    waiting = int(in_flight), int(deferred), _instant(oldest), _instant(deadline)
    kept = fields.get("rules")
    answer = _Answer(name, int(now), rules.or_newer(kept), {**fields, "active_children": active}, trials, waiting)
    answer.done, answer.kept_rules = int(done), kept
    _ = answer.snapshot  # reads all of it, while what cannot be read is caught
    return answer


def _value(kept: Sequence[bytes | None]) -> tuple[bytes, int, int] | None:
    value, at, until = kept
    return None if value is None else (value, int(at or b""), int(until or b""))


def _instant(score: Any) -> int | None:
    return int(float(score)) if score else None


def _published(data: bytes) -> Snapshot | None:
    """Return the snapshot in a message; None for one that is not ours, which the next read makes up for."""
    try:
        name, _, reply = data.decode(errors="surrogateescape").partition("\n")
        return _read_answer(name, _ANY, reply).snapshot
    except (ValueError, KeyError, TypeError):
        return None
