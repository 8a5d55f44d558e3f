"""``Mender``: takes away what the store keeps of a breaker and makes no sense, because somebody has edited it by hand.

One absurd value would otherwise keep every process from reading any breaker. Nobody looks for such values: only when
a script or a reader stumbles, everything is looked through that is kept of the breakers in question.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import redis

from resilient_tasks.core.counts import Counts
from resilient_tasks.core.model import State
from resilient_tasks.core.outage import Outage
from resilient_tasks.core.record import Rules
from resilient_tasks.errors import StoreError
from resilient_tasks.store.history import Minute, texts, transition_of
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.ledger import pace_of
from resilient_tasks.store.server import Server

logger = logging.getLogger(__name__)

T = TypeVar("T")
Fields = dict[str, str]
Mend = Callable[[Any, str, str], Iterator[str]]  # client, key, breaker -> what was taken away

#: What readers raise over values that make no sense.
STUMBLES = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_PAUSE = 1.0  # seconds between two tries to mend
_LONGEST_QUOTE = 100

# fields of a state as in lua/lib/state.lua, by what replaces a value that makes no sense
_NOW = ("epoch", "version", "since")
_ZERO = (
    "first_epoch", "openings", "frozen_calls", "frozen_failures", "frozen_slow", "frozen_proxied", "row",
    "trial_successes", "trial_failures", "total_failures", "would_open", "failed_checks", "crowded_until", "learned",
    "credit", "backed_off",
)  # fmt: skip
_NOTHING = ("open_until", "last_success_at", "ramp_since", "checked_at")
_WITH_DEFAULT = {"minimum_tasks", "most_in_flight", "least_in_flight", "max_open_ratio"}
_DIVISORS = ("window", "open_time", "max_open_time")
_TOO_MUCH = 1e16
_NUMBER = re.compile(r"-?\d{1,15}")
_BUCKET = re.compile(r"\d{1,15}( \d{1,15}){6}( [0-9a-f]{8}[A-Z])*")


class Mender:
    """Keeps values that make no sense from stopping anybody, for one namespace of one server.

    Args:
        server: connection to the shared store.
        keys: names of the namespace's keys.
    """

    def __init__(self, server: Server, keys: Keys) -> None:
        self._server = server
        self._keys = keys
        self._next_at = float("-inf")

    def sound(self, names: Iterable[str], ask: Callable[[], T]) -> T:
        """Return what ``ask`` finds out about some breakers; if it stumbles, they are mended and it is called again.

        Raises:
            StoreError: the store is away, or keeps something of which even then nobody can make anything.
        """
        try:
            return ask()
        except StoreError as error:
            if not _is_stumble(error) or time.monotonic() < self._next_at:
                raise
        except STUMBLES as error:
            logger.debug("what the store keeps makes no sense: %r", error)
        self._next_at = time.monotonic() + _PAUSE
        for name in names:
            self._mend(name)
        try:
            return ask()
        except STUMBLES as error:
            raise StoreError(f"store {self._server.address} keeps what makes no sense: {error!r}") from error

    def _mend(self, name: str) -> None:
        keys = self._keys
        for part, key in {
            **keys.breaker(name)._asdict(),
            "pace": keys.pace(name),
            "tellers": keys.tellers(name),
        }.items():
            for nonsense in self._server.run(partial(_look_through, name=name, part=part, key=key)):
                quoted = nonsense.encode("unicode_escape").decode()[:_LONGEST_QUOTE]
                logger.warning("breaker %s: what %s keeps makes no sense and is gone: %s", name, key, quoted)


def _is_stumble(error: StoreError) -> bool:
    """Whether a script has failed over what it read; a full or a read-only server says so in a class of its own."""
    return type(error.__cause__) is redis.ResponseError


def _look_through(client: Any, name: str, part: str, key: str) -> list[str]:
    """Take away what makes no sense in one key; return it."""
    kind, (wanted, mend) = client.type(key).decode(), _PARTS.get(part, ("zset", _mend_scores))
    if kind == "none":
        return []
    if kind != wanted:
        client.delete(key)
        return [f"a {kind} instead of a {wanted}"]
    return list(mend(client, key, name))


def _mend_state(client: Any, key: str, _: str) -> Iterator[str]:
    fields = texts(client.hgetall(key))
    if fields.get("state") not in set(State):
        client.delete(key)
        yield f"state={fields.get('state')}"
        return
    now = str(client.time()[0] * 1000)
    defaults = {**dict.fromkeys(_NOW, now), **dict.fromkeys(_ZERO, "0"), **dict.fromkeys(_NOTHING, "")}
    if fields["state"] == State.OPEN:
        defaults["open_until"] = now
    for field, default in defaults.items():
        value = fields.get(field, "")
        if value != default and not _NUMBER.fullmatch(value):
            client.hset(key, field, default)
            yield f"{field}={value}"
    for field, read in (("shadow", _read_shadow), ("policy", _read_policy)):
        if field in fields and not _can(read, fields[field]):
            client.hset(key, field, "") if field == "shadow" else client.hdel(key, field)
            yield f"{field}={fields[field]}"


def _read_shadow(text: str) -> None:
    for at, until, calls, row in json.loads(text) if text else ():
        _ = at + until + calls + row


def _read_policy(text: str) -> None:
    rules = json.loads(text)
    Rules(**{**dict.fromkeys(_WITH_DEFAULT, 0), **rules})
    if min(rules[name] for name in _DIVISORS) < 1 or not all(abs(value) < _TOO_MUCH for value in rules.values()):
        raise ValueError(text)


def _read_bucket(slot: str, text: str) -> None:
    if not (_NUMBER.fullmatch(slot) and _BUCKET.fullmatch(text)):
        raise ValueError(text)


def _read_outage(name: str, fields: Fields) -> None:
    Outage.of(name, fields)
    for field in fields.keys() - {"reason", "actor"}:
        _number(fields[field])


def _number(text: str) -> int:
    """Return a number to which a script can add."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    return int(text)


