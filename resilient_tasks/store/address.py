"""Where the shared store is, how its URL is written, and the redis-py client that it means.

One server::

    redis://user:password@host:6379/0              valkey:// is the same
    rediss://host:6379/0?ssl_ca_certs=/etc/ca.pem  TLS; valkeys:// is the same
    unix:///run/redis.sock?db=0                    Celery's redis+socket:// and socket:// are the same

The master that some sentinels know; ``sentinels://`` is TLS to it and to them::

    sentinel://user:password@one:26379,two:26379/0?master_name=mymaster&sentinel_password=secret

A cluster, by some of its nodes; ``rediss+cluster://`` is TLS::

    redis+cluster://user:password@one:6379,two:6379

Hosts may also be listed as Celery does, ``sentinel://one;sentinel://two``, and options spelled as it does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.connection import SSLConnection, parse_url
from redis.retry import Retry
from redis.sentinel import Sentinel

from resilient_tasks.errors import ConfigurationError

Options = Mapping[str, Any]


class Kind(Enum):
    """What a URL leads to."""

    SERVER = "server"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


# What a scheme leads to, and how redis-py spells it.
SCHEMES: Mapping[str, tuple[Kind, str]] = {
    "redis": (Kind.SERVER, "redis"),
    "rediss": (Kind.SERVER, "rediss"),
    "unix": (Kind.SERVER, "unix"),
    "valkey": (Kind.SERVER, "redis"),
    "valkeys": (Kind.SERVER, "rediss"),
    "redis+socket": (Kind.SERVER, "unix"),
    "socket": (Kind.SERVER, "unix"),
    "sentinel": (Kind.SENTINEL, "redis"),
    "sentinels": (Kind.SENTINEL, "rediss"),
    "redis+cluster": (Kind.CLUSTER, "redis"),
    "rediss+cluster": (Kind.CLUSTER, "rediss"),
}
_FORMS = {
    Kind.SERVER: "scheme://[user:password@]host:port/number, or unix://path?db=number",
    Kind.SENTINEL: "scheme://[user:password@]host:port,host:port/number?master_name=name",
    Kind.CLUSTER: "scheme://[user:password@]host:port,host:port",
}
_NO_RETRY = Retry(NoBackoff(), 0)  # a node or a sentinel that does not answer is not tried again
_SEARCH_OPTIONS = ("master_name", "min_other_sentinels")
_DISCOVERY = frozenset({*_SEARCH_OPTIONS, "sentinel_username", "sentinel_password"})


@dataclass(frozen=True)
class Address:
    """Where a store is."""

    kind: Kind  # one server, sentinels or a cluster
    hosts: tuple[tuple[str, int], ...]  # the server, the sentinels or some nodes of the cluster, as (name, port)
    # arguments of redis-py's connections that the URL holds, the credentials among them
    options: Options = field(repr=False)
    # what only sentinels get: ``master_name``, ``min_other_sentinels`` and credentials
    discovery: Options = field(repr=False)
    secrets: frozenset[str] = field(repr=False)  # what no log may show, as it is and as the URL spells it

    @classmethod
    def parse(cls, url: str) -> Address:
        """Read a URL; a ConfigurationError that says why it is of no use does not contain the password."""
        name = scheme_of(url)
        if name not in SCHEMES:
            allowed = ", ".join(f"{scheme}://" for scheme in SCHEMES)
            raise ConfigurationError(f"store URL with scheme {name!r}: allowed are {allowed}")
        try:
            return _read(url, *SCHEMES[name])
        except ValueError:  # what is said may quote the URL, and with it the password
            form = _FORMS[SCHEMES[name][0]]
            raise ConfigurationError(f"store URL {name}://...: allowed is {form}") from None

    def __str__(self) -> str:
        """Return what a log may show."""
        hosts = self.options.get("path") or ",".join(f"{host}:{port}" for host, port in self.hosts)
        if self.kind is Kind.CLUSTER:
            return f"cluster of {hosts}"
        master = f"{self.discovery['master_name']} of " if self.kind is Kind.SENTINEL else ""
        return f"{master}{hosts}/{self.options.get('db', 0)}"

    def pool(self, options: Options) -> redis.ConnectionPool:
        """Return a pool of connections to one server; behind sentinels, to that which they name as the master."""
        if self.kind is not Kind.SENTINEL:
            return redis.ConnectionPool(**{**options, **self.options})
        sentinels, arguments = self._sentinels(options), self._arguments(options)
        client: redis.Redis = sentinels.master_for(self.discovery["master_name"], **arguments)
        return client.connection_pool

    def client(self, options: Options) -> redis.Redis:
        """Return a client; for a cluster this asks one of its nodes for the others.

        ``options`` are arguments of redis-py's connections, those of the URL win; ``sentinel_kwargs``: to sentinels.
        """
        if self.kind is not Kind.CLUSTER:
            # no ``from_pool()``: its client closes the pool when it is collected. At the end of the interpreter that
            # waits for ever for the pool's lock if a daemon thread was stopped while it held it.
            return redis.Redis(connection_pool=self.pool(options))
        nodes = [ClusterNode(host, port) for host, port in self.hosts]
        arguments = {name: value for name, value in self._arguments(options).items() if name not in ("db", "retry")}
        # what we ask of a client is the same for both
        return cast("redis.Redis", RedisCluster(startup_nodes=nodes, retry=_NO_RETRY, **arguments))

    def _arguments(self, options: Options) -> dict[str, Any]:
        """Return the arguments of a client that finds out by itself which hosts to connect to."""
        merged = {**options, **self.options}
        tls = {"ssl": True} if merged.get("connection_class") is SSLConnection else {}
        of_a_server = ("host", "port", "connection_class", "sentinel_kwargs")
        return {name: value for name, value in merged.items() if name not in of_a_server} | tls

    def _sentinels(self, options: Options) -> Sentinel:
        """Return the sentinels; to ask all of them in vain takes as long as to connect in vain to one server."""
        arguments = {name: value for name, value in self._arguments(options).items() if name.startswith("ssl")}
        for limit in ("socket_timeout", "socket_connect_timeout"):
            arguments[limit] = options[limit] / len(self.hosts)
        for name in ("username", "password"):
            arguments[name] = self.discovery.get(f"sentinel_{name}")
        arguments.update(retry=_NO_RETRY, **options.get("sentinel_kwargs", {}))
        return Sentinel(self.hosts, int(self.discovery.get("min_other_sentinels", 0)), sentinel_kwargs=arguments)


def scheme_of(url: str) -> str:
    """Return the scheme of a URL; empty if it has none."""
    scheme, colon, _ = url.partition("://")
    return scheme.lower() if colon else ""


def hide_password(url: str) -> str:
    """Return ``url`` with its passwords replaced, fit for a log or an error message."""
    # up to the last "@": a password that was not percent-encoded may hold "@", "/" and ";"
    hidden = re.sub(r"://([^:/@]*):.*@", r"://\1:***@", url, flags=re.DOTALL)
    return re.sub(r"([?&](?:sentinel_)?password=)[^&]*", r"\1***", hidden)


def _read(url: str, kind: Kind, redis_py: str) -> Address:
    parts = [urlsplit(part) for part in ([url] if kind is Kind.SERVER else url.split(";"))]
    query = {name: value for part in parts for name, value in map(_option, parse_qsl(part.query))}
    discovery = {name: query.pop(name) for name in _DISCOVERY & query.keys()} if kind is Kind.SENTINEL else {}
    users, _, hosts = zip(*(part.netloc.rpartition("@") for part in parts), strict=True)
    port = 26379 if kind is Kind.SENTINEL else 6379
    found = [urlsplit(f"//{host}") for host in ",".join(hosts).split(",")]
    user, path = (next(filter(None, texts), "") for texts in (users, [part.path for part in parts]))
    server = hosts[0] if kind is Kind.SERVER else ""
    options = parse_url(urlunsplit((redis_py, f"{user}@{server}", path, urlencode(query), "")))
    if kind is Kind.SENTINEL and not discovery.get("master_name"):
        raise ValueError("no master_name")
    if redis_py != "unix" and path.strip("/") and not path.strip("/").isdecimal():
        raise ValueError("a database is a number")
    if kind is Kind.CLUSTER and options.get("db"):
        raise ValueError("a cluster has but one database")
    secrets = {options.get("password"), discovery.get("sentinel_password"), *(part.password for part in parts)}
    return Address(
        kind=kind,
        hosts=tuple((host.hostname or "localhost", host.port or port) for host in found),
        options=options,
        discovery=discovery,
        secrets=frozenset(filter(None, secrets)),
    )


def _option(given: tuple[str, str]) -> tuple[str, str]:
    """Return an option of a URL in redis-py's spelling."""
    name, value = given
    if name == "virtual_host":
        return "db", value.strip("/")
    return name, _cert_reqs(value) if name == "ssl_cert_reqs" else value


