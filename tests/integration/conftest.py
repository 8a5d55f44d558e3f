"""A real server, real workers, real beat: what the integration tests run on."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis

from resilient_tasks import Resilience
from resilient_tasks.breaker import Breaker
from tests.integration.depots import Depot
from tests.integration.post_office import PostOffice
from workers.processes import (
    Program,
    Server,
    Worker,
    start_beat,
    start_program,
    start_valkey,
    start_worker,
    wait_until,
)
from workers.rabbitmq import RabbitMQ, rabbitmq_binary, start_rabbitmq

# seconds; what is waited for comes true in a second or two on an idle machine
TIMEOUT = float(os.environ.get("SHOP_TIMEOUT", "120"))
MODULE = "tests.integration.shop"
NEVER_LATE = {"RESILIENT_TASKS_LATE_AFTER": "3600"}  # no call is taken for one that hangs


class Shop:
    """The test project with its server, its side channel and the processes that a test starts."""

    def __init__(self, server: Server, directory: Path, module: str = MODULE) -> None:
        self.server = server
        self.module = module
        self.directory = directory
        self.side: Any = redis.Redis.from_url(server.url(2), decode_responses=True)
        self.broker: Any = redis.Redis.from_url(server.url(0), decode_responses=True)
        self.env = {
            "SHOP_BROKER_URL": server.url(0),
            "SHOP_BACKEND_URL": server.url(1),
            "SHOP_SIDE_URL": server.url(2),
        }
        self._count = itertools.count(1)
        self._programs: list[Program] = []
        os.environ.update(self.env, RESILIENT_TASKS_STORE_TIMEOUT="20")
        self.project: ModuleType = importlib.import_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.project, name)

    def worker(self, *, mingle: bool = False, **options: Any) -> Worker:
        """Start a worker and wait until it consumes; mingling takes each a second."""
        env = {**self.env, **options.pop("env", {})}
        arguments = [*([] if mingle else ["--without-mingle"]), *options.pop("arguments", [])]
        name = f"worker{next(self._count)}"
        worker = start_worker(
            self.module, name=name, directory=self.directory, env=env, arguments=arguments, **options
        )  # fmt: skip
        self._programs.append(worker)
        return worker.wait_until_ready()

    def beat(self) -> Program:
        """Start beat."""
        beat = start_beat(self.module, name=f"beat{next(self._count)}", directory=self.directory, env=self.env)
        self._programs.append(beat)
        return beat

    def server_of_its_own(self, *, persistent: bool = False) -> Server:
        """Start one more server, for a test to break."""
        name = f"server{next(self._count)}"
        return self._watched(start_valkey(self.directory / name, name=name, persistent=persistent))

    def start_again(self, server: Server, *, persistent: bool = False) -> Server:
        """Bring a server back that was stopped or killed; without persistence it is empty."""
        directory = server.program.log.parent
        name = f"server{next(self._count)}"
        return self._watched(start_valkey(directory, name=name, port=server.port, persistent=persistent))

    def _watched(self, server: Server) -> Server:
        self._programs.append(server.program)
        return server

    def program(self, command: Sequence[str], *, directory: Path, env: dict[str, str] | None = None) -> Program:
        """Start any other program, in ``directory``."""
        name = f"program{next(self._count)}"
        program = start_program(
            command, name=name, directory=self.directory, env={**self.env, **(env or {})}, cwd=directory
        )  # fmt: skip
        self._programs.append(program)
        return program

    @contextmanager
    def breaker_in(self, store: Server, name: str = "payments") -> Iterator[Breaker]:
        """Return a breaker of the shop as an operator sees it who works on another store than the default one."""
        resilience = Resilience(store_url=store.url(), store_timeout=20)
        try:
            yield resilience.breaker(name, self.project.resilience.breakers[name].policy)
            assert resilience.fleet.reporter.flush(TIMEOUT)
        finally:
            resilience.fleet.close()

    @property
    def is_at_work(self) -> bool:
        """Whether a test has started a process that goes on."""
        return bool(self._programs)

    def stop(self) -> None:
        """Kill all processes of a test, quicker than a shutdown; pytest shows what they wrote if it failed."""
        programs, self._programs = self._programs, []
        for program in programs:
            program.kill()
            print(f"--- {program.name}\n{program.output()}")

    def clear(self) -> None:
        """Forget everything that former tests have left, also in this process: all workers must be stopped."""
        self.project.resilience.fleet.reporter.flush(TIMEOUT)
        for database in range(3):
            client = redis.Redis.from_url(self.server.url(database))
            left = [key for key in client.scan_iter() if not key.startswith(b"_kombu.binding")]
            if left:
                client.delete(*left)
        self.project.resilience.fleet.view.refresh()

    def start_over(self) -> None:
        """Forget what former tests have left while workers go on: nothing waits, all breakers are closed and empty."""
        breakers = self.project.resilience.breakers
        self.side.flushdb()  # what hangs goes on
        for breaker in breakers.values():
            breaker.reset(reason="test")
        self.wait(lambda: self._dropped(breakers) == 0, "the workers to be idle")
        for name, breaker in breakers.items():
            self.project.resilience.fleet.ledger.clear_deferred(name)
            breaker.reset(reason="test")
        self.side.flushdb()

    def _dropped(self, breakers: Iterable[str]) -> int:
        """Drop what waits and what is dead; return how many messages are anywhere else at the same moment."""
        with self.broker.pipeline() as pipeline:
            pipeline.delete(*(f"resilient.{queue}.{name}" for queue in ("deferred", "dead") for name in breakers))
            pipeline.hlen("unacked").llen("celery")
            return sum(pipeline.execute()[1:])

    def control(self, command: str, *nodes: str, **arguments: Any) -> dict[str, Any]:
        """Return what each of some workers (default: all) answers to a control command.

        It is sent again and again: a worker is ready a moment before it listens.
        """

        def answers() -> list[dict[str, Any]]:
            asked = nodes or [each.node for each in self._programs if isinstance(each, Worker) and each.running]
            replies: list[dict[str, Any]] = []
            if asked:
                with self.project.app.connection_for_write() as connection:  # the pool's may be of an earlier server
                    replies = self.project.app.control.broadcast(
                        command, arguments, asked, reply=True, timeout=5, connection=connection
                    )  # fmt: skip
            found = {node: answer for reply in replies for node, answer in reply.items()}
            return [found] if found.keys() == set(asked) else []

        return wait_until(answers, timeout=TIMEOUT, what=f"all to answer {command}")[0]

    def set_health(self, dependency: str, health: str) -> None:
        """Make a dependency ``up``, ``down`` or ``hang``."""
        self.side.set(f"health:{dependency}", health)

    def calls(self, dependency: str) -> int:
        """How often a dependency was called."""
        return int(self.side.get(f"calls:{dependency}") or 0)

    def waiting(self, breaker: str) -> int:
        """Length of a deferred queue, as any tool sees it."""
        return int(self.broker.llen(f"resilient.deferred.{breaker}"))

    def open(self, breaker: str) -> None:
        """Open a breaker that stays open until it is closed; return once every worker knows."""
        self.project.resilience.breakers[breaker].isolate(reason="test")
        self.wait_until_known(breaker)

    def trip(self, breaker: str) -> None:
        """Open a breaker that tries to heal; return once every worker knows."""
        self.project.resilience.breakers[breaker].trip(reason="test")
        self.wait_until_known(breaker)

    def wait_until_known(self, breaker: str) -> None:
        """Wait until every worker knows the present state of a breaker, or a later one."""
        epoch = self.project.resilience.breakers[breaker].snapshot().epoch
        seen = lambda: [views[breaker]["epoch"] for views in self.control("breakers").values()]  # noqa: E731
        self.wait(lambda: min(seen(), default=epoch) >= epoch, f"all to know of {breaker}")

    def close(self, breaker: str) -> None:
        """Close it again."""
        self.project.resilience.breakers[breaker].reset(reason="test")

    def runs(self, task: str) -> list[str]:
        """Ids of the runs of a task, in order."""
        return list(self.side.lrange(f"runs:{task}", 0, -1))

    def kill_pool_process(self) -> None:
        """Kill the pool process that runs ``reckless``, as the kernel does when memory is short."""
        self.wait(lambda: self.side.llen("pids"), "it to run")
        os.kill(int(self.side.lpop("pids")), signal.SIGKILL)

    def notes(self) -> list[Any]:
        """What ``note`` was called with."""
        return [json.loads(note) for note in self.side.lrange("notes", 0, -1)]

    @staticmethod
    def wait(condition: Callable[[], Any], what: str = "") -> None:
        """Wait until a condition holds."""
        wait_until(condition, timeout=TIMEOUT, what=what or condition.__code__.co_name)

    def wait_state(self, result: Any, state: str) -> None:
        """Wait until a result has a state."""
        try:
            self.wait(lambda: result.state == state)
        except TimeoutError:
            raise TimeoutError(f"{result.id} is {result.state} and not {state} after {TIMEOUT} s") from None

    def wait_done(self, *results: Any) -> None:
        """Wait until all tasks have succeeded."""
        self.wait(lambda: all(result.state == "SUCCESS" for result in results), "all to finish")


@pytest.fixture(scope="session")
def _shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    directory = tmp_path_factory.mktemp("shop")
    server = start_valkey(directory)
    yield Shop(server, directory)
    server.stop()


@pytest.fixture
def shop(_shop: Shop) -> Iterator[Shop]:
    """An empty shop without workers; what a test starts is stopped after it, what it wrote is shown if it failed."""
    _shop.stop()
    _shop.clear()
    yield _shop
    _shop.stop()


@pytest.fixture(scope="module")
def _running(_shop: Shop) -> Iterator[Shop]:
    yield _shop
    _shop.stop()


@pytest.fixture
def running(_running: Shop) -> Shop:
    """A shop with a worker and beat, which all tests of a module share, and nothing else that former tests left."""
    if _running.is_at_work:
        _running.start_over()
    else:
        _running.clear()
        _running.beat()
        _running.worker(env=NEVER_LATE)
    return _running


@pytest.fixture
def depot(server: Server, tmp_path: Path) -> Iterator[Callable[..., Depot]]:
    """Make depots on the brokers that a test names; what they have to look at is on an empty server."""
    depots: list[Depot] = []
    redis.Redis.from_url(server.url()).flushall()

    def make(broker: str, **settings: Any) -> Depot:
        depots.append(Depot(broker, server, tmp_path, **settings))
        return depots[-1]

    yield make
    for each in depots:
        each.stop()


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitMQ]:
    """One node for all tests that do not break it."""
    if rabbitmq_binary() is None:
        pytest.skip("RabbitMQ is not installed")
    rabbitmq = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    yield rabbitmq
    rabbitmq.stop()


@pytest.fixture(scope="module", params=["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def broker(request: pytest.FixtureRequest, _shop: Shop) -> str:
    """URL of each broker in turn: a test that asks for it runs once per broker."""
    if request.param == "redis":
        return _shop.server.url(3)
    rabbitmq: RabbitMQ = request.getfixturevalue("rabbitmq")
    return rabbitmq.url


@pytest.fixture(scope="module")
def _post(broker: str, _shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostOffice]:
    directory = tmp_path_factory.mktemp("post")
    backends = {
        "files": f"file://{directory}",
        "sqlite": f"db+sqlite:///{directory}/results?timeout=60",
        "rpc": "rpc://",
        "nothing": "disabled",
    }
    post = PostOffice(broker, _shop.server, directory, backends)
    yield post
    post.stop()


@pytest.fixture
def post(_post: PostOffice) -> PostOffice:
    """A post office with one worker, which all tests of a module share, and a breaker that is closed."""
    _post.clear()
    return _post
