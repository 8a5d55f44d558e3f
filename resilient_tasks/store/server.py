"""One Redis-compatible server, or a group of them, used with a bounded delay; and the scripts that run there.

A server that is unavailable costs one caller one time limit; for a while after that every caller gets an error at
once, so that neither a worker with many threads nor a loop over many commands is held up by each.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib import resources
from typing import Any, NoReturn, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.cluster import RedisCluster
from redis.exceptions import ClusterError, InvalidResponse, NoScriptError, RedisClusterException
from redis.retry import Retry

from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.store.address import Address, Kind
from resilient_tasks.store.background import renew_after_fork

T = TypeVar("T")
logger = logging.getLogger("resilient_tasks")
Argument = str | bytes | int | float
Command = tuple[Any, ...]
Call = tuple[Sequence[str], Sequence[Argument]]  # keys and arguments of a script

#: What readers raise over values that are not in the format that they expect.
UNREADABLE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)

_FOLDER = resources.files("resilient_tasks.store") / "lua"
_PER_ROUND_TRIP = 500
_MOST_CONNECTIONS = 1_000
_AWAY = (
    redis.ConnectionError, redis.TimeoutError, InvalidResponse, OSError,
    ClusterError, RedisClusterException,  # no node answers, or none has the key
)  # fmt: skip


def portions(items: Iterable[T], size: int = _PER_ROUND_TRIP) -> list[list[T]]:
    """Return the items in portions, by default such that one round trip, or one script, can take."""
    waiting = list(items)
    return [waiting[start : start + size] for start in range(0, len(waiting), size)]


def script_names() -> list[str]:
    """Return the names of all scripts."""
    return sorted(file.name.removesuffix(".lua") for file in _FOLDER.iterdir() if file.name.endswith(".lua"))


class Script:
    """A Lua script, run by its digest; a server that does not know it, or no longer, gets its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    @classmethod
    @cache
    def load(cls, name: str, clock: str | None = None) -> Script:
        """Return a script of the ``lua`` folder, behind the clock and ``breaker.lua`` if it needs that."""
        text = (_FOLDER / f"{name}.lua").read_text("utf-8")
        library = (_FOLDER / "lib" / "breaker.lua").read_text("utf-8") if "-- Needs breaker.lua\n" in text else ""
        return cls("\n".join([clock or (_FOLDER / "lib" / "now.lua").read_text("utf-8"), library, text]))

    def __call__(self, client: redis.Redis, keys: Sequence[str], *args: Argument) -> Any:
        """Run it in one round trip; two if the server has to be given the text first."""
        try:
            return client.execute_command(*self._by_digest(keys, args))
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)

    def each(self, client: redis.Redis, calls: Sequence[Call]) -> list[Any]:
        """Run it for each of several calls, all in one round trip. For scripts that may run twice."""
        commands = [self._by_digest(*call) for call in calls]
        try:
            replies = _pipelined(client, commands)
        except NoScriptError:
            client.script_load(self.text)
            replies = _pipelined(client, commands)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _by_digest(self, keys: Sequence[str], args: Sequence[Argument]) -> Command:
        # no method: the pipeline of a cluster's client has none for this
        return ("EVALSHA", self.digest, len(keys), *keys, *args)


