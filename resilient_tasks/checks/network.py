"""Checks of something that answers on the network: ``http_check`` and ``tcp_check``."""

from __future__ import annotations

import base64
import http.client
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from resilient_tasks.checks.base import Check, HealthCheckError, is_text, refuse, time_left
from resilient_tasks.errors import ConfigurationError

_HIGHEST_PORT = 65_535
_STATUSES = range(100, 600)
_PRINTABLE = frozenset(map(chr, range(0x21, 0x7F)))
_TOKEN = frozenset("!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


@dataclass(frozen=True, slots=True)
class Address:
    """An ``http://`` or ``https://`` URL taken apart; what it says of user, password and query is never shown.

    Args:
        check: whose argument it is.
        argument: which one.
        url: as the user gave it.

    Raises:
        ConfigurationError: it is no such URL.
    """

    check: str
    argument: str
    url: str

    def __post_init__(self) -> None:
        if not self._is_valid():
            shown = self.url.partition("?")[0] if isinstance(self.url, str) and "@" not in self.url else "..."
            refuse(self.check, self.argument, shown, "http://host/path or https://host/path, in ASCII")

    def _is_valid(self) -> bool:
        if not is_text(self.url) or not set(self.url) <= _PRINTABLE:
            return False
        try:
            parts = self.parts
            return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            return False

    @property
    def parts(self) -> SplitResult:
        """The URL's parts."""
        return urlsplit(self.url)

    def __str__(self) -> str:
        parts = self.parts
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"

    def credentials(self) -> dict[str, str]:
        """Return the header that stands for user and password in the URL."""
        userinfo = unquote(self.parts.netloc.rpartition("@")[0])
        return {"Authorization": f"Basic {base64.b64encode(userinfo.encode()).decode()}"} if userinfo else {}

    def ask(
        self, method: str, headers: Mapping[str, str], longest_body: int = 0
    ) -> tuple[http.client.HTTPResponse, bytes]:
        """Make one request and return the answer, whatever its status, with so many bytes of its body.

        Raises:
            OSError: there was no answer.
            HealthCheckError: the answer is no HTTP, or none at all.
        """
        parts = self.parts
        kind: Any = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname, parts.port, timeout=time_left())
        target = f"{parts.path or '/'}{f'?{parts.query}' if parts.query else ''}"
        try:
            connection.request(method, target, headers={**self.credentials(), "Connection": "close", **headers})
            response = connection.getresponse()
            return response, response.read(longest_body)
        except http.client.HTTPException as error:
            raise HealthCheckError(f"no valid answer ({type(error).__name__})") from error
        finally:
            connection.close()


def http_check(
    url: str,
    expect: int | Collection[int] = range(200, 300),
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
) -> Check:
    """Make an HTTP request; the dependency is well if the answer's status is among those expected.

    A redirect is an answer like any other and is not followed: give the URL it leads to, or expect it.
    Proxies of the environment are not used. A ``Retry-After`` of the answer sets the breaker's open time.

    Args:
        url: ``http://`` or ``https://``; user and password in it are sent as basic authentication.
        expect: one status or several.
        method: of the request, which has no body.
        headers: of the request.

    Raises:
        ConfigurationError: an argument is not allowed.
    """
    address = Address("http_check", "url", url)
    expected = _statuses(expect)
    if not is_text(method) or not set(method) <= _TOKEN:
        refuse("http_check", "method", method, "the name of an HTTP method, such as 'GET' or 'HEAD'")
    sent = _headers("http_check", headers)

    def look() -> None:
        response, _ = address.ask(method.upper(), sent)
        if response.status not in expected:
            wanted = _listed(expected)
            found = f"answered {response.status}, expected {wanted}"
            raise HealthCheckError(found, response.status, dict(response.headers))

    return Check(f"http_check({str(address)!r})", look)


def _statuses(expect: Any) -> Collection[int]:
    statuses = (expect,) if isinstance(expect, int) else expect
    is_collection = isinstance(statuses, Collection) and bool(statuses)
    if not is_collection or not all(type(status) is int and status in _STATUSES for status in statuses):
        refuse("http_check", "expect", expect, "a status from 100 to 599, or several, such as range(200, 300)")
    return statuses if isinstance(statuses, range) else tuple(statuses)


def _listed(statuses: Collection[int]) -> str:
    if isinstance(statuses, range) and statuses.step == 1:
        return f"{statuses[0]}..{statuses[-1]}"
    return ", ".join(map(str, sorted(statuses)))


def _headers(check: str, headers: Any) -> dict[str, str]:
    given = {} if headers is None else headers
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"{check}: headers: allowed is a mapping of strings to strings")
    for name, value in given.items():
        if not is_text(name) or not set(name) <= _TOKEN or not isinstance(value, str) or not value.isprintable():
            raise ConfigurationError(f"{check}: header {name!r}: allowed are names and values of one line each")
    return dict(given)


def tcp_check(host: str, port: int) -> Check:
    """Open a connection and close it again; the dependency is well if that succeeds.

    Args:
        host: name or address.
        port: from 1 to 65535.

    Raises:
        ConfigurationError: an argument is not allowed.
    """
    if not is_text(host):
        refuse("tcp_check", "host", host, "a host name or address")
    if type(port) is not int or not 1 <= port <= _HIGHEST_PORT:
        refuse("tcp_check", "port", port, f"an integer from 1 to {_HIGHEST_PORT}")

    def look() -> None:
        socket.create_connection((host, port), timeout=time_left()).close()

    return Check(f"tcp_check({host!r}, {port})", look)
