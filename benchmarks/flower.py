"""Flower with a thousand breakers: how long its pages and its API take, and its health check with the store frozen.

On a busy machine the time on the wall is that of its other jobs, so what Flower computes per request is shown, too.
"First after a pause" is a request after a time without any; after that Flower reads the store more often for a while.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx
import psutil

from benchmarks._rig import verdict
from resilient_tasks.flower.service import IDLE_REFRESH
from workers.processes import LOCALHOST, celery_command, free_port, start_program, start_valkey

ROUNDS = 20
PAUSE = 0.6  # seconds
PAGES = ("/breakers", "/breakers?json=1", "/api/breakers", "/api/breakers/dependency-0007", "/metrics")
PAGE_LIMIT, HEALTH_LIMIT = 0.150, 0.050  # seconds
LOGIN = ("bench", "bench")


def took(ask: Callable[[], object]) -> float:
    """Return the seconds that something takes."""
    began = time.perf_counter()
    ask()
    return time.perf_counter() - began


class Measured(NamedTuple):
    """Seconds on the wall of each request, and seconds that Flower computed per request."""

    times: list[float]
    computed: float


def measure(
    client: httpx.Client, flower: psutil.Process, page: str, *, rounds: int = ROUNDS, pause: float = PAUSE
) -> Measured:
    """Ask for a page again and again."""

    def ask() -> None:
        client.get(page).raise_for_status()

    times, before = [], flower.cpu_times()
    for _ in range(rounds):
        time.sleep(pause)
        times.append(took(ask))
    after = flower.cpu_times()
    return Measured(times, (after.user + after.system - before.user - before.system) / rounds)


def report(name: str, measured: Measured, limit: float) -> None:
    ok = verdict(met=median(measured.times) <= limit)
    wall = f"{median(measured.times) * 1e3:8.0f} ms {max(measured.times) * 1e3:8.0f} ms"
    print(f"{name:36}{wall} {measured.computed * 1e3:8.0f} ms   <= {limit * 1e3:.0f} ms: {ok}")


def open_some(count: int) -> None:
    """Have some of the breakers refuse everything."""
    logging.getLogger("resilient_tasks").setLevel(logging.ERROR)  # each transition is worth a warning
    project = importlib.import_module("benchmarks._many")
    for breaker in list(project.resilience.breakers.values())[:count]:
        breaker.isolate(reason="the provider has asked us to wait until tomorrow morning")


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        os.environ["BENCH_BROKER"] = server.url(0)
        open_some(100)
        url = f"http://{LOCALHOST}:{(port := free_port())}"
        options = (f"--address={LOCALHOST}", f"--port={port}", f"--basic-auth={':'.join(LOGIN)}")
        command = celery_command("benchmarks._many", "breakers", "flower", *options)
        program = start_program(command, name="flower", directory=Path(directory))
        program.wait_for_output("Visit me at")
        print(f"\n{'1,000 breakers':36}{'median':>11} {'longest':>11} {'computed':>11}\n")
        flower = psutil.Process(program.pid)
        with httpx.Client(base_url=url, auth=LOGIN, timeout=30) as client:
            first = measure(client, flower, "/api/breakers", rounds=5, pause=IDLE_REFRESH + 2)
            report("/api/breakers, first after a pause", first, PAGE_LIMIT)
            for page in PAGES:
                report(page, measure(client, flower, page), PAGE_LIMIT)
            server.program.freeze()
            report("/healthcheck, store frozen", measure(client, flower, "/healthcheck"), HEALTH_LIMIT)
            server.program.thaw()
        program.stop()
        server.stop()


if __name__ == "__main__":
    main()
