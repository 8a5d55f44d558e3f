"""A Flower with breakers in this process: its event loop runs in a thread, and tests ask it over HTTP."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
from celery import Celery
from celery.events.state import State
from flower.options import default_options
from flower.urls import settings
from tornado.httpserver import HTTPServer
from tornado.ioloop import IOLoop
from tornado.netutil import bind_sockets

from resilient_tasks.flower.application import FlowerWithBreakers

LOCALHOST = "127.0.0.1"


def options_of(**chosen: Any) -> SimpleNamespace:
    """Return Flower's options with its defaults, and those that a test has chosen."""
    return SimpleNamespace(**{**default_options.as_dict(), **chosen})


@contextmanager
def flower_site(app: Celery, **chosen: Any) -> Iterator[httpx.Client]:
    """Serve Flower for an app with some options; yield a client whose base URL it is."""
    started = threading.Event()
    site: dict[str, Any] = {}

    def serve() -> None:
        async def main() -> None:
            ended = asyncio.Event()
            loop = asyncio.get_running_loop()
            flower = FlowerWithBreakers(
                capp=app,
                options=options_of(**chosen),
                io_loop=IOLoop.current(),
                events=SimpleNamespace(state=State()),
                **settings,
            )
            server = HTTPServer(flower)
            sockets = bind_sockets(0, LOCALHOST)
            server.add_sockets(sockets)
            site.update(port=sockets[0].getsockname()[1], end=lambda: loop.call_soon_threadsafe(ended.set))
            started.set()
            await ended.wait()
            server.stop()
            flower.executor.shutdown(wait=False)

        asyncio.run(main())

    thread = threading.Thread(target=serve, name="flower", daemon=True)
    thread.start()
    assert started.wait(60), "Flower did not start"
    end: Callable[[], None] = site["end"]
    try:
        with httpx.Client(base_url=f"http://{LOCALHOST}:{site['port']}", timeout=30) as client:
            yield client
    finally:
        end()
        thread.join(60)