def _cert_reqs(value: str) -> str:
    """Return the value of ``ssl_cert_reqs`` in redis-py's spelling; Celery has it like the ssl module's constants."""
    return value.removeprefix("CERT_").lower()


# --- as Celery's settings have it -----------------------------------------------------------------------

# Celery's and kombu's URLs carry options of their own as well; only these mean the same to a store
_SHARED_OPTIONS = ("db", "virtual_host", "ssl_", "client_name", "protocol", "username", "password")
_WITH_TLS = {"redis": "rediss", "valkey": "valkeys", "sentinel": "sentinels"}

#: The URL of the shared store, and options of its connections that Celery's settings hold beside it.
StorePlace = tuple[str, dict[str, Any]]


def find_store(store_url: str | None, conf: Any = None) -> StorePlace:
    """Return the place of the shared store.

    That is ``store_url`` if set, else the broker if it is a Redis, else the result backend if it is one; either with
    what Celery's own settings, ``conf``, say of TLS and of Sentinel. Of several broker URLs the first counts.

    Raises:
        ConfigurationError: none of them is a Redis.
    """
    if store_url:
        return store_url, {}
    broker, backend = _url_in(conf, "broker_url"), _url_in(conf, "result_backend")
    if scheme_of(broker) in SCHEMES:
        return _as_celery_reaches(broker, conf.broker_transport_options, conf.broker_use_ssl)
    if scheme_of(backend) in SCHEMES:
        return _as_celery_reaches(backend, conf.result_backend_transport_options, conf.redis_backend_use_ssl)
    raise ConfigurationError(
        f"neither the broker ({_shown(broker)}) nor the result backend ({_shown(backend)}) is a Redis or Valkey server;"
        " set RESILIENT_TASKS_STORE_URL, for example to redis://localhost:6379/0"
    )


