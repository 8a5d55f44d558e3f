"""Names of everything that the library keeps in Redis, and what may be part of such a name.

All keys of one breaker and its children share a hash tag, so that one script may touch them together.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import NamedTuple

from resilient_tasks.core.model import key_of, parent_of
from resilient_tasks.errors import ConfigurationError

SCHEMA = 2  # of breakers' states, logs and counts; older releases kept them without a number
CHANGES_KEPT_FOR = 60  # seconds
_LONGEST_NAME = 200
_REMEMBERED = 1_000  # names: each is asked for with every call of a store; the keys of one take 2 KB


@lru_cache(_REMEMBERED)
def may_be_in_a_key(name: str) -> bool:
    """Whether ``name`` can be a part of keys: braces mark the hash tag."""
    readable = 0 < len(name) <= _LONGEST_NAME and name.isprintable() and name == name.strip()
    return readable and not set("{}") & set(name)


def check_key_part(kind: str, name: str) -> str:
    """Return ``name`` if it can be a part of keys; else raise ``ConfigurationError`` that calls it a ``kind``."""
    if may_be_in_a_key(name):
        return name
    allowed = f"1 to {_LONGEST_NAME} printable characters, no braces, no space at either end"
    raise ConfigurationError(f"{kind} name {name!r}: allowed is {allowed}")


class BreakerKeys(NamedTuple):
    """Keys of one breaker, in the order in which ``lua/breaker.lua`` expects them; there it says what they hold."""

    state: str
    failures: str
    slow: str
    deferred: str
    deadlines: str
    trials: str
    slots: str
    children: str  # of the breaker, or of its parent if it is a child
    active: str
    former: str


class Keys:
    """Builds every key of one namespace."""

    def __init__(self, namespace: str) -> None:
        self.namespace = check_key_part("namespace", namespace)
        self.breakers = f"{namespace}:breakers"  # sorted set: name -> last declared by a worker, ms
        self.changed = f"{namespace}:{SCHEMA}:changed"  # sorted set: name -> last change, ms; of the last minute
        self.workers = f"{namespace}:workers"  # sorted set: worker -> when it last attended, ms
        self.consumed = f"{namespace}:consumed"  # sorted set: queue -> when a worker that consumes it last attended, ms
        self.revoked = f"{namespace}:revoked"  # sorted set: task id or stamp -> revoked at, ms
        self._cached = lru_cache(_REMEMBERED)(self._build)

    def breaker(self, name: str) -> BreakerKeys:
        """Return the keys of a breaker; raise ``ConfigurationError`` if the name cannot be part of one."""
        return self._cached(name)

    def _build(self, name: str) -> BreakerKeys:
        own = {part: self.schema_2(name, part) for part in ("state", "failures", "slow", "trials", "slots")}
        parent = parent_of(name) or name
        return BreakerKeys(
            **own,
            # without a schema number: releases before and after it share the deferred queues
            deferred=self._of_breaker(name, "deferred"),
            deadlines=self._of_breaker(name, "deadlines"),
            children=self.schema_2(parent, "children"),
            active=self.schema_2(parent, "active"),
            former=self._of_breaker(name, "state"),
        )

    def note_change(self, name: str, now: float) -> list[tuple[str | float, ...]]:
        """Return the commands that note that a breaker was changed ``now``, ms, and forget those of a minute ago."""
        noted = ("ZADD", self.changed, "GT", now, name)
        return [noted, ("ZREMRANGEBYSCORE", self.changed, "-inf", now - 1000 * CHANGES_KEPT_FOR)]

    def log(self, name: str) -> str:
        """Return the list of a breaker's transitions as JSON, the newest first; ``History.follow`` appends to it."""
        return self.schema_2(name, "log")

    def counts(self, name: str) -> str:
        """Return the hash of what was counted about a breaker since ever, by kind; reporters add to it."""
        return self.schema_2(name, "counts")

    def minute(self, name: str, number: int) -> str:
        """Return the hash of what was counted about a breaker in one minute since the epoch, by kind."""
        return self.schema_2(name, f"minute:{number}")

    def outages(self, name: str) -> str:
        """Return the list of the epochs in which a breaker's outages began, the latest first."""
        return self.schema_2(name, "outages")

    def outage(self, name: str, epoch: str) -> str:
        """Return the hash of one outage: opened, closed, drained (ms), reason, actor, openings, and counts by kind."""
        return self.schema_2(name, f"outage:{epoch}")

    def schema_2(self, name: str, part: str) -> str:
        """Return a key of the present schema: ``<namespace>:2:{payments}:part``, of a child ``...:part:key``."""
        return self._of_breaker(name, part, f"{self.namespace}:{SCHEMA}")

    def changes(self, database: int) -> str:
        """Return the channel of all transitions: Redis has one for all databases of a server."""
        return f"{self.namespace}:{SCHEMA}:changes:{database}"

    def tick(self, scope: str) -> str:
        """Return the hash that holds the lease of the tick, and when one completed."""
        return f"{self.namespace}:tick:{scope}" if scope else f"{self.namespace}:tick"

    def pace(self, name: str) -> str:
        """Return the hash that holds how fast deferred tasks are resumed."""
        return self._of_breaker(name, "pace")

    def claim(self, digest: str) -> str:
        """Return the text that holds the latest of the deferred tasks that are coalesced under a digest."""
        return f"{self.namespace}:claim:{digest}"

    def value(self, kind: str, key: str) -> str:
        """Return the hash of a small value; unwieldy keys are replaced by their digest."""
        if len(key) > _LONGEST_NAME or not key.isprintable() or key.startswith("sha256-"):
            key = f"sha256-{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()}"
        return f"{self.namespace}:value:{kind}:{key}"

    def _of_breaker(self, name: str, part: str, prefix: str = "") -> str:
        """Return a key; a child's has the hash tag of its parent, so that one script may touch both."""
        check_key_part("breaker", name)
        parent, key = parent_of(name), key_of(name)
        tagged = f"{prefix or self.namespace}:{{{parent or name}}}:{part}"
        return f"{tagged}:{key}" if parent else tagged
