"""Workers start, stop, are deployed, follow their breakers and report their tasks, as Celery's own do."""

from __future__ import annotations

import signal
import socketserver
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from celery.events.state import State as EventState

from tests.integration.conftest import Shop
from workers.processes import LOCALHOST, Program, celery_command, free_port

# --- shutdown and pool processes -----------------------------------------------------------------


def test_a_warm_shutdown_in_mid_outage_loses_nothing(shop: Shop) -> None:
    shop.open("payments")
    worker = shop.worker()
    waiting = [shop.charge.delay(order) for order in range(5)]
    shop.wait(lambda: shop.waiting("payments") == 5, "the refused ones to wait")
    shop.set_health("slow", "hang")
    running = [shop.poison.delay("slow") for _ in range(2)]
    shop.wait(lambda: len(shop.runs("poison")) == 2, "the pool to be full")
    queued = [shop.charge.delay(order) for order in range(3)]
    worker.send_signal(signal.SIGTERM)
    shop.wait(lambda: "Warm shutdown" in worker.output(), "the shutdown to begin")
    shop.set_health("slow", "down")  # those that run fail, and are deferred while the worker shuts down
    shop.wait(lambda: not worker.running, "the worker to end")
    assert worker.popen.returncode == 0
    assert shop.broker.hlen("unacked") == 0
    assert shop.waiting("payments") + shop.waiting("tolerant") + shop.broker.llen("celery") == 5 + 2 + 3
    shop.set_health("slow", "up")
    shop.close("payments")
    shop.worker()
    shop.wait_done(*waiting, *running, *queued)


def test_pool_processes_that_serve_one_task_each_lose_no_outcome(shop: Shop) -> None:
    shop.worker(arguments=["--max-tasks-per-child=1"])
    shop.set_health("reckless", "down")
    results = [shop.antidote.delay() for _ in range(12)]
    failing = [shop.reckless.delay("reckless") for _ in range(8)]
    shop.wait_done(*results)
    shop.wait(lambda: all(result.state == "FAILURE" for result in failing), "the others to fail")
    shop.wait(lambda: shop.tolerant.snapshot().calls >= 20, "all to be counted")
    snapshot = shop.tolerant.snapshot()
    assert (snapshot.calls, snapshot.failures) == (20, 8)


# --- a deploy that must not start --------------------------------------------------------------------

PREAMBLE = """
import os
from celery import Celery, Task
from resilient_tasks import Resilience

app = Celery("deploy", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ.get("DEPLOY_BACKEND"))
app.conf.broker_connection_retry_on_startup = True
resilience = Resilience(app)
resilience.breaker("payments")
"""

UNKNOWN_BREAKER = """
@app.task(name="charge", breaker="paymnets")
def charge(): ...
"""

NOT_RESILIENT = """
@app.task(name="charge", breaker="payments", base=Task)
def charge(): ...
"""


def start_deploy(shop: Shop, directory: Path, code: str, env: dict[str, str] | None = None) -> Program:
    """Start a worker of a project of its own."""
    (directory / "deploy.py").write_text(PREAMBLE + code)
    command = celery_command("deploy", "worker", "-P", "solo", "-l", "INFO")
    return shop.program(command, directory=directory, env=env)


def refusal(shop: Shop, program: Program) -> str:
    """Return the last line of a program that refuses to start."""
    shop.wait(lambda: not program.running, "it to end")
    assert program.popen.returncode != 0
    assert "ready." not in program.output()
    return program.output().strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("code", "names"),
    [(UNKNOWN_BREAKER, ("'charge'", "'paymnets'", "payments")), (NOT_RESILIENT, ("'charge'", "'payments'", "Task"))],
    ids=["unknown breaker", "not a ResilientTask"],
)
def test_a_worker_refuses_tasks_that_are_defined_wrongly(
    shop: Shop, tmp_path: Path, code: str, names: tuple[str, ...]
) -> None:
    program = start_deploy(shop, tmp_path, code)
    line = refusal(shop, program)
    assert "ConfigurationError" in line
    assert all(name in line for name in names)
    assert program.output().count("ConfigurationError: ") == 1