def _url_in(conf: Any, setting: str) -> str:
    given = getattr(conf, setting, None) or ""
    url = given if isinstance(given, str) else ";".join(given)
    return f"{url}://" if url in SCHEMES else url  # Celery takes a scheme alone


def _shown(url: str) -> str:
    return repr(hide_password(url) if "://" in url else "***") if url else "not set"


def _as_celery_reaches(url: str, transport_options: Mapping[str, Any] | None, use_ssl: object) -> StorePlace:
    given = use_ssl if isinstance(use_ssl, Mapping) else {}
    tls = {name: value for name, value in given.items() if name.startswith("ssl_")}
    if isinstance(tls.get("ssl_cert_reqs"), str):
        tls["ssl_cert_reqs"] = _cert_reqs(tls["ssl_cert_reqs"])
    first, *others = [_shared(host.strip(), tls=bool(tls)) for host in url.split(";")]
    if scheme_of(url) == "sentinel":
        options = transport_options or {}
        search = urlencode({name: options[name] for name in _SEARCH_OPTIONS if name in options})
        of_sentinels = {"ssl": False, **(options.get("sentinel_kwargs") or {})}
        found = f"{first}{'&' if '?' in first else '?'}{search}"
        return ";".join([found, *others]), {**tls, "sentinel_kwargs": of_sentinels}
    if scheme_of(url) == "rediss" and not tls and "ssl_" not in first:
        tls = {"ssl_cert_reqs": "none"}  # what kombu makes of it, with a warning
    return first, tls


def _shared(url: str, *, tls: bool) -> str:
    """Return a URL without the options that only Celery or kombu understand, with TLS if wanted."""
    scheme, _, rest = url.partition("://")
    place, _, query = rest.partition("?")
    kept = [(name, value) for name, value in parse_qsl(query) if name.startswith(_SHARED_OPTIONS)]
    scheme = _WITH_TLS.get(scheme, scheme) if tls else scheme
    return f"{scheme}://{place}{'?' if kept else ''}{urlencode(kept)}"
