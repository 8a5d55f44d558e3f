"""``Webhook``: each transition of a breaker as an HTTP request to a URL of the operator's choice.

``docs/notifications.md`` describes the body and the signature for whoever writes the receiver. Requests go out one
after the other from a thread of their own, so a receiver that hangs holds up nobody but the next request.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import json
import logging
import time
import urllib.error
import urllib.request
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import tenacity

from resilient_tasks.core.model import Transition
from resilient_tasks.monitor.events import event_fields, event_type
from resilient_tasks.monitor.mailer import Mailer

logger = logging.getLogger("resilient_tasks")

SIGNATURE = "X-Resilient-Tasks-Signature"
TIMESTAMP = "X-Resilient-Tasks-Timestamp"
MOST_WAITING = 100
MOST_ATTEMPTS = 6
LONGEST_PAUSE = 30.0  # seconds between two attempts
TIMEOUT = 5.0  # seconds that a receiver has for its answer


class NotAcceptedError(Exception):
    """The receiver answered, and not with a 2xx."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status

    def __str__(self) -> str:
        return f"HTTP status {self.status}"


class Webhook:
    """Sends transitions to one URL, as a listener of the announcer.

    Args:
        url: of the receiver, http or https. It is never logged but for scheme and host: the path may be a secret.
        secret: key of the signature; ``None``: requests are not signed.
        namespace: of the breakers, part of the body.
    """

    def __init__(self, url: str, secret: str | None, namespace: str) -> None:
        self._url = url
        self._secret = None if secret is None else secret.encode()
        self._namespace = namespace
        self._mailer = Mailer("webhooks", most_waiting=MOST_WAITING)
        self._attempts = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(MOST_ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE),
            retry=tenacity.retry_if_exception(_is_temporary),
            reraise=True,
        )

    def __call__(self, transition: Transition) -> None:
        """Have a transition sent soon."""
        self._mailer.post(partial(self._send, body_of(transition, self._namespace)))

    def _send(self, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        try:
            self._attempts(self._post, data)
        except Exception as error:  # noqa: BLE001 - whatever a network, a proxy or a stranger's server can do
            place = "{0.scheme}://{0.hostname}".format(urlsplit(self._url))
            cause = error if isinstance(error, NotAcceptedError) else type(error).__name__
            logger.warning("webhook %s did not take %s of breaker %s: %s", place, body["event"], body["breaker"], cause)

    def _post(self, data: bytes) -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "resilient_tasks"}
        if self._secret is not None:
            headers |= signature(self._secret, str(int(time.time())), data)
        request = urllib.request.Request(self._url, data, headers)  # noqa: S310 - the settings have checked the scheme
        try:
            with _opener.open(request, timeout=TIMEOUT):
                pass
        except urllib.error.HTTPError as error:
            error.close()
            raise NotAcceptedError(error.code) from None


def body_of(transition: Transition, namespace: str) -> dict[str, Any]:
    """Return what a receiver is told of a transition; ``id`` is the same in every attempt to tell of it."""
    event = event_type(transition)
    return {
        "id": f"{namespace}:{transition.name}:{transition.epoch}:{event}",
        "event": event,
        "namespace": namespace,
        "state": str(transition.state),
        "at": transition.at,
        **event_fields(transition),
    }


def signature(secret: bytes, timestamp: str, body: bytes) -> dict[str, str]:
    """Return the headers that show a receiver who has sent a body, and when."""
    digest = hmac.new(secret, timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()
    return {TIMESTAMP: timestamp, SIGNATURE: f"sha256={digest}"}


def _is_temporary(error: BaseException) -> bool:
    """Whether another attempt may fare better: a receiver that says no does not change its mind."""
    if isinstance(error, NotAcceptedError):
        return error.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR or error.status in _PATIENT
    return isinstance(error, (OSError, http.client.HTTPException))


_PATIENT = (http.HTTPStatus.REQUEST_TIMEOUT, http.HTTPStatus.TOO_MANY_REQUESTS)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would take body and signature to somebody whom nobody has named."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: it becomes an error like any status that is no success."""


_opener = urllib.request.build_opener(_NoRedirects)
