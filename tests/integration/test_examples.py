"""The examples, and the projects of the manual, through an outage: workers, beat, websites, commands."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import redis
from celery import Celery

from examples import run
from examples.service import Service
from tests.integration.conftest import TIMEOUT
from workers.processes import wait_until

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"
# it heals soon, but makes few trials before we look, and a machine that is slow does not make calls slow
POLICY = {"OPEN_DURATION": "6", "OPEN_MULTIPLIER": "1", "SLOW_CALL_DURATION": "60", "WINDOW": "600"}
SOON = {
    f"RESILIENT_TASKS_BREAKERS__{breaker}__{field}": value
    for breaker in ("PAYMENTS", "LLM")
    for field, value in POLICY.items()
} | {"RESILIENT_TASKS_TICK_INTERVAL": "0.3"}


class Project(run.Project):
    """With what a test asks of it; of Django or of Celery alone."""

    def __init__(self, root: Path, directory: Path, service: Service, app: str = "proj") -> None:
        super().__init__(root, directory, service, app)
        self.env |= {"RESILIENT_TASKS_STORE_TIMEOUT": "20"}

    def start_worker(self) -> None:
        """Start a worker that writes states of waiting tasks however slow the machine is."""
        self.worker("--include=tests.support.long_timeouts")

    def wait_until_known(self, breaker: str, state: str) -> None:
        """Wait until the worker sees a breaker in a state."""
        control = Celery("operator", broker=self.server.url(0), set_as_current=False).control

        def is_seen() -> bool:
            answers = control.broadcast("breakers", reply=True, timeout=5, limit=1)
            return [views[breaker]["state"] for answer in answers for views in answer.values()] == [state]

        wait(is_seen, f"the worker to see that {breaker} is {state}")

    def manage(self, *arguments: str) -> str:
        """Run a command of Django's and return what it writes."""
        return self.run("-m", "django", *arguments)

    def celery(self, *arguments: str) -> str:
        """Run a command of Celery's and return what it writes."""
        return self.run("-m", "celery", "-A", self.app, *arguments)

    def python(self, code: str) -> str:
        """Run code in Django's shell."""
        return self.manage("shell", "-v0", "-c", code)

    def query(self, sql: str) -> list[Any]:
        """Ask the project's database, without the second that a process takes to start."""
        with closing(sqlite3.connect(self.directory / "db.sqlite3", timeout=30)) as database:
            return [row[0] for row in database.execute(sql)]

    def states(self) -> Counter[str]:
        """How many tasks are in each state, whichever of the two result backends the project has."""
        if self.query("SELECT 1 FROM sqlite_master WHERE name = 'django_celery_results_taskresult'"):
            return Counter(self.query("SELECT status FROM django_celery_results_taskresult"))
        results = redis.Redis.from_url(self.server.url(0))
        keys = list(results.scan_iter("celery-task-meta-*", count=1000))
        return Counter(json.loads(value)["status"] for value in (results.mget(keys) if keys else []) if value)

    def site(self) -> Callable[..., tuple[int, Any, Any]]:
        """Start the website and return what asks it for a path; it returns status, JSON and headers."""
        address = self.website()

        def ask(path: str, method: str = "GET", content: Any = None) -> tuple[int, Any, Any]:
            body = None if content is None else json.dumps(content).encode()
            request = Request(address + path, body, {"Content-Type": "application/json"}, method=method)
            try:
                with urlopen(request, timeout=TIMEOUT) as answer:
                    return answer.status, json.load(answer), answer.headers
            except HTTPError as refused:
                return refused.code, json.load(refused), refused.headers

        return ask

    def close(self) -> None:
        for program in reversed(self._programs):
            program.kill()
            print(f"--- {program.name}\n{program.output()}")


def write_files(page: str, root: Path, service: Service, only: str = "") -> None:
    """Write the files that a page of the manual prints; servers are where the test has started them."""
    text = (DOCS / f"{page}.md").read_text()
    text = re.sub(r'"redis://[^"]+"', "__import__('os').environ['BROKER_URL']", text)
    text = re.sub(r"https?://(localhost:8001|pay\.example)/", service.url, text)
    for name, appends, code in re.findall(r"```python\n# ([\w/.]+)(: add at the end)?\n(.*?)```", text, re.DOTALL):
        if (name == only) if only else (root / name).parent.exists():
            with (root / name).open("a" if appends else "w") as file:
                file.write(code)


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.close()


@pytest.fixture
def project(tmp_path: Path, service: Service) -> Iterator[Project]:
    project = Project(EXAMPLES / "django", tmp_path, service)
    yield project
    project.close()


@pytest.fixture
def fresh_project(tmp_path: Path, service: Service) -> Iterator[Project]:
    """What ``startproject`` and ``startapp`` make, with the files that the manual prints."""
    root = tmp_path / "site"
    root.mkdir()
    for command in (["startproject", "proj", "."], ["startapp", "shop"]):
        subprocess.run([sys.executable, "-m", "django", *command], cwd=root, check=True)
    for page in ("getting-started", "django"):
        write_files(page, root, service)
    (root / "proj" / "urls.py").write_text(
        "from django.urls import path\nfrom shop import views\n"
        "urlpatterns = [path('checkout', views.checkout), path('pay/<int:order_id>', views.pay)]\n"
    )
    with (root / "proj" / "settings.py").open("a") as settings:
        settings.write("import os\nDATABASES['default']['NAME'] = os.environ['DIRECTORY'] + '/db.sqlite3'\n")
    project = Project(root, tmp_path, service)
    project.env |= SOON
    yield project
    project.close()


def wait(condition: Callable[[], Any], what: str) -> None:
    wait_until(condition, timeout=TIMEOUT, what=what)


