from __future__ import annotations

import threading
from typing import Any

import pytest
import redis

from resilient_tasks.errors import ConfigurationError
from resilient_tasks.store.address import Address, Kind

LIMITS = {"socket_timeout": 0.6, "socket_connect_timeout": 0.6}


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("redis://", {}),
        ("valkey://me:p%20w@host:6380/2", {"username": "me", "password": "p w", "host": "host", "port": 6380, "db": 2}),
        ("redis://host/3?socket_timeout=2", {"host": "host", "db": 3, "socket_timeout": 2.0}),
        ("rediss://host?ssl_cert_reqs=CERT_OPTIONAL", {"host": "host", "ssl_cert_reqs": "optional"}),
        ("valkeys://host?ssl_ca_certs=/a b/ca.pem", {"host": "host", "ssl_ca_certs": "/a b/ca.pem"}),
        ("unix:///run/redis.sock?db=2", {"path": "/run/redis.sock", "db": 2}),
        ("redis+socket://:hush@/run/a.sock?virtual_host=/1", {"path": "/run/a.sock", "db": 1, "password": "hush"}),
    ],
)  # fmt: skip
def test_one_server(url: str, options: dict[str, Any]) -> None:
    address = Address.parse(url)
    assert address.kind is Kind.SERVER
    assert {name: value for name, value in address.options.items() if name != "connection_class"} == options


@pytest.mark.parametrize(
    ("url", "connection"),
    [
        ("valkey://host", redis.Connection),
        ("valkeys://host", redis.SSLConnection),
        ("socket:///run/redis.sock", redis.UnixDomainSocketConnection),
        ("sentinels://host?master_name=main", redis.SSLConnection),
    ],
)
def test_the_scheme_says_how_to_connect(url: str, connection: type) -> None:
    assert issubclass(Address.parse(url).pool(LIMITS).connection_class, connection)


@pytest.mark.parametrize(
    "url",
    [
        "sentinel://me:hush@one:1,two:2/3?master_name=main",
        "sentinel://me:hush@one:1/3?master_name=main;sentinel://me:hush@two:2/3",
        "sentinel://one:1;sentinel://me:hush@two:2/3?master_name=main",
    ],
)
def test_sentinels(url: str) -> None:
    address = Address.parse(url)
    assert address.kind is Kind.SENTINEL
    assert address.hosts == (("one", 1), ("two", 2))
    assert address.options == {"username": "me", "password": "hush", "db": 3}
    assert address.discovery == {"master_name": "main"}
    assert str(address) == "main of one:1,two:2/3"


def test_sentinels_have_credentials_of_their_own_and_share_one_time_limit() -> None:
    url = "sentinel://:hush@one,two,three/3?master_name=main&sentinel_username=me&sentinel_password=own"
    address = Address.parse(url)
    pool: Any = address.pool(LIMITS)
    asked_with = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert {asked["password"] for asked in asked_with} == {"own"}
    assert {asked["username"] for asked in asked_with} == {"me"}
    assert sum(asked["socket_timeout"] for asked in asked_with) == pytest.approx(0.6)
    assert {asked["retry"].get_retries() for asked in asked_with} == {0}
    assert pool.connection_kwargs["password"] == "hush"
    assert address.secrets == {"hush", "own"}


@pytest.mark.parametrize(("given", "encrypted"), [({}, True), ({"ssl": False}, False)])
def test_sentinels_speak_tls_as_the_master_does_unless_set_otherwise(given: dict[str, Any], encrypted: bool) -> None:  # noqa: FBT001
    address = Address.parse("sentinels://one?master_name=main&ssl_ca_certs=/ca.pem")
    pool: Any = address.pool({**LIMITS, "sentinel_kwargs": given})
    asked_with = pool.sentinel_manager.sentinels[0].connection_pool
    assert issubclass(asked_with.connection_class, redis.SSLConnection) is encrypted
    assert pool.connection_kwargs["ssl_ca_certs"] == "/ca.pem"


def test_nodes_of_a_cluster() -> None:
    address = Address.parse("rediss+cluster://me:hush@one:7000,[::1],three/0?ssl_cert_reqs=none")
    assert address.kind is Kind.CLUSTER
    assert address.hosts == (("one", 7000), ("::1", 6379), ("three", 6379))
    assert address.options["ssl_cert_reqs"] == "none"
    assert str(address) == "cluster of one:7000,::1:6379,three:6379"


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("amqp://me:hush@host", "rediss://"),
        ("host", "rediss://"),
        ("redis://:hush@host:port", "host:port/number"),
        ("redis://:hush@one:1,two:2", "host:port/number"),
        ("redis://:hush@host/notadb", "host:port/number"),
        ("sentinel://:hush@one:26379", "master_name=name"),
        ("redis+cluster://:hush@one/1", "host:port,host:port"),
    ],
)
def test_a_url_of_no_use_says_what_is_allowed_and_no_password(url: str, allowed: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Address.parse(url)
    assert allowed in str(caught.value)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("url", ["redis://me:hush@host", "sentinel://:hush@h?master_name=m", "redis+cluster://:hush@h"])
def test_nothing_that_prints_an_address_prints_its_password(url: str) -> None:
    address = Address.parse(url)
    assert "hush" not in f"{address} {address!r}"


def test_a_client_that_is_collected_waits_for_no_thread() -> None:
    """At the end of the interpreter a thread that holds the lock of the pool may have been stopped for good."""
    clients, collected = [Address.parse("redis://localhost").client({})], threading.Event()

    def collect() -> None:
        clients.clear()
        collected.set()

    with clients[0].connection_pool._lock:
        threading.Thread(target=collect, daemon=True).start()
        assert collected.wait(20)
