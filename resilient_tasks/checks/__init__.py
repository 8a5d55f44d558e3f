"""Health checks to choose from, for :meth:`Breaker.probe`.

::

    payments.probe(http_check("https://pay.example/health"), timeout=5)

Each is a callable without arguments that returns if the dependency is well and raises
:class:`HealthCheckError` if it is not. They keep to the time limit of the probe that runs them.
"""

from resilient_tasks.checks.base import Check, HealthCheckError
from resilient_tasks.checks.combined import all_of, any_of
from resilient_tasks.checks.consul import consul_check
from resilient_tasks.checks.local import command_check, heartbeat
from resilient_tasks.checks.network import http_check, tcp_check
from resilient_tasks.checks.rpc import grpc_check

__all__ = [
    "Check",
    "HealthCheckError",
    "all_of",
    "any_of",
    "command_check",
    "consul_check",
    "grpc_check",
    "heartbeat",
    "http_check",
    "tcp_check",
]