def test_a_project_lives_through_an_outage(project: Project) -> None:
    project.env["RESILIENT_TASKS_BREAKERS__PAYMENTS__OPEN_DURATION"] = "60"  # no trials while we look
    project.start_worker()
    project.beat()
    site = project.site()

    def ask(path: str, method: str = "GET") -> tuple[int, Any]:
        return site(path, method)[:2]

    assert ask("checkout") == (200, {"pay": "now", "state": "CLOSED"})
    assert ask("orders/0", "POST") == (202, {"number": 0})
    assert ask("orders/1/now", "POST") == (202, {"number": 1})
    assert ask("orders/1/price") == (200, {"price": "1.00"})
    wait(lambda: len(project.service.calls) == 2, "both to be charged")

    project.service.status = 500
    for number in range(2, 40):
        assert ask(f"orders/{number}", "POST")[0] == 202
    wait(lambda: ask("checkout")[1]["pay"] == "later", "the website to see that it is open")
    project.celery("breakers", "isolate", "payments", "prices", "--reason", "test")  # no trial comes between
    wait(lambda: ask("checkout")[1]["state"] == "FORCED_OPEN", "the website to see it")
    project.wait_until_known("prices", "FORCED_OPEN")
    code, refused = ask("orders/40/now", "POST")
    assert (code, refused) == (503, {"error": "breaker 'payments' is FORCED_OPEN"})
    assert ask("orders/1/price") == (200, {"price": "1.00"})
    assert ask("orders/2/price") == (200, {"price": "on request"})
    wait(lambda: project.states()["DEFERRED"] >= 30, "the database to say what waits")
    called = sum(project.service.calls.values())
    assert re.search(r"\d+ sent, payments is FORCED_OPEN, accepting: False", project.manage("charge_unpaid"))

    project.service.status = 200
    project.celery("breakers", "reset", "payments", "prices", "--reason", "test")
    wait(lambda: project.query("SELECT count(*) FROM shop_order WHERE NOT paid") == [0], "all to be paid")
    wait(lambda: project.states().keys() == {"SUCCESS"}, "all to succeed")
    assert called < 40 + 38, "no more than a few calls reached it"


def test_the_projects_own_tests_need_no_server(project: Project) -> None:
    project.env |= {"BROKER_URL": "redis://127.0.0.1:1/0"}
    assert "Ran 3 tests" in project.manage("test", "shop")


def test_a_fresh_project_with_one_line_more_lives_through_an_outage(fresh_project: Project) -> None:
    assert "Ran 1 test" in fresh_project.manage("test", "shop")
    fresh_project.start_worker()
    fresh_project.beat()
    service = fresh_project.service
    service.status = 500
    send = "from shop.tasks import charge; [charge.delay(number) for number in range(40)]"
    fresh_project.python(send)
    wait(lambda: fresh_project.states() == {"DEFERRED": 40}, "all to wait")
    assert len(service.calls) < 40, "most tasks never called it"
    service.status = 200
    wait(lambda: fresh_project.states() == {"SUCCESS": 40}, "all to succeed")
    assert len(service.calls) == 40


def test_getting_started_without_django(tmp_path: Path, service: Service) -> None:
    root = tmp_path / "demo"
    root.mkdir()
    write_files("getting-started", root, service, only="tasks.py")
    send_some, send_more = re.findall(r'^\$ python -c "(.*)"', (DOCS / "getting-started.md").read_text(), re.MULTILINE)
    project = Project(root, tmp_path, service, "tasks")
    project.env |= SOON
    try:
        project.start_worker()
        project.run("-c", send_some)
        wait(lambda: project.states() == {"SUCCESS": 20}, "some to succeed")
        assert re.search(r"payments +CLOSED", project.celery("breakers", "list"))
        service.status = 500
        project.run("-c", send_more)
        wait(lambda: project.states() == {"SUCCESS": 20, "DEFERRED": 100}, "more to wait")
        assert re.search(r"payments +(OPEN|HALF_OPEN)", project.celery("breakers", "list"))
        service.status = 200
        wait(lambda: project.states() == {"SUCCESS": 120}, "all to succeed")
        assert re.search(r"tasks failed +0\n", project.celery("breakers", "report"))
    finally:
        project.close()


def test_an_api_that_asks_an_llm(tmp_path: Path, service: Service) -> None:
    project = Project(EXAMPLES / "fastapi", tmp_path, service, "app")
    project.env |= SOON
    try:
        project.start_worker()
        ask = project.site()

        def summarize(path: str = "summaries") -> tuple[int, Any, Any]:
            return ask(path, "POST", {"text": "a long story"})

        assert summarize()[:2] == (200, {"summary": "answer 1"})
        service.status, service.retry_after = 429, 200
        wait(lambda: summarize()[0] == 503, "the breaker to open")
        status, content, headers = summarize()
        assert (status, content["error"][:22]) == (503, "breaker 'llm' is OPEN,")
        assert 10 < int(headers["Retry-After"]) <= 230, "as the LLM says, not after the two seconds of the policy"
        called = sum(service.calls.values())
        project.wait_until_known("llm", "OPEN")
        later = [summarize("summaries/later")[1]["id"] for _ in range(5)]
        wait(lambda: all(ask(f"summaries/{task}")[1]["state"] == "DEFERRED" for task in later), "all to wait")
        assert sum(service.calls.values()) == called, "nothing reached it"
        service.status = 200
        project.celery("breakers", "reset", "llm")
        wait(lambda: all(ask(f"summaries/{task}")[1]["state"] == "SUCCESS" for task in later), "all to be summarized")
        wait(lambda: summarize()[0] == 200, "requests to be answered")
    finally:
        project.close()
