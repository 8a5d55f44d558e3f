"""Deploys in mid-outage: what waits meets code in which breakers and tasks are renamed or gone, or the library is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import NotRegistered

from resilient_tasks import Resilience
from resilient_tasks.breaker import Breaker
from resilient_tasks.core.model import State
from resilient_tasks.worker.envelope import HEADER
from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import Program, celery_command

WITHOUT_THE_LIBRARY = """
import os
from celery import Celery

app = Celery("deploy", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_default_queue=os.environ.get("DEPLOY_QUEUE", "celery"),
)
"""

WITH_THE_LIBRARY = f"""{WITHOUT_THE_LIBRARY}
from resilient_tasks import Resilience
from resilient_tasks.worker import maintenance

resilience = Resilience(app, tick_interval=0.25)
maintenance.DECLARING, maintenance.RECONCILE_INTERVAL, maintenance.ABANDONED_AFTER = 0.5, 0.5, 2.0
"""

BEFORE = f"""{WITH_THE_LIBRARY}
resilience.breaker("payments")
resilience.breaker("ledger", open_duration=300.0)

@app.task(name="charge", breaker="payments")
def charge(order): ...

@app.task(name="refund", breaker="payments")
def refund(order): ...

@app.task(name="audit", breaker="payments")
def audit(order): ...

@app.task(name="post", breaker="ledger")
def post(order): ...
"""

AFTER = f"""{WITH_THE_LIBRARY}
resilience.breaker("billing")
resilience.breaker("ledger", consecutive_failures=1)

@app.task(name="charge", breaker="billing")
def charge(order): return order

@app.task(name="repay", breaker="billing")
def repay(order): return order

@app.task(name="audit")
def audit(order): return order

@app.task(name="post", breaker="ledger")
def post(order): return order
"""

SIMPLE = f"""{WITH_THE_LIBRARY}
resilience.breaker("payments")

@app.task(name="charge", breaker="payments")
def charge(order): return order
"""

FORMER = f"""{WITHOUT_THE_LIBRARY}
@app.task(bind=True, name="charge", max_retries=1)
def charge(self, order):
    if not self.request.retries:
        raise self.retry(countdown=0)
    return [order, self.request.id, self.request.headers]
"""


def deploy(shop: Shop, directory: Path, name: str, code: str, queue: str = "celery", **env: str) -> Program:
    """Start a worker of a project of its own."""
    (directory / f"{name}.py").write_text(code)
    options = ["-P", "solo", "-n", f"{name}@localhost", "-Q", queue, "--without-mingle", "-l", "INFO"]
    env = {"RESILIENT_TASKS_STORE_TIMEOUT": "20", **env}
    program = shop.program(celery_command(name, "worker", *options), directory=directory, env=env)
    program.wait_for_output("ready.", timeout=TIMEOUT)
    return program


@contextmanager
def operator(shop: Shop, name: str, namespace: str = "resilient") -> Iterator[Breaker]:
    """Return a breaker as an operator's process sees it."""
    resilience = Resilience(store_url=shop.server.url(), store_timeout=20, namespace=namespace)
    try:
        yield resilience.breaker(name)
    finally:
        resilience.fleet.close()


def send(shop: Shop, task: str, order: int, **options: Any) -> Any:
    return shop.app.send_task(task, (order,), **options)


def test_a_deploy_may_rename_and_remove_what_tasks_wait_for(shop: Shop, tmp_path: Path) -> None:
    with operator(shop, "payments") as payments, operator(shop, "ledger") as ledger:
        payments.isolate()
        ledger.isolate()
        charge, refund, audit, post = [send(shop, task, 1) for task in ("charge", "refund", "audit", "post")]
        before = deploy(shop, tmp_path, "before", BEFORE)
        shop.wait(lambda: shop.waiting("payments") == 3 and shop.waiting("ledger") == 1, "all to wait")
        before.stop()
        after = deploy(shop, tmp_path, "after", AFTER)
        shop.wait_done(charge, audit)
        with pytest.raises(NotRegistered, match="refund"):
            refund.get(timeout=TIMEOUT)
        after.wait_for_output("unregistered task of type 'refund'", timeout=TIMEOUT)
        assert ledger.snapshot().state is State.FORCED_OPEN, "a deploy with another policy moves no breaker"
        assert shop.waiting("ledger") == 1
        ledger.reset()
        shop.wait_done(post)


def test_a_resumed_task_runs_on_a_worker_without_the_library(shop: Shop, tmp_path: Path) -> None:
    with operator(shop, "payments") as payments:
        payments.isolate()
        result = send(shop, "charge", 7, headers={"x-own": "kept"}, link=shop.note.si("linked").set(queue="notes"))
        deploy(shop, tmp_path, "simple", SIMPLE)
        shop.wait(lambda: shop.waiting("payments") == 1, "it to wait")
        shop.control("cancel_consumer", "simple@localhost", queue="celery")
        deploy(shop, tmp_path, "former", FORMER)
        payments.reset()
        order, task_id, headers = result.get(timeout=TIMEOUT)
    assert (order, task_id) == (7, result.id)
    assert {name: value for name, value in headers.items() if name != HEADER} == {"x-own": "kept"}
    shop.wait(lambda: shop.broker.llen("notes") == 1, "the callback")


def test_namespaces_separate_two_apps_on_one_server(shop: Shop, tmp_path: Path) -> None:
    with operator(shop, "payments", "east") as eastern, operator(shop, "payments", "west") as western:
        eastern.isolate()
        for namespace in ("east", "west"):
            env = {"RESILIENT_TASKS_NAMESPACE": namespace, "DEPLOY_QUEUE": namespace}
            deploy(shop, tmp_path, namespace, SIMPLE, namespace, **env)
        waiting = [send(shop, "charge", order, queue="east") for order in range(5)]
        running = [send(shop, "charge", order, queue="west") for order in range(5)]
        shop.wait_done(*running)
        shop.wait(lambda: all(result.state == "DEFERRED" for result in waiting), "those in the east to wait")
        seen = western.snapshot()
        assert (seen.state, seen.version) == (State.CLOSED, seen.epoch)
        assert shop.broker.llen("west.deferred.payments") == 0
        western.isolate()
        eastern.reset()
        shop.wait_done(*waiting)
        assert western.snapshot().state is State.FORCED_OPEN
