"""Servers in sets: a cluster, and a master with replicas that sentinels watch; and a certificate for TLS."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import redis

from workers.processes import (
    LOCALHOST,
    Program,
    Server,
    free_port,
    server_binary,
    start_program,
    start_valkey,
    wait_until,
)

SLOTS = 16384
MASTER_NAME = "main"
PASSWORD = "hunter 2"
SENTINELS_PASSWORD = "watchman"


@dataclass(frozen=True)
class Cluster:
    """A Redis Cluster of our own, without replicas."""

    nodes: list[Server]

    def url(self) -> str:
        """Return the URL of a store in it."""
        return "redis+cluster://" + ",".join(f"{LOCALHOST}:{node.port}" for node in self.nodes)

    def stop(self) -> None:
        """Stop all nodes."""
        for node in self.nodes:
            node.program.kill()


def start_cluster(directory: Path, *, size: int = 3) -> Cluster:
    """Start a cluster and wait until it serves all slots."""
    nodes = [start_cluster_node(directory / f"node{number}") for number in range(size)]
    clients = [redis.Redis.from_url(node.url()) for node in nodes]
    edges = [SLOTS * number // size for number in range(size + 1)]
    for client, first, end in zip(clients, edges, edges[1:], strict=False):
        client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
    for node, client in zip(nodes, clients, strict=True):
        bus = client.config_get("cluster-port")["cluster-port"]
        clients[0].execute_command("CLUSTER MEET", LOCALHOST, node.port, bus)
    wait_until(
        lambda: all(_complete(client, size) for client in clients), timeout=60, what="the cluster to be complete"
    )
    return Cluster(nodes)


def start_cluster_node(directory: Path) -> Server:
    """Start a server in cluster mode that serves no slots yet."""
    # the default, 10000 above the port, is no port at all for some
    config = {"cluster-enabled": "yes", "cluster-port": str(free_port()), "cluster-node-timeout": "5000"}
    return start_valkey(directory, config=config)


def _complete(client: redis.Redis, size: int) -> bool:
    info = client.cluster("INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == size


@dataclass(frozen=True)
class Sentinels:
    """A master, a replica, and three sentinels that watch them."""

    members: list[Server]
    watchers: list[Program]
    ports: list[int]

    @property
    def hosts(self) -> list[str]:
        """Return where the sentinels are, as host:port."""
        return [f"{LOCALHOST}:{port}" for port in self.ports]

    def master(self) -> Server:
        """Return the present master, as the last of the sentinels knows it."""
        with redis.Redis(port=self.ports[-1], password=SENTINELS_PASSWORD) as client:
            _, port = client.sentinel_get_master_addr_by_name(MASTER_NAME)
        return next(member for member in self.members if member.port == port)

    def stop(self) -> None:
        """Stop them all."""
        for program in (*self.watchers, *(member.program for member in self.members)):
            program.kill()


def start_sentinels(directory: Path) -> Sentinels:
    """Start a master with a replica and three sentinels, all behind passwords, and wait until each knows all."""
    config = {"requirepass": PASSWORD, "masterauth": PASSWORD, "repl-diskless-sync-delay": "0"}
    master = start_valkey(directory / "master", config=config)
    replica = start_valkey(directory / "replica", config={**config, "replicaof": f"{LOCALHOST} {master.port}"})
    ports = [free_port() for _ in range(3)]
    watchers = [_start_sentinel(directory / f"sentinel{port}", port, master.port) for port in ports]
    wait_until(lambda: all(map(_knows_all, ports)), timeout=60, what="the sentinels to know each other")
    return Sentinels([master, replica], watchers, ports)


def _start_sentinel(directory: Path, port: int, master: int) -> Program:
    directory.mkdir(parents=True)
    config = directory / "sentinel.conf"
    config.write_text(f"""
        port {port}
        dir {directory}
        requirepass {SENTINELS_PASSWORD}
        sentinel sentinel-pass {SENTINELS_PASSWORD}
        sentinel monitor {MASTER_NAME} {LOCALHOST} {master} 2
        sentinel auth-pass {MASTER_NAME} "{PASSWORD}"
        sentinel down-after-milliseconds {MASTER_NAME} 5000
        sentinel failover-timeout {MASTER_NAME} 5000
    """)
    program = start_program([server_binary(), str(config), "--sentinel"], name="sentinel", directory=directory)
    program.wait_for_output("+monitor master")
    return program


def _knows_all(port: int) -> bool:
    with redis.Redis(port=port, password=SENTINELS_PASSWORD) as client:
        master = client.sentinel_master(MASTER_NAME)
    return master["num-other-sentinels"] == 2 and master["num-slaves"] == 1


@dataclass(frozen=True)
class Certificate:
    """A certificate of 127.0.0.1 that is its own authority, in files."""

    certificate: Path
    key: Path

    @property
    def config(self) -> dict[str, str]:
        """Return what makes a server speak TLS on its only port, to clients without certificates."""
        files = {"tls-cert-file": str(self.certificate), "tls-key-file": str(self.key)}
        return {**files, "tls-ca-cert-file": str(self.certificate), "tls-auth-clients": "no"}


def make_certificate(directory: Path) -> Certificate:
    """Make a certificate with openssl."""
    made = Certificate(directory / "certificate.pem", directory / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", f"subjectAltName=IP:{LOCALHOST}"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return made
