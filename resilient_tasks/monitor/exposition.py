"""The metrics of the catalogue as text for Prometheus, made ready before anybody asks, and a server that sends it.

prometheus-client would write this text, too, but while it is waited for: a thousand breakers have thirty thousand
lines. Registries of prometheus-client, which want its objects, are served by ``resilient_tasks.prometheus``.
"""

from __future__ import annotations

import gzip
import logging
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from itertools import chain
from math import isinf
from socketserver import ThreadingTCPServer
from typing import Any

from resilient_tasks.monitor.metrics import HEALTH, METRICS, Metric, Subject
from resilient_tasks.monitor.readings import PATIENCE, Readings

logger = logging.getLogger("resilient_tasks")

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Exposition:
    """What a scrape is answered with, as of the latest reading.

    Args:
        read: reads all breakers; first at once, so that they are there by the first scrape.
        patience: longest time in seconds that a scrape may wait for it.
    """

    def __init__(self, read: Callable[[], Sequence[Subject]], patience: float = PATIENCE) -> None:
        self._readings = Readings(lambda: text_of(read()), patience)
        self._readings.begin()

    def text(self) -> bytes:
        """Return the values of all metrics; may wait for the store, see :class:`Readings`."""
        reading = self._readings.latest()
        told = reading.health().items()
        health = (_head(name, "gauge", HEALTH[name]) + f"{name} {_number(value)}\n" for name, value in told)
        return "".join(health).encode() + (reading.content or b"")


def text_of(subjects: Sequence[Subject]) -> bytes:
    """Return the values of all metrics but those of the reading itself."""
    labelled = [(subject, _label("breaker", subject.snapshot.name)) for subject in subjects]
    return "".join(chain.from_iterable(_lines(metric, labelled) for metric in METRICS)).encode()


def _lines(metric: Metric, labelled: Sequence[tuple[Subject, str]]) -> Iterator[str]:
    yield _head(metric.name, metric.kind, metric.text)
    for subject, breaker in labelled:
        for value, others in metric.points(subject):
            labels = breaker if not others else ",".join([breaker, *map(_label, metric.labels, others)])
            yield f"{metric.name}{{{labels}}} {value!r}\n"


def _head(name: str, kind: str, text: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"


def _label(name: str, text: str) -> str:
    escaped = text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return f'{name}="{escaped}"'


def _number(value: float) -> str:
    return "+Inf" if isinf(value) else repr(value)


class ExpositionServer(ThreadingTCPServer):
    """Answers scrapes by HTTP, each in a thread of its own; ``serve_forever`` begins.

    Args:
        exposition: what to answer with.
        address: of the interface to listen on.
        port: to listen on; 0: any that is free.

    Raises:
        OSError: nobody can listen there.
    """

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, exposition: Exposition, address: str, port: int) -> None:
        self.exposition = exposition
        self.address_family, *_, place = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        super().__init__(place, _Scrape)  # type: ignore[arg-type] # of IPv6 it has four parts

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the signature is the base's
        """Log what went wrong with one scrape: most often somebody has lost patience."""
        logger.warning("a scrape by %s was not answered: %r", client_address[0], sys.exc_info()[1])


class _Scrape(BaseHTTPRequestHandler):
    server: ExpositionServer
    timeout = 30  # seconds that a request may take to arrive

    def do_GET(self) -> None:
        body = self.server.exposition.text()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", CONTENT_TYPE)
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            self.send_header("Content-Encoding", "gzip")
            body = gzip.compress(body, compresslevel=1)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Log nothing."""
