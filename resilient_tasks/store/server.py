"""One Redis-compatible server, spoken to with a bounded delay.

A server that is away costs one caller one time limit; for a while after that everybody is told at
once, so that neither a worker with many threads nor a loop over many commands is held up by each.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import redis
from redis.backoff import NoBackoff
from redis.exceptions import InvalidResponse, NoScriptError
from redis.retry import Retry

from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.store.forking import renew_after_fork

T = TypeVar("T")
Argument = str | bytes | int | float

_SCHEMES = {"redis": "redis", "rediss": "rediss", "unix": "unix", "valkey": "redis", "valkeys": "rediss"}
_MOST_CONNECTIONS = 1_000
_AWAY = (redis.ConnectionError, redis.TimeoutError, InvalidResponse, OSError)


class Script:
    """A Lua script, run by its digest; a server that does not know it, or no longer, gets its text."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    @classmethod
    def load(cls, *names: str, clock: str | None = None) -> Script:
        """Return the script made of some files of the ``lua`` folder, one after the other, behind the clock.

        Args:
            names: of the files, without ``.lua``.
            clock: Lua text that defines ``now_ms()``; ``None``: the server's time.
        """
        folder = resources.files("resilient_tasks.store") / "lua"
        texts = [(folder / f"{name}.lua").read_text("utf-8") for name in ("now", *names)]
        return cls("\n".join([clock or texts[0], *texts[1:]]))

    def __call__(self, client: redis.Redis, keys: Sequence[str], *args: Argument) -> Any:
        """Run it in one round trip; two if the server has to be given the text first."""
        try:
            return self._by_digest(client, keys, args)
        except NoScriptError:
            return client.eval(self._text, len(keys), *keys, *args)

    def each(self, client: redis.Redis, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        """Run it for each of several ``(keys, args)``, all in one round trip. For scripts that only read."""
        replies = self._pipelined(client, calls)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            client.script_load(self._text)
            replies = self._pipelined(client, calls)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _pipelined(self, client: redis.Redis, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]) -> list[Any]:
        with client.pipeline(transaction=False) as pipeline:
            for keys, args in calls:
                self._by_digest(pipeline, keys, args)
            return pipeline.execute(raise_on_error=False)

    def _by_digest(self, client: redis.Redis, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        return client.evalsha(self._sha, len(keys), *keys, *args)


class Server:
    """Connections to one server, and the memory that it did not answer a moment ago.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``valkey://`` or ``valkeys://``.
        timeout: longest wait in seconds for a connection, and for a reply.
        cooldown: seconds for which, after a failure to connect or a reply that did not come, only one
            caller tries again and the others get a StoreError at once.
        options: more arguments for redis-py's connections.

    Raises:
        ConfigurationError: the URL is of no use; the message does not contain the password.
    """

    def __init__(self, url: str, *, timeout: float, cooldown: float, **options: Any) -> None:
        self._url = _for_redis_py(url)
        self._cooldown = cooldown
        self._options = {
            "socket_timeout": timeout,
            "socket_connect_timeout": timeout,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,
            "max_connections": _MOST_CONNECTIONS,
            **options,
        }
        self._last_failure = ""
        self._retry_at: float | None = None
        self._lock = threading.Lock()
        self._client = self._connected()
        self._check_options()
        kwargs = self._client.connection_pool.connection_kwargs
        self._secrets = [secret for secret in {kwargs.get("password"), _raw_password(url)} if secret]
        self.address = _address(kwargs)
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start with new connections and a new lock."""
        self._retry_at = None
        self._lock = threading.Lock()
        self._client = self._connected()

    def run(self, action: Callable[[redis.Redis], T]) -> T:
        """Return what ``action`` gets from the server.

        Raises:
            StoreError: the server is away, or was a moment ago, or it answers with an error.
        """
        self._fail_fast()
        with self.errors_translated():
            result = action(self._client)
        self._retry_at = None
        return result

    @contextmanager
    def errors_translated(self, *, remember: bool = True) -> Iterator[None]:
        """Turn every error of redis-py into a StoreError.

        Args:
            remember: take a missing reply as a sign that the server is away. Not for a subscription: that it was
                cut says nothing about the server, and nobody else has to wait for it.
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
        self._client.connection_pool.disconnect()

    def _connected(self) -> redis.Redis:
        try:
            return redis.Redis(connection_pool=redis.ConnectionPool.from_url(self._url, **self._options))
        except (ValueError, TypeError, redis.RedisError):
            # What redis-py says may quote the URL, and with it the password.
            scheme = self._url.partition("://")[0]
            allowed = "scheme://[user:password@]host:port/number, or unix://path?db=number"
            raise ConfigurationError(f"store URL {scheme}://...: allowed is {allowed}") from None

    def _check_options(self) -> None:
        """Find a wrong option now and not at the first command; this opens no connection."""
        pool = self._client.connection_pool
        try:
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
        for secret in self._secrets:
            text = text.replace(secret, "***")
        self._last_failure = f"store {self.address} {trouble}: {text}"
        # An error that quotes the password must not be printed as the cause either.
        raise StoreError(self._last_failure) from (error if text == said else None)


def _trouble(error: Exception) -> str:
    if isinstance(error, InvalidResponse):
        return "does not speak the Redis protocol"
    return "lets nobody in" if isinstance(error, redis.AuthenticationError) else "is away"


def _for_redis_py(url: str) -> str:
    scheme, colon, rest = url.partition("://")
    if not colon or scheme not in _SCHEMES:
        allowed = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigurationError(f"store URL with scheme {scheme if colon else ''!r}: allowed are {allowed}")
    # Celery spells these options like the ssl module's constants, redis-py in lower case.
    rest = re.sub(r"(ssl_cert_reqs=)CERT_(\w+)", lambda found: found[1] + found[2].lower(), rest)
    return f"{_SCHEMES[scheme]}://{rest}"


def _raw_password(url: str) -> str | None:
    return urlsplit(url).password


def _address(kwargs: dict[str, Any]) -> str:
    place = kwargs.get("path") or f"{kwargs.get('host', 'localhost')}:{kwargs.get('port', 6379)}"
    return f"{place}/{kwargs.get('db', 0)}"
