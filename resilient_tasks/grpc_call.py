"""The program that ``grpc_check`` runs: one call of gRPC's health service; prints what it answered.

gRPC's library does not survive the forks of a worker's main process, nor share a thread with greenlets, so the
call is made in a process of its own. Request and answer have one field each; grpcio alone is all that is needed.
It imports nothing else, because it is started for every check.
"""

import sys

import grpc

_METHOD = "/grpc.health.v1.Health/Check"
_SERVICE_FIELD = b"\x0a"  # field 1, a string
_STATUS_FIELD = b"\x08"  # field 1, an enum; left out if it is 0
_STATUSES = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def health_of(target: str, service: str, transport: str, timeout: float) -> str:
    """Return the name of the health status, or of the gRPC status with which the call failed.

    ``service`` has at most 127 bytes, so that its length takes one byte; ``transport`` is ``tls`` or ``plain``.
    """
    is_tls = transport == "tls"
    channel = grpc.secure_channel(target, grpc.ssl_channel_credentials()) if is_tls else grpc.insecure_channel(target)
    name = service.encode()
    request = _SERVICE_FIELD + bytes([len(name)]) + name if name else b""
    with channel:
        try:
            answer = channel.unary_unary(_METHOD)(request, timeout=timeout)
        except grpc.RpcError as error:
            return str(error.code().name)
    number = answer[1] if answer[:1] == _STATUS_FIELD else 0
    return _STATUSES[number] if number < len(_STATUSES) else f"status {number}"


if __name__ == "__main__":
    print(health_of(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))  # noqa: T201 - how a program answers
