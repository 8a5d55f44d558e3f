"""``grpc_check``: gRPC's own health checking protocol."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from resilient_tasks.checks.base import Check, HealthCheckError, is_text, refuse, time_left
from resilient_tasks.checks.programs import run_program
from resilient_tasks.errors import ConfigurationError

_PROGRAM = str(Path(__file__).with_name("grpc_call.py"))
_LONGEST_NAME = 127  # bytes


def grpc_check(target: str, service: str = "", *, tls: bool = False) -> Check:
    """Make a call of ``grpc.health.v1.Health``; the dependency is well if it says SERVING.

    It needs the extra ``resilient_tasks[grpc]``. Each call is made in a process of its own, because gRPC does not
    survive the forks of a worker's main process.

    Args:
        target: ``host:port``, or any other target that gRPC knows.
        service: full name of one service; empty: the server as a whole.
        tls: encrypt, and check the server's certificate by gRPC's own root certificates.

    Raises:
        ConfigurationError: an argument is not allowed, or grpcio is not installed.
    """
    if not is_text(target) or target.startswith("-") or "\0" in target:
        refuse("grpc_check", "target", target, "host:port")
    if not isinstance(service, str) or "\0" in service or len(service.encode()) > _LONGEST_NAME:
        refuse("grpc_check", "service", service, f"a string of up to {_LONGEST_NAME} bytes")
    if importlib.util.find_spec("grpc") is None:
        raise ConfigurationError("grpc_check needs grpcio: pip install 'resilient_tasks[grpc]'")

    def look() -> None:
        timeout = time_left()
        command = [sys.executable, _PROGRAM, target, service, "tls" if tls else "plain", str(timeout)]
        _, status = run_program(command, timeout, wants_output=True)
        if status.strip() != "SERVING":
            raise HealthCheckError(f"said {status.strip() or 'nothing'}, expected SERVING")

    shown = f"{target!r}, {service!r}" if service else repr(target)
    return Check(f"grpc_check({shown})", look)