def _whole(read: Callable[[str, Fields], object]) -> Mend:
    """Return what takes a hash away that cannot be read."""

    def mend(client: Any, key: str, name: str) -> Iterator[str]:
        fields = texts(client.hgetall(key))
        if not _can(read, name, fields):
            client.delete(key)
            yield str(fields)

    return mend


def _by_field(read: Callable[[str, str], object]) -> Mend:
    """Return what takes fields away that cannot be read."""

    def mend(client: Any, key: str, _: str) -> Iterator[str]:
        for field, value in texts(client.hgetall(key)).items():
            if not _can(read, field, value):
                client.hdel(key, field)
                yield f"{field}={value}"

    return mend


def _by_entry(read: Callable[[str, Any], object]) -> Mend:
    """Return what takes entries of a list away that cannot be read."""

    def mend(client: Any, key: str, name: str) -> Iterator[str]:
        for entry in client.lrange(key, 0, -1):
            if not _can(lambda text=entry: read(name, json.loads(text))):
                client.lrem(key, 0, entry)
                yield entry.decode(errors="replace")

    return mend


def _mend_scores(client: Any, key: str, _: str) -> Iterator[str]:
    for end in ("-inf", "+inf"):
        if client.zremrangebyscore(key, end, end):
            yield f"a score of {end}"


def _leave(*_: object) -> Iterator[str]:
    return iter(())


def _can(read: Callable[..., object], *args: object) -> bool:
    try:
        read(*args)
    except STUMBLES:
        return False
    return True


_PARTS: dict[str, tuple[str, Mend]] = {
    "state": ("hash", _mend_state),
    "window": ("hash", _by_field(_read_bucket)),
    "minutes": ("hash", _by_field(lambda _, text: Minute.read(text))),
    "totals": ("hash", _by_field(lambda kind, count: Counts.of({kind: _number(count)}))),
    "outage": ("hash", _whole(_read_outage)),
    "outages": ("list", _by_entry(Outage.of)),
    "log": ("list", _by_entry(lambda _, fields: transition_of(fields))),
    "pace": ("hash", _whole(lambda _, fields: pace_of(fields))),
    "children": ("zset", _leave),  # may have an infinite score
    "hot": ("set", _leave),
}
