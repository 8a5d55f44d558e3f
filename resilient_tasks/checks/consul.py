"""``consul_check``: ask Consul whether a service has instances that are well."""

from __future__ import annotations

import json
from urllib.parse import quote

from resilient_tasks.checks.base import Check, HealthCheckError, is_text, refuse
from resilient_tasks.checks.network import Address

_OK = 200
_LONGEST_ANSWER = 16 * 1024 * 1024  # bytes


def consul_check(service: str, address: str = "http://127.0.0.1:8500", token: str | None = None) -> Check:
    """Ask Consul; the dependency is well if at least one instance passes all its checks there.

    A Consul that does not answer is a failure, too: use ``any_of`` with a second opinion if that is too strict.

    Args:
        service: its name in Consul.
        address: URL of Consul's HTTP interface.
        token: for Consul's access control.

    Raises:
        ConfigurationError: an argument is not allowed.
    """
    if not is_text(service):
        refuse("consul_check", "service", service, "the name of a service in Consul")
    if token is not None and not (is_text(token) and token.isascii() and token.isprintable()):
        refuse("consul_check", "token", "...", "a string of one line, or None")
    base = Address("consul_check", "address", address)
    path = f"/v1/health/service/{quote(service, safe='')}?passing"
    url = Address("consul_check", "address", base.url.rstrip("/") + path)
    headers = {} if token is None else {"X-Consul-Token": token}

    def look() -> None:
        response, body = url.ask("GET", headers, _LONGEST_ANSWER)
        if response.status != _OK:
            raise HealthCheckError(f"Consul at {base} answered {response.status}")
        if not _instances(body):
            raise HealthCheckError(f"no instance passes its checks, says Consul at {base}")

    return Check(f"consul_check({service!r})", look)


def _instances(body: bytes) -> list[object]:
    try:
        instances = json.loads(body)
    except ValueError as error:
        raise HealthCheckError("the answer is no JSON") from error
    if not isinstance(instances, list):
        raise HealthCheckError("the answer is no list of instances")
    return instances
