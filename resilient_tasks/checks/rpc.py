"""``grpc_check``: gRPC's own health checking protocol.

Request and answer of the protocol have one field each, so grpcio is all that is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from resilient_tasks.checks.base import Check, HealthCheckError, is_text, refuse, time_left
from resilient_tasks.errors import ConfigurationError

_METHOD = "/grpc.health.v1.Health/Check"
_SERVICE_FIELD = b"\x0a"  # field 1, a string
_SERVING = b"\x08\x01"  # field 1, an enum: SERVING
_STATUSES = {b"": "UNKNOWN", b"\x08\x00": "UNKNOWN", b"\x08\x02": "NOT_SERVING", b"\x08\x03": "SERVICE_UNKNOWN"}
_LONGEST_NAME = 127  # bytes: longer strings need a longer length prefix


def grpc_check(target: str, service: str = "", *, tls: bool = False) -> Check:
    """Make a call of ``grpc.health.v1.Health``; the dependency is well if it says SERVING.

    It needs the extra ``resilient_tasks[grpc]``.

    Args:
        target: ``host:port``, or any other target that gRPC knows.
        service: full name of one service; empty: the server as a whole.
        tls: encrypt, and check the server's certificate by gRPC's own root certificates.

    Raises:
        ConfigurationError: an argument is not allowed, or grpcio is not installed.
    """
    if not is_text(target):
        refuse("grpc_check", "target", target, "host:port")
    if not isinstance(service, str) or len(service.encode()) > _LONGEST_NAME:
        refuse("grpc_check", "service", service, f"a string of up to {_LONGEST_NAME} bytes")
    if importlib.util.find_spec("grpc") is None:
        raise ConfigurationError("grpc_check needs grpcio: pip install 'resilient_tasks[grpc]'")

    def look() -> None:
        answer = _call(target, service, tls=tls)
        if answer != _SERVING:
            raise HealthCheckError(f"is {_STATUSES.get(answer, 'unknown')}, not SERVING")

    shown = f"{target!r}, {service!r}" if service else repr(target)
    return Check(f"grpc_check({shown})", look)


def _call(target: str, service: str, *, tls: bool) -> bytes:
    grpc: Any = importlib.import_module("grpc")  # optional, and none of a pool process' business
    channel = grpc.secure_channel(target, grpc.ssl_channel_credentials()) if tls else grpc.insecure_channel(target)
    name = service.encode()
    request = _SERVICE_FIELD + bytes([len(name)]) + name if name else b""
    with channel:
        try:
            answer: bytes = channel.unary_unary(_METHOD)(request, timeout=time_left())
        except grpc.RpcError as error:
            raise HealthCheckError(f"the call ended with {error.code().name}") from error
    return answer
