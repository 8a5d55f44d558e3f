"""A RabbitMQ node of our own, for whoever wants to see the same outage on AMQP."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from workers.processes import LOCALHOST, Program, accepts_connections, free_port, start_program


@dataclass(frozen=True)
class RabbitMQ:
    """A RabbitMQ node of our own; ``url`` is for clients."""

    url: str
    program: Program
    port_mapper: Program

    def stop(self) -> None:
        """Stop the node and its port mapper."""
        self.program.stop(timeout=30.0)
        self.port_mapper.stop()


def rabbitmq_binary() -> str | None:
    """Return the path of RabbitMQ's server; None if it is not installed.

    Debian's wrapper on the PATH insists on a user of its own, so the server behind it comes first.
    """
    return shutil.which("rabbitmq-server", path=f"/usr/lib/rabbitmq/bin{os.pathsep}{os.environ.get('PATH', '')}")


def start_rabbitmq(directory: Path) -> RabbitMQ:
    """Start a RabbitMQ node and wait until it accepts clients. Takes seconds.

    Args:
        directory: its data, logs, cookie and pid files; made if missing.

    Raises:
        FileNotFoundError: it is not installed.
        StartError: it did not start.
    """
    binary = rabbitmq_binary()
    if binary is None:
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
    program = start_program([binary], name="rabbitmq", directory=directory, env=env)
    program.wait_ready(lambda: accepts_connections(port), timeout=90.0)
    return RabbitMQ(f"amqp://guest:guest@{LOCALHOST}:{port}//", program, port_mapper)
