"""The dependency of the examples, an HTTP service that can be made ill: ``curl -X PUT URL -d '{"status": 503}'``."""

from __future__ import annotations

import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Service:
    """Answers every GET and POST with ``status``, with a ``Retry-After`` if that is given, and counts its calls."""

    def __init__(self) -> None:
        self.status = 200
        self.retry_after: int | None = None
        self.calls: Counter[str] = Counter()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.body()
                service.calls[self.path] += 1
                self.answer(service.status, {"text": f"answer {sum(service.calls.values())}"})

            do_POST = do_GET  # noqa: N815 - as above

            def do_PUT(self) -> None:
                wanted = json.loads(self.body())
                service.status = wanted.get("status", 200)
                service.retry_after = wanted.get("retry_after")
                self.answer(200, {"status": service.status, "retry_after": service.retry_after})

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length", 0)))

            def answer(self, status: int, content: dict[str, Any]) -> None:
                payload = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                if status != 200 and service.retry_after is not None:  # noqa: PLR2004 - HTTP's OK
                    self.send_header("Retry-After", str(service.retry_after))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"

    def close(self) -> None:
        """Stop it."""
        self._server.shutdown()
        self._server.server_close()
