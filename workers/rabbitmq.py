"""A RabbitMQ node of our own, to see the same outage on AMQP."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kombu import Connection

from workers.processes import (
    LOCALHOST,
    Program,
    accepts_connections,
    free_port,
    is_recorded_alive,
    start_program,
    wait_until,
)


@dataclass
class RabbitMQ:
    """A RabbitMQ node of our own.

    Attributes:
        port: its TCP port for clients on this machine.
        program: the running node.
        port_mapper: Erlang's; it outlives restarts of the node.
        env: what node and ``rabbitmqctl`` need to find each other.
    """

    port: int
    program: Program
    port_mapper: Program
    env: Mapping[str, str]

    @property
    def url(self) -> str:
        """For clients."""
        return f"amqp://guest:guest@{LOCALHOST}:{self.port}//"

    def start_again(self) -> None:
        """Bring back a node that was killed, with its data, and wait until it accepts clients."""
        directory = self.program.log.parent
        record = directory / "rabbitmq.pid"
        wait_until(lambda: not is_recorded_alive(record), what="Erlang's helpers to notice that their node is gone")
        self.program = _start_node(directory, self.port, self.env)

    def control(self, *command: str) -> str:
        """Run a ``rabbitmqctl`` command and return what it prints. Takes a second or two."""
        binary = _installed("rabbitmqctl")
        if binary is None:
            raise FileNotFoundError("no rabbitmqctl on the PATH")
        options = [binary, "--quiet", "--node", self.env["RABBITMQ_NODENAME"], *command]
        return subprocess.run(
            options, env={**os.environ, **self.env}, check=True, capture_output=True, text=True
        ).stdout

    def delete_queues(self, prefix: str) -> None:
        """Delete all queues whose names begin with ``prefix``, with what is in them. Takes a second or two."""
        names = self.control("list_queues", "name").split()
        with Connection(self.url, connect_timeout=60) as connection:
            for name in names:
                if name.startswith(prefix):
                    connection.default_channel.queue_delete(name)

    def stop(self) -> None:
        """Stop the node and its port mapper."""
        self.program.stop(timeout=30.0)
        self.port_mapper.stop()


def rabbitmq_binary() -> str | None:
    """Return the path of RabbitMQ's server; None if it is not installed."""
    return _installed("rabbitmq-server")


def _installed(command: str) -> str | None:
    """Debian's wrappers on the PATH insist on a user of their own, so the commands behind them come first."""
    return shutil.which(command, path=f"/usr/lib/rabbitmq/bin{os.pathsep}{os.environ.get('PATH', '')}")


def start_rabbitmq(directory: Path) -> RabbitMQ:
    """Start a RabbitMQ node and wait until it accepts clients. Takes seconds.

    Args:
        directory: its data, logs, cookie and pid files; made if missing.

    Raises:
        FileNotFoundError: it is not installed.
        StartError: it did not start.
    """
    if rabbitmq_binary() is None:
        raise FileNotFoundError("no rabbitmq-server on the PATH")
    directory = directory.resolve()
    port, port_mapper_port = free_port(), free_port()
    # Left to itself, Erlang starts a daemon on a fixed port that outlives the node.
    port_mapper = start_program(["epmd", "-port", str(port_mapper_port)], name="epmd", directory=directory)
    port_mapper.wait_ready(lambda: accepts_connections(port_mapper_port))
    env = {
        "HOME": str(directory),
        "ERL_EPMD_PORT": str(port_mapper_port),
        "RABBITMQ_NODENAME": f"node-{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": LOCALHOST,
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
        "RABBITMQ_CONFIG_FILE": str(directory / "none"),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+sbwt none",  # do not spin on a machine that others use too
    }
    return RabbitMQ(port, _start_node(directory, port, env), port_mapper, env)


def _start_node(directory: Path, port: int, env: Mapping[str, str]) -> Program:
    program = start_program([rabbitmq_binary() or ""], name="rabbitmq", directory=directory, env=env)
    program.wait_ready(lambda: accepts_connections(port), timeout=90.0)
    return program