class Server:
    """Connections to one server; behind Sentinel or in a cluster it may be another one from time to time.

    Every method may raise ``StoreError``: the server is unavailable, or was a moment ago, or it answers with an error.
    The arguments are those of ``RedisStore``; ``options`` go to redis-py's connections.
    """

    def __init__(self, url: str, *, timeout: float, cooldown: float, clock: str | None = None, **options: Any) -> None:
        # all at once: a deploy may replace the files while this process lives
        self._scripts = {name: Script.load(name, clock) for name in script_names()}
        self._address = Address.parse(url)
        self._cooldown = cooldown
        self._options = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "max_connections": _MOST_CONNECTIONS,
            **options,
        }
        self.address = str(self._address)
        self.database = int(self._address.options.get("db") or 0)
        self._last_failure = ""
        self._retry_at: float | None = None
        self._lock = threading.Lock()
        self._client: redis.Redis | None = None
        self._inherited: list[redis.Redis | None] = []
        self._check_options()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with new connections and a new lock."""
        self._retry_at = None
        self._lock = threading.Lock()
        # kept for ever: a cluster's client takes locks when it ends, and a thread that is no more may hold them
        self._inherited.append(self._client)
        self._client = None

    def run(self, action: Callable[[redis.Redis], T]) -> T:
        """Return what ``action`` gets from the server."""
        self._fail_fast()
        with self.errors_translated():
            if self._client is None:
                self._client = self._address.client(self._options)
            result = action(self._client)
        self._retry_at = None
        return result

    def commands(self, commands: Sequence[Command], read: Callable[[Any], Any] = lambda reply: reply) -> list[Any]:
        """Run commands, 500 in one round trip, and return what ``read`` makes of their replies.

        A value of another type, or one that ``read`` cannot read, is logged and deleted; its place holds None.
        """
        replies = [reply for some in portions(commands) for reply in self.run(partial(_pipelined, commands=some))]
        return [self._readable(command, reply, read) for command, reply in zip(commands, replies, strict=True)]

    def command(self, *command: Any, read: Callable[[Any], Any] = lambda reply: reply) -> Any:
        """Run one command; see :meth:`commands`."""
        return self.commands([command], read)[0]

    def _readable(self, command: Command, reply: Any, read: Callable[[Any], Any]) -> Any:
        try:
            if isinstance(reply, Exception):
                raise reply
            return read(reply)
        except (*UNREADABLE, redis.ResponseError) as error:
            self.discard([command[1]], error)
            return None

    def script(self, name: str, keys: Sequence[str], *args: Argument) -> Any:
        """Run a script and return its reply."""
        return self.run(lambda client: self._scripts[name](client, keys, *args))

    def script_each(self, name: str, calls: Iterable[Call]) -> list[Any]:
        """Run a script that may run twice for each of several calls, 500 in one round trip."""
        script = self._scripts[name]
        return [reply for some in portions(calls) for reply in self.run(partial(script.each, calls=some))]

    def now(self) -> int:
        """Return the server's time in ms."""
        return int(self.script("time", []))

    def discard(self, keys: Sequence[str], error: Exception) -> None:
        """Delete values that cannot be read, because they were edited by hand, and log it."""
        for key in keys:
            if self.run(partial(_pipelined, commands=[("DEL", key)]))[0]:
                logger.warning("%s held a value that cannot be read, and is deleted: %.200r", key, error)

    def infos(self, section: str) -> list[dict[str, Any]]:
        """Return a section of INFO from the server; in a cluster, from each node that stores anything."""

        def ask(client: redis.Redis) -> list[dict[str, Any]]:
            if isinstance(client, RedisCluster):
                return [client.info(section, target_nodes=node) for node in client.get_primaries()]
            return [client.info(section)]

        return self.run(ask)

    def check_kind(self) -> None:
        """Raise ``ConfigurationError`` if a URL of one server leads to a node of a cluster, which knows a part only."""
        if self._address.kind is Kind.SERVER and any(info.get("cluster_enabled") for info in self.infos("cluster")):
            raise ConfigurationError(
                f"store {self.address} is a node of a cluster: allowed is redis+cluster://host:port,host:port"
            )

    @contextmanager
    def errors_translated(self, *, remember: bool = True) -> Iterator[None]:
        """Turn every error of redis-py into a StoreError; ``remember`` if the server does not reply.

        Not for a subscription: that it was cut says nothing about the server, and delays no other caller.
        """
        try:
            yield
        except _AWAY as error:
            if remember:
                with self._lock:
                    self._retry_at = time.monotonic() + self._cooldown
            self._raise(error, _trouble(error))
        except redis.RedisError as error:
            self._raise(error, "answered with an error")

    def close(self) -> None:
        """Close all connections; the next use opens new ones."""
        client, self._client = self._client, None
        if isinstance(client, RedisCluster):
            client.close()
        elif client is not None:
            client.connection_pool.disconnect()

    def _check_options(self) -> None:
        """Find a wrong option now and not at the first command; this opens no connection."""
        try:
            pool = self._address.pool(self._options)
            pool.connection_class(**pool.connection_kwargs)
        except (TypeError, ValueError, redis.RedisError) as error:
            raise ConfigurationError(f"options of the store's connection: {error}") from None

    def _fail_fast(self) -> None:
        if self._retry_at is None:
            return
        with self._lock:
            now = time.monotonic()
            if now < (self._retry_at or now):
                raise StoreError(f"{self._last_failure} (tried a moment ago)")
            self._retry_at = now + self._cooldown  # the others wait for what this caller finds

    def _raise(self, error: Exception, trouble: str) -> NoReturn:
        text = said = str(error) or type(error).__name__
        for secret in self._address.secrets:
            text = text.replace(secret, "***")
        self._last_failure = f"store {self.address} {trouble}: {text}"
        # An error that quotes the password must not be printed as the cause either.
        raise StoreError(self._last_failure) from (error if text == said else None)


def is_unreadable(error: BaseException | None) -> bool:
    """Whether a server or a script has failed over the type or the format of a value."""
    return type(error) is redis.ResponseError and any(sign in str(error) for sign in _SIGNS)


_SIGNS = ("WRONGTYPE", "is not a", "user_script", "script:")  # the last two of errors within a script


def _pipelined(client: redis.Redis, commands: Sequence[Command]) -> list[Any]:
    with client.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        replies: list[Any] = pipeline.execute(raise_on_error=False)
    for reply in replies:
        if isinstance(reply, Exception) and not is_unreadable(reply):
            raise reply
    return replies


def _trouble(error: Exception) -> str:
    if isinstance(error, InvalidResponse):
        return "does not speak the Redis protocol"
    refused = isinstance(error.__cause__ or error, redis.AuthenticationError)  # a cluster's client raises it from that
    return "refuses the credentials" if refused else "is unavailable"
