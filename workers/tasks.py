"""The tasks: each guards its dependency with a breaker and says what to do while that is open."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import httpx

from resilient_tasks import cached
from workers.app import app, setting


@app.task(breaker="payments", acks_late=True)
def charge(order_id: int) -> dict[str, Any]:
    """Charge an order. It must not be lost: it waits while payments is down, and survives a dead worker."""
    return call("POST", f"{setting('PAYMENTS_URL')}/charges/{order_id}")


@app.task(breaker="accounts", fallback=cached(max_age=3600), on_open="fail")
def balance(account_id: int) -> dict[str, Any]:
    """Look up a balance. A person waits for it: the last answer is better than a late one."""
    return call("GET", f"{setting('ACCOUNTS_URL')}/{account_id}")


@app.task(breaker="mail")
def send_mail(number: int) -> dict[str, Any]:
    """Send a mail: healthy work on the same workers, which must keep its rate."""
    return call("POST", f"{setting('MAIL_URL')}/messages/{number}")


def call(method: str, url: str) -> dict[str, Any]:
    """Call a service and return its answer; raises :class:`httpx.HTTPError`."""
    response = _client(os.getpid()).request(method, url)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


@lru_cache(maxsize=1)
def _client(_process: int) -> httpx.Client:
    """Return the process's client. Made at the first call, after the fork: connections cannot be shared.

    It has no time-out, as many clients in production: the drill shows that a hang is noticed all the same.
    """
    return httpx.Client(timeout=None)
