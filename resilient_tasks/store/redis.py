"""``RedisStore``: the breakers of a whole fleet, in one Redis or Valkey server or cluster.

Each decision is one Lua script (``store/lua``), so it is atomic, made once, and on the server's
clock. Here is only what surrounds them: arguments in, answers out.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from typing import Any, TypeVar

import redis
from redis.client import PubSub

from resilient_tasks.core.children import IDLE_AFTER
from resilient_tasks.core.model import Answer, Grant, Outcome, Snapshot, State, Transition, Verb
from resilient_tasks.core.names import key_of
from resilient_tasks.core.record import brief, to_ms, to_seconds
from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.history import History
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.ledger import Ledger
from resilient_tasks.store.scripts import Scripts
from resilient_tasks.store.server import UNREADABLE, Argument, Server, is_unreadable, portions

T = TypeVar("T")

logger = logging.getLogger("resilient_tasks")


class RedisStore:
    """A store on a server that many processes share; safe to use from several threads, and after a fork.

    Args:
        url: as in :mod:`resilient_tasks.store.address`.
        namespace: what keeps the keys of several applications on one server apart.
        timeout: longest wait in seconds for a connection, and for a reply.
        cooldown: seconds for which a server that did not answer is tried by one caller only.
        clock: Lua text that defines ``now_ms()``, for tests that advance the time; ``None``: the server's.
        client_options: more arguments for redis-py's connections, e.g. ``ssl_ca_certs``.

    Attributes:
        ledger: what workers must know in common beside the breakers' states.
        history: what has become of the breakers so far.

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
        self._server = Server(url, timeout=timeout, cooldown=cooldown, **client_options)
        self._scripts = Scripts(self._server, clock)
        self.history = History(self._server, self._keys, self._scripts)
        self.ledger = Ledger(self._server, self._keys, self._scripts, self.history.drain)

    def __repr__(self) -> str:
        return f"RedisStore({self._server.address!r}, namespace={self._keys.namespace!r})"

    def ping(self) -> float:
        """Return the server's time in seconds, which shows that it speaks Redis and runs scripts.

        Raises:
            StoreError: it does not, or it is away.
        """
        try:
            return int(self._scripts.run("time", [])) / 1000
        except StoreError as error:
            answered = isinstance(error.__cause__, redis.ResponseError)
            needed = (
                "it must run Lua scripts (EVAL, EVALSHA, TIME)" if answered else "it must be a Redis or Valkey server"
            )
            raise StoreError(f"{error}; {needed}") from error.__cause__

    def check(self) -> None:
        """Find a server that is no Redis, or none of the kind that the URL says; see :meth:`Store.check`."""
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
        channel = self._keys.changes
        try:
            self._server.run(lambda client: client.publish(channel, ""))  # subscribers read nothing in it
        except StoreError as error:
            if isinstance(error.__cause__, redis.exceptions.NoPermissionError):
                what = "the store's user may not use the channel %s: changes are found by polling (docs/permissions.md)"
                logger.warning(what, channel)

    # --- decisions --------------------------------------------------------------------------------

    def read(self, specs: Sequence[Spec]) -> list[Snapshot]:
        """Read breakers in one round trip, changing nothing. A breaker never seen before is CLOSED."""
        return [
            snapshot
            for some in portions(specs)
            for snapshot in self._readable([spec.name for spec in some], partial(self._look, some))
        ]

    def _look(self, specs: Sequence[Spec]) -> list[Snapshot]:
        calls = [(self._keys.breaker(spec.name), self._common(spec, 0.0)) for spec in specs]
        return [_snapshot(json.loads(reply)["snapshot"]) for reply in self._scripts.run_each("read", calls)]

    def acquire(self, spec: Spec, holder: str, *, lease: float, jitter: float = 0.0) -> Grant:
        """Ask to make one call; see :meth:`Store.acquire`."""
        reply = self._decide("acquire", spec, jitter, holder, to_ms(lease), "", 0, 1)
        return Grant(reply["admitted"], reply["trial"], reply["snapshot"], reply["transition"])

    def renew(self, name: str, holders: Sequence[str], *, lease: float) -> list[bool]:
        """Lengthen live permits and slots to ``lease`` seconds from now. False: it is no longer held."""
        keys = self._keys.breaker(name)
        renewed = self._scripts.run("renew", [keys.trials, keys.stragglers, keys.slots], to_ms(lease), *holders)
        return [bool(one) for one in renewed]

    def record(self, spec: Spec, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count outcomes of calls that needed no permit; open the breaker if that trips it."""
        return _answer(self._decide("record", spec, jitter, _evidence(evidence)))

    def settle(self, spec: Spec, holder: str, outcome: Outcome, evidence: Evidence, *, jitter: float = 0.0) -> Answer:
        """Count the outcome of a call, and free its permit and its slot. Without either it changes nothing."""
        told = holder, outcome.value, _evidence(evidence)
        return _answer(self._decide("settle", spec, jitter, *told))

    def advance(self, spec: Spec, *, jitter: float = 0.0) -> Answer:
        """Do what time has made due: expired permits become failures, OPEN becomes HALF_OPEN."""
        return _answer(self._decide("advance", spec, jitter))

    def command(self, spec: Spec, verb: Verb, *, reason: str = "", actor: str = "", jitter: float = 0.0) -> Answer:
        """Carry out an operator's verb. A verb that leads to the present state makes no transition."""
        told = verb.value, brief(reason), brief(actor)
        return _answer(self._decide("command", spec, jitter, *told))

    # --- children -------------------------------------------------------------------------------

    def enroll(self, spec: Spec) -> bool:
        """Return whether there is room for a child; see :meth:`Store.enroll`."""
        keys, told = self._keys.breaker(spec.name), (key_of(spec.name), spec.policy.max_keys, IDLE_AFTER)
        return bool(self._scripts.run("enroll", [keys.children, keys.hot], *told))

    def children(self, name: str, *, start: int = 0, count: int | None = None) -> list[str]:
        """Return the names of the children of a breaker; see :meth:`Store.children`."""
        index, end = self._keys.breaker(name).children, -1 if count is None else start + count - 1
        keys: list[Any] = self._server.run(lambda client: client.zrange(index, start, end))
        return [f"{name}:{key.decode()}" for key in keys]

    def cool(self, spec: Spec) -> bool:
        """Take a child off the hot ones; see :meth:`Store.cool`."""
        is_cool = bool(self._scripts.run("cool", self._keys.breaker(spec.name), *self._common(spec, 0.0)))
        if is_cool:
            self.history.close(spec.name)  # its state may have ended by itself
        return is_cool

    # --- health checks ------------------------------------------------------------------------------

    def begin_health_check(self, spec: Spec, *, since: float) -> bool:
        """Return whether it is the caller who makes a health check; False if somebody has begun one since."""
        keys = self._keys.breaker(spec.name)
        return bool(self._scripts.run("begin_health_check", keys, *self._common(spec, 0.0), to_ms(since)))

    def report_health_check(
        self, spec: Spec, outcome: Outcome, evidence: Evidence, *, limit: int, jitter: float = 0.0
    ) -> Answer:
        """Count a health check made while CLOSED or SHADOW; ``limit`` failures in a row open the breaker."""
        told = outcome.value, limit, _evidence(evidence)
        return _answer(self._decide("report_health_check", spec, jitter, *told))

    # --- small values -------------------------------------------------------------------------------

    def put(self, kind: str, key: str, value: bytes, *, ttl: float) -> None:
        """Keep a value for ``ttl`` seconds under ``(kind, key)``, with the time of writing."""
        self._scripts.run("put", [self._keys.value(kind, key)], value, to_ms(ttl))

    def get(self, kind: str, key: str) -> tuple[bytes, float] | None:
        """Return ``(value, age in seconds)``, or None."""
        reply = self._scripts.run("get", [self._keys.value(kind, key)])
        return reply and (reply[0], reply[1] / 1000)

    # --- changes --------------------------------------------------------------------------------------

    def changes(self, *, timeout: float) -> Iterator[Snapshot | None]:
        """Yield None as soon as it listens, then states as they change; None after ``timeout`` s of silence.

        Whoever reads all breakers at the first None misses nothing in between.
        """
        with closing(self._server.run(self._subscribe)) as subscription:
            yield None
            while True:
                with self._server.errors_translated(remember=False):
                    message = subscription.get_message(ignore_subscribe_messages=True, timeout=timeout)
                yield message and _published(message["data"])

    def close(self) -> None:
        """Close connections. The store may be used again and reconnects."""
        self._server.close()

    # --- inside ---------------------------------------------------------------------------------------

    def _decide(self, script: str, spec: Spec, jitter: float, *args: Argument) -> dict[str, Any]:
        def decide() -> dict[str, Any]:
            reply = json.loads(
                self._scripts.run(script, self._keys.breaker(spec.name), *self._common(spec, jitter), *args)
            )
            return {**reply, "snapshot": _snapshot(reply["snapshot"]), "transition": _transition(reply)}

        reply = self._readable([spec.name], decide)
        if reply["transition"] is not None:
            with suppress(StoreError):  # the transition has been made
                self.history.follow(reply["transition"], spec.policy.window)
        return reply

    def _readable(self, names: Iterable[str], ask: Callable[[], T]) -> T:
        """Return what ``ask`` finds; where a script or a reader fails on what is kept, that is deleted first."""
        try:
            return ask()
        except StoreError as error:
            if not is_unreadable(error.__cause__):
                raise
            trouble: Exception = error
        except UNREADABLE as error:
            trouble = error
        for name in names:
            keys = self._keys.breaker(name)
            self._server.discard([keys.state, keys.window, keys.trials, keys.stragglers, keys.slots], trouble)
            self.history.close(name)
        return ask()

    def _common(self, spec: Spec, jitter: float) -> tuple[Argument, ...]:
        rules = json.dumps(spec.rules()._asdict())
        return (spec.name, self._keys.changes, rules, jitter)

    def _subscribe(self, client: redis.Redis) -> PubSub:
        subscription: PubSub = client.pubsub()  # type: ignore[no-untyped-call]
        try:
            subscription.subscribe(self._keys.changes)
            subscription.parse_response()  # type: ignore[no-untyped-call] # the confirmation: nothing is missed from here
        except BaseException:
            subscription.close()
            raise
        return subscription


def _answer(reply: dict[str, Any]) -> Answer:
    return Answer(reply["snapshot"], reply["transition"])


def _evidence(evidence: Evidence) -> str:
    fields: dict[str, Any] = {
        "epoch": evidence.epoch,
        "runs": [[c.outcome.value, c.number, c.voter, False, c.each] for c in evidence.runs],
        "cause": brief(evidence.cause),
        "causes": {brief(cause): count for cause, count in evidence.causes},
    }
    if evidence.retry_after is not None:
        fields["retry_after"] = to_ms(evidence.retry_after)
    return json.dumps(fields)


_TIMES = (
    "now",
    "since",
    "open_until",
    "last_success_at",
    "ramp_since",
    "oldest_deferred_at",
    "next_deadline_at",
    "checked_at",
)


_OLD = ("local_failures", "crowded", "shadow_openings")


def _snapshot(fields: dict[str, Any]) -> Snapshot:
    times = {name: to_seconds(fields[name]) for name in _TIMES if name in fields}
    openings = len(fields["shadow_openings"])
    hot = tuple(fields.get("hot_children", ()))
    fields = {name: value for name, value in fields.items() if name not in _OLD}
    others = {"state": State(fields["state"]), "would_have_opened": openings, "hot_children": hot}
    return Snapshot(**{**fields, **times, **others})


def _transition(reply: dict[str, Any]) -> Transition | None:
    fields = reply.get("transition")
    states = {name: State(fields[name]) for name in ("previous", "state")} if fields else {}
    return fields and Transition(**{**fields, **states, "at": fields["at"] / 1000})


def _published(data: bytes) -> Snapshot | None:
    """Return the snapshot in a message; None for one that is not ours, which the next read makes up for."""
    try:
        return _snapshot(json.loads(data))
    except (ValueError, KeyError, TypeError):
        return None