@pytest.mark.parametrize(
    ("env", "reported"),
    [
        ({"RESILIENT_TASKS_TICK_INTERVAL": "soon"}, "RESILIENT_TASKS_TICK_INTERVAL='soon'"),
        ({"RESILIENT_TASKS_TICK": "1"}, "RESILIENT_TASKS_TICK is not a setting"),
        ({"RESILIENT_TASKS_BREAKERS__PAYMENTS__WINDOW": "-1"}, "RESILIENT_TASKS_BREAKERS__PAYMENTS__WINDOW='-1'"),
        ({"RESILIENT_TASKS_STORE_URL": "https://store"}, "RESILIENT_TASKS_STORE_URL='https://store'"),
        ({"SHOP_BROKER_URL": "memory://"}, "set RESILIENT_TASKS_STORE_URL"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_worker_refuses_invalid_settings(shop: Shop, tmp_path: Path, env: dict[str, str], reported: str) -> None:
    assert reported in refusal(shop, start_deploy(shop, tmp_path, "", env))


class _WebServer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        while self.request.recv(65536):
            self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@contextmanager
def web_server() -> Iterator[str]:
    """Run something that listens and answers, and is no Redis."""
    with socketserver.ThreadingTCPServer((LOCALHOST, 0), _WebServer) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://{LOCALHOST}:{server.server_address[1]}/0"
        server.shutdown()


def test_a_worker_refuses_a_store_that_is_no_redis(shop: Shop, tmp_path: Path) -> None:
    with web_server() as url:
        env = {"RESILIENT_TASKS_STORE_URL": url, "RESILIENT_TASKS_STORE_TIMEOUT": "60"}
        line = refusal(shop, start_deploy(shop, tmp_path, "", env))
    assert "ConfigurationError" in line
    assert "must be a Redis or Valkey server" in line


def test_a_worker_starts_without_its_store(shop: Shop, tmp_path: Path) -> None:
    url = f"redis://{LOCALHOST}:{free_port()}/0"
    program = start_deploy(shop, tmp_path, "", {"RESILIENT_TASKS_STORE_URL": url})
    program.wait_for_output("ready.")
    assert "the shared store is unavailable" in program.output()


# --- every process obeys --------------------------------------------------------------------------------


@pytest.mark.parametrize("published", [True, False], ids=["published", "publish lost"])
def test_every_pool_process_obeys_an_operator(shop: Shop, *, published: bool) -> None:
    store = shop.server_of_its_own()
    for _ in range(2):
        shop.worker(env={"RESILIENT_TASKS_STORE_URL": store.url()})
    for _ in range(4):
        shop.watch.delay()
    shop.wait(lambda: shop.side.llen("watching") == 4, "every pool process to watch")
    assert len(set(shop.side.lrange("watching", 0, -1))) == 4
    with shop.breaker_in(store) as payments:
        if not published:
            redis.Redis.from_url(store.url()).client_kill_filter(_type="pubsub")
        began = time.time()
        payments.isolate()
    shop.wait(lambda: shop.side.llen("obeyed") == 4, "every pool process to obey")
    delays = [float(at) - began for at in shop.side.lrange("obeyed", 0, -1)]
    print(f"known after {min(delays):.4f} to {max(delays):.4f} s, median {statistics.median(delays):.4f} s")


# --- events ---------------------------------------------------------------------------------------------


class Audience:
    """Listens to the events of a fleet as a monitor does."""

    def __init__(self, app: Any) -> None:
        self.state = EventState()
        self.seen: dict[str, list[str]] = defaultdict(list)  # task id -> its state after each event
        self._app = app
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._listen, daemon=True)

    def __enter__(self) -> Audience:  # noqa: PYI034 - Self needs Python 3.11
        self._thread.start()
        with self._app.events.default_dispatcher() as dispatcher:
            # what is sent before kombu has subscribed is lost
            Shop.wait(lambda: dispatcher.send("received") or self._listening.is_set(), "events to have a listener")
        return self

    def __exit__(self, *_: object) -> None:
        self._receiver.should_stop = True
        self._thread.join(60)

    def _listen(self) -> None:
        with self._app.connection_for_read() as connection:
            self._receiver = self._app.events.Receiver(connection, handlers={"*": self._receive})
            with self._receiver.consumer_context():
                for _ in self._receiver.consume(limit=None, timeout=1, safety_interval=0):
                    pass

    def _receive(self, event: dict[str, Any]) -> None:
        self._listening.set()
        self.state.event(event)
        if "uuid" in event:
            self.seen[event["uuid"]].append(self.state.tasks[event["uuid"]].state)


def test_monitors_see_every_task_deferred_and_done(shop: Shop) -> None:
    with Audience(shop.app) as audience:
        shop.open("payments")
        workers = [shop.worker() for _ in range(2)]
        ids = {shop.charge.delay(order).id for order in range(100)}
        shop.wait(lambda: shop.waiting("payments") == 100, "all to wait")
        shop.wait(lambda: {task.state for task in _tasks(audience, ids)} == {"DEFERRED"}, "all to be DEFERRED")
        shop.close("payments")
        shop.wait(lambda: {task.state for task in _tasks(audience, ids)} == {"SUCCESS"}, "all to be SUCCESS")
        expected = {"DEFERRED", "RETRY"}
        shop.wait(lambda: all(expected < set(audience.seen[task_id]) for task_id in ids), "each state to be seen")
        assert set(audience.state.workers) == {worker.node for worker in workers}


def _tasks(audience: Audience, ids: set[str]) -> list[Any]:
    return [audience.state.tasks.get(task_id) or audience.state.Task(uuid=task_id, state="PENDING") for task_id in ids]


# --- Celery's own features ------------------------------------------------------------------------------


def test_deferral_uses_up_no_retries(shop: Shop) -> None:
    shop.open("payments")
    shop.worker()
    result = shop.retried.delay()
    shop.wait_state(result, "DEFERRED")
    shop.close("payments")
    assert result.get(timeout=60) == 2


def test_a_failure_that_is_deferred_uses_up_no_retries(shop: Shop) -> None:
    shop.worker()
    shop.set_health("payments", "down")
    result = shop.describe.delay()
    shop.wait_state(result, "DEFERRED")
    assert shop.calls("payments") > 0
    shop.set_health("payments", "up")
    assert result.get(timeout=60)["retries"] == 0


def test_a_running_task_that_is_revoked_says_nothing_about_its_dependency(shop: Shop) -> None:
    shop.worker()
    shop.set_health("slow", "hang")
    doomed = shop.reckless.delay("slow")
    shop.wait(lambda: shop.side.llen("pids"), "it to run")
    shop.app.control.revoke(doomed.id, terminate=True)
    shop.wait_state(doomed, "REVOKED")
    assert shop.antidote.delay().get(timeout=60) == "ok"
    shop.wait(lambda: shop.tolerant.snapshot().calls, "the next one to be counted")
    assert (shop.tolerant.snapshot().calls, shop.tolerant.snapshot().failures) == (1, 0)


def test_embedded_beat_ticks_though_the_schedule_was_assigned_late(shop: Shop, tmp_path: Path) -> None:
    worker = shop.worker(arguments=["-B", "-s", str(tmp_path / "schedule")])
    shop.payments.trip()  # then it is HALF_OPEN until there is a call: something is due all the time
    shop.wait(lambda: "Sending due task resilient-tasks-tick" in worker.output(), "beat to send a tick")
    assert set(shop.app.conf.beat_schedule) == {"late", "resilient-tasks-tick"}
    assert shop.charge.delay(1).get(timeout=60) == 1
