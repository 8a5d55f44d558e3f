"""An HTTP server that keeps what is posted to it, for tests of webhooks."""

from __future__ import annotations

import threading
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType


class Receiver:
    """Listens on a free port while in the context.

    Attributes:
        requests: headers and body of each request.
        answers: statuses of the next answers, 200 when none is left; None: no answer at all.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[Message, bytes]] = []
        self.answers: list[int | None] = []
        self._leave = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def take(self, headers: Message, body: bytes) -> int:
        """Keep a request and return the status of its answer."""
        self.requests.append((headers, body))
        status = self.answers.pop(0) if self.answers else 200
        if status is None:
            self._leave.wait()
        return status or 200

    def __enter__(self) -> Receiver:  # noqa: PYI034 - Self is of Python 3.11
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave.set()
        self._server.shutdown()
        self._server.server_close()


def _handler(receiver: Receiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(receiver.take(self.headers, body))
            self.send_header("Location", f"{receiver.url}/elsewhere")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Write nothing to stderr."""

    return Handler
