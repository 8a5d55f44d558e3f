"""Former and new version of the library side by side, for the length of a deploy: nothing is lost, all stays set."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import TIMEOUT, Shop
from workers.processes import PROJECT, Program

FORMER = "d43ce6d"  # the last commit whose stores keep rates over a window, under keys without a schema number

SHOP = """
import os
import redis
from celery import Celery
from resilient_tasks import Resilience

app = Celery("deploy", broker=os.environ["SHOP_BROKER_URL"], backend=os.environ["SHOP_BACKEND_URL"])
app.conf.update(broker_connection_retry_on_startup=True, task_acks_late=True, worker_prefetch_multiplier=1)
side = redis.Redis.from_url(os.environ["SHOP_SIDE_URL"], decode_responses=True)
resilience = Resilience(app, tick_interval=0.25)
quick = dict(minimum_calls=3, open_duration=1.0, max_open_duration=2.0, open_jitter=0.0, ramp=0.0)
payments, mail = resilience.breaker("payments", **quick), resilience.breaker("mail", **quick)


@app.task(name="charge", breaker="payments")
def charge(order):
    if side.exists("down"):
        raise ConnectionError("down")
    side.sadd("charged", order)
    return order


@app.task(name="send", breaker="mail")
def send(order):
    side.sadd("sent", order)
    return order
"""


@pytest.fixture
def former_python(tmp_path: Path) -> str:
    """Return a Python of its own that runs the former version."""
    code, environment = tmp_path / "former", tmp_path / "venv"
    code.mkdir()
    archive = subprocess.run(
        ["git", "archive", FORMER, "resilient_tasks"], cwd=PROJECT, capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip(f"commit {FORMER} is not in this clone")
    subprocess.run(["tar", "-x", "-C", str(code)], input=archive.stdout, check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    [packages] = environment.glob("lib/python*/site-packages")
    paths = [str(code), *(path for path in sys.path if path.endswith("site-packages")), sysconfig.get_path("purelib")]
    (packages / "paths.pth").write_text("\n".join(dict.fromkeys(paths)))
    return str(environment / "bin" / "python")


def start(shop: Shop, directory: Path, python: str, name: str) -> Program:
    options = ["-P", "prefork", "-c", "2", "-n", f"{name}@localhost", "--without-mingle", "-l", "INFO"]
    command = [python, "-m", "celery", "-A", "two_versions", "worker", *options]
    program = shop.program(command, directory=directory)
    program.wait_for_output("ready.", timeout=60)
    return program


def run(shop: Shop, directory: Path, python: str, code: str) -> str:
    """Run code beside the project; return what it prints."""
    done = subprocess.run(
        [python, "-c", f"from two_versions import *\n{code}"], cwd=directory, env={**os.environ, **shop.env},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip()


def test_a_deploy_of_this_version_loses_no_task_and_forgets_no_operator(
    shop: Shop, tmp_path: Path, former_python: str
) -> None:
    (tmp_path / "two_versions.py").write_text(SHOP)
    assert "former" in run(shop, tmp_path, former_python, "import resilient_tasks; print(resilient_tasks.__file__)")
    run(shop, tmp_path, former_python, "mail.isolate(reason='maintenance', actor='ada')")
    before = start(shop, tmp_path, former_python, "before")
    shop.side.set("down", 1)

    def send(task: str, orders: range) -> list[Any]:
        return [shop.app.send_task(task, (order,)) for order in orders]

    charges, mails = send("charge", range(20)), send("send", range(5))
    shop.wait(lambda: shop.waiting("payments") >= 15 and shop.waiting("mail") == 5, "them to wait")

    start(shop, tmp_path, sys.executable, "after")
    seen = "print(*[f'{b.state} {b.snapshot().reason}' for b in (payments, mail)], sep='|')"
    payments, mail = run(shop, tmp_path, sys.executable, seen).split("|")
    assert mail == "FORCED_OPEN maintenance"
    assert payments.split()[0] in {"OPEN", "HALF_OPEN"}, "an outage goes on"
    charges += send("charge", range(20, 60))
    mails += send("send", range(5, 20))
    shop.wait(lambda: shop.waiting("mail") >= 15, "tasks to wait while both versions run")

    shop.side.delete("down")
    before.stop(timeout=TIMEOUT)
    shop.wait_done(*charges)
    assert {result.get() for result in charges} == set(range(60))
    assert shop.side.scard("charged") == 60
    run(shop, tmp_path, sys.executable, "mail.reset()")
    shop.wait_done(*mails)
    assert shop.side.scard("sent") == 20
