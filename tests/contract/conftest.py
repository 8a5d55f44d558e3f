"""One suite, every store: this process's, the scripts in fakeredis, in a real server and in a real cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import fakeredis
import pytest
import redis

from resilient_tasks.store.local import LocalStore
from resilient_tasks.store.redis import RedisStore
from tests.contract.lab import CLOCK_LUA, Lab, LocalClock, ServerClock
from tests.support.servers import Cluster, start_cluster
from workers.processes import Server, start_valkey

TIMEOUT = 20.0  # seconds for one command: a slow machine is no outage


@pytest.fixture(scope="session")
def running_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_valkey(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def client(running_server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(running_server.url()) as client:
        yield client


@pytest.fixture
def server(running_server: Server, client: redis.Redis) -> Server:
    """A real server without any keys."""
    client.flushall()
    return running_server


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """A real server that a test may stop, freeze or kill."""
    server = start_valkey(tmp_path)
    yield server
    server.program.kill()


@pytest.fixture
def shared_store(server: Server) -> Iterator[RedisStore]:
    """A store on a real server and its real time."""
    store = RedisStore(server.url(), namespace="test", timeout=TIMEOUT)
    yield store
    store.close()


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = start_cluster(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def nodes(running_cluster: Cluster) -> Iterator[redis.RedisCluster]:
    with redis.RedisCluster.from_url(running_cluster.nodes[0].url()) as client:
        yield client


@pytest.fixture(params=["local", "fakeredis", "server", "cluster"])
def lab(request: pytest.FixtureRequest) -> Lab:
    """Each store in turn, with a clock that stops until the test advances it."""
    if request.param == "local":
        clock = LocalClock()
        return Lab(LocalStore(clock), clock, lambda: LocalStore(clock))
    if request.param == "fakeredis":
        fake = fakeredis.FakeServer()
        client = fakeredis.FakeRedis(server=fake)
        options = {"connection_class": fakeredis.FakeRedisConnection, "server": fake}
        return _shared_lab("redis://fake", client, request.addfinalizer, **options)
    if request.param == "cluster":
        nodes: redis.RedisCluster = request.getfixturevalue("nodes")
        nodes.flushall(target_nodes=redis.RedisCluster.PRIMARIES)
        url = request.getfixturevalue("running_cluster").url()
        return _shared_lab(url, cast("redis.Redis", nodes), request.addfinalizer)
    server: Server = request.getfixturevalue("server")
    return _shared_lab(server.url(), request.getfixturevalue("client"), request.addfinalizer)


def _shared_lab(url: str, client: redis.Redis, on_end: Callable[[Callable[[], object]], None], **options: Any) -> Lab:
    def store(namespace: str) -> RedisStore:
        opened = RedisStore(url, namespace=namespace, clock=CLOCK_LUA, timeout=TIMEOUT, **options)
        on_end(opened.close)
        return opened

    return Lab(store("test"), ServerClock(client=client), lambda: store("other"))
