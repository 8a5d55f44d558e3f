"""The text that Prometheus is sent: what prometheus-client would write, and by what server."""

from __future__ import annotations

import gzip
import http.client
import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from resilient_tasks import StoreError
from resilient_tasks.monitor.exposition import Exposition, ExpositionServer
from resilient_tasks.monitor.metrics import HEALTH, Subject
from resilient_tasks.prometheus import BreakerCollector
from tests.support.doubles import wait_until
from tests.unit.test_metrics import OPEN, QUIET

Told = list[tuple[str, str, str, frozenset[tuple[str, str]], float]]
UNSTEADY = {"celery_breaker_view_age_seconds", "celery_breaker_scrape_duration_seconds"}


def told(text: bytes) -> Told:
    """Return what Prometheus reads: names, kinds, help, labels and values."""
    return [
        (sample.name, family.type, family.documentation, frozenset(sample.labels.items()), sample.value)
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name not in UNSTEADY
    ]


@contextmanager
def served(exposition: Exposition, address: str = "127.0.0.1") -> Iterator[str]:
    """Serve it; yield the URL."""
    with ExpositionServer(exposition, address, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{f'[{address}]' if ':' in address else address}:{server.port}/metrics"
        server.shutdown()
        thread.join()


def test_the_text_tells_what_prometheus_client_tells() -> None:
    registry = CollectorRegistry()
    registry.register(BreakerCollector(lambda: [OPEN, QUIET], patience=10.0))
    text = Exposition(lambda: [OPEN, QUIET], patience=10.0).text()
    assert told(text) == told(generate_latest(registry))
    assert len(told(text)) > len(HEALTH)


def test_of_a_store_that_never_answered_it_tells_just_that() -> None:
    def away() -> Sequence[Subject]:
        raise StoreError("the cable is pulled")

    text = Exposition(away, patience=10.0).text()
    assert {line.split(" ")[0] for line in text.decode().splitlines() if line[0] != "#"} == set(HEALTH)
    assert b"\ncelery_breaker_up 0.0\n" in text
    assert b"\ncelery_breaker_view_age_seconds +Inf\n" in text


@pytest.mark.parametrize(("encoding", "decode"), [("gzip, br", gzip.decompress), ("", bytes)])
def test_it_is_sent_as_it_is_asked_for(encoding: str, decode: Callable[[bytes], bytes]) -> None:
    with served(Exposition(lambda: [OPEN], patience=10.0)) as url:
        request = urllib.request.Request(url, headers={"Accept-Encoding": encoding})
        with urllib.request.urlopen(request, timeout=10) as response:
            body = decode(response.read())
    assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert response.headers.get("Content-Encoding", "") == encoding.partition(",")[0]
    assert told(body) == told(Exposition(lambda: [OPEN], patience=10.0).text())


def test_who_does_not_wait_for_the_answer_is_told_in_one_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang_up() -> bytes:
        raise ConnectionResetError

    exposition = Exposition(list, patience=10.0)
    monkeypatch.setattr(exposition, "text", hang_up)
    with served(exposition) as url:
        with pytest.raises(http.client.RemoteDisconnected):
            urllib.request.urlopen(url, timeout=10)
        wait_until(lambda: "a scrape by 127.0.0.1 was not answered: ConnectionResetError(" in caplog.text)
    assert "Traceback" not in caplog.text


def test_it_listens_on_ipv6_too() -> None:
    with served(Exposition(lambda: [OPEN], patience=10.0), "::1") as url, urllib.request.urlopen(url) as response:
        assert response.status == 200
