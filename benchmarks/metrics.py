"""A scrape of a thousand breakers, as Prometheus makes it: store there, store frozen, ten thousand open children.

What a scrape computes is printed, too, and what a registry takes in the process itself.
"""

from __future__ import annotations

import gzip
import importlib
import logging
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import ModuleType

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from benchmarks._rig import verdict
from resilient_tasks import Resilience
from resilient_tasks.core.model import Verb
from resilient_tasks.errors import StoreError
from resilient_tasks.prometheus import register
from workers.processes import LOCALHOST, Server, celery_command, free_port, start_program, start_valkey, wait_until

SCRAPES = 20
PAUSE = 1.0  # seconds between two of them
LONGEST_SCRAPE = 1.0  # seconds
CHILDREN = 10_000
ACCEPT = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
UP = "\ncelery_breaker_up 1.0\n"


def measure(title: str, scrape: Callable[[], bytes], process: psutil.Process) -> None:
    """Scrape again and again; print how long that takes, and what the process computes meanwhile."""
    times, body, before = [], b"", process.cpu_times()
    for _ in range(SCRAPES):
        time.sleep(PAUSE)
        began = time.perf_counter()
        body = scrape()
        times.append(time.perf_counter() - began)
    after = process.cpu_times()
    text = text_of(body)
    computed = (after.user + after.system - before.user - before.system) / SCRAPES
    wall = f"{median(times) * 1e3:7.0f} ms {max(times) * 1e3:7.0f} ms {computed * 1e3:7.0f} ms"
    met = verdict(met=median(times) <= LONGEST_SCRAPE)
    lines = len(text.splitlines())
    print(f"{title:32}{wall} {lines:8} lines, up {UP in text:d};  <= {LONGEST_SCRAPE * 1e3:.0f} ms: {met}")


def text_of(body: bytes) -> str:
    """Return what was sent, perhaps compressed."""
    return (gzip.decompress(body) if body.startswith(b"\x1f\x8b") else body).decode()


def by_prometheus_client(project: ModuleType) -> None:
    """Measure the same by a registry of prometheus-client, in the format that Prometheus likes best."""
    registry = CollectorRegistry()
    register(project.app, registry)
    encode, _ = choose_encoder(ACCEPT)
    wait_until(lambda: UP in text_of(encode(registry)), timeout=60)
    measure("prometheus-client, OpenMetrics", lambda: encode(registry), psutil.Process())


def answers(resilience: Resilience) -> bool:
    """Return whether the store answers this process."""
    try:
        resilience.fleet.store.read_shared([next(iter(resilience.breakers.values()))._dependency.spec])
    except StoreError:
        return False
    return True


def open_children(resilience: Resilience) -> None:
    """Open ten thousand children of one breaker."""
    parent = next(iter(resilience.breakers.values()))
    for number in range(CHILDREN):
        resilience.fleet.command(parent.child(str(number))._dependency.spec, Verb.TRIP, "down", "")


def scrape_exporter(project: ModuleType, server: Server, directory: Path) -> None:
    """Measure an exporter in a process of its own."""
    port = free_port()
    url = f"http://{LOCALHOST}:{port}/metrics"
    command = celery_command("benchmarks._many", "breakers", "exporter", f"--port={port}", f"--address={LOCALHOST}")
    program = start_program(command, name="exporter", directory=directory)
    program.wait_for_output("/metrics")
    process = psutil.Process(program.pid)
    request = urllib.request.Request(url, headers={"Accept": ACCEPT, "Accept-Encoding": "gzip"})

    def scrape() -> bytes:
        with urllib.request.urlopen(request, timeout=60) as response:
            return bytes(response.read())

    wait_until(lambda: UP in text_of(scrape()), timeout=60)
    measure("exporter, store there", scrape, process)
    server.program.freeze()
    wait_until(lambda: UP not in text_of(scrape()), timeout=60)
    measure("exporter, store frozen", scrape, process)
    server.program.thaw()
    wait_until(lambda: answers(project.resilience), timeout=60)
    open_children(project.resilience)
    expected = f'hot_children{{breaker="dependency-0000"}} {CHILDREN}\n'
    wait_until(lambda: expected in text_of(scrape()), timeout=60)
    measure("exporter, 10,000 open children", scrape, process)
    program.stop()


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        os.environ["BENCH_BROKER"] = server.url(0)
        logging.getLogger("resilient_tasks").setLevel(logging.CRITICAL)  # each transition is worth a warning
        project = importlib.import_module("benchmarks._many")
        for breaker in project.resilience.breakers.values():
            project.resilience.fleet.command(breaker.spec, Verb.RESET, "", "")
        print(f"\n{'1,000 breakers':32}{'median':>10} {'longest':>10} {'computed':>10}\n")
        by_prometheus_client(project)
        scrape_exporter(project, server, Path(directory))
        project.resilience.fleet.close()
        server.stop()


if __name__ == "__main__":
    main()
