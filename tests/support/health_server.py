"""A gRPC server with gRPC's own health service, in a process of its own: its threads do not survive our forks.

Prints its port, then sets the status of a service for each line ``name STATUS`` that it reads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc


class HealthServer:
    """The server as a test sees it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.target = f"127.0.0.1:{self._read()}"

    def set(self, service: str, status: str) -> None:
        """Set the status of a service and wait until it is set."""
        assert self._process.stdin is not None
        print(service, status, file=self._process.stdin, flush=True)
        assert self._read() == status

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@contextmanager
def start_health_server() -> Iterator[HealthServer]:
    """Start a server; it ends with the context, or with this process."""
    command = [sys.executable, __file__]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield HealthServer(process)
        finally:
            process.kill()


def serve() -> None:
    servicer = health.HealthServicer()
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    for line in sys.stdin:
        service, status = line.rstrip("\n").split(" ")
        servicer.set(service, health_pb2.HealthCheckResponse.ServingStatus.Value(status))
        print(status, flush=True)


if __name__ == "__main__":
    serve()
