"""The memory limit: how it is written down, and how seldom the servers are asked about it."""

from __future__ import annotations

import pytest

from resilient_tasks.core.memory import Memory, MemoryLimit
from resilient_tasks.worker.deferral import LOOK_EVERY, LOOK_INTERVAL, MemoryGuard
from tests.support.doubles import ManualClock


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("80%", MemoryLimit(share=0.8)),
        ("12.5%", MemoryLimit(share=0.125)),
        ("100%", MemoryLimit(share=1.0)),
        ("1048576", MemoryLimit(size=1024**2)),
        ("64kb", MemoryLimit(size=64 * 1024)),
        (" 512MB ", MemoryLimit(size=512 * 1024**2)),
        ("2gb", MemoryLimit(size=2 * 1024**3)),
        ("none", MemoryLimit()),
    ],
)
def test_a_limit_is_a_share_or_a_size(text: str, limit: MemoryLimit) -> None:
    assert MemoryLimit.parse(text) == limit


@pytest.mark.parametrize("text", ["", "0", "0%", "101%", "-1", "1e9", "5tb", "%", "80 %", "0.5", "1.5gb", "nan%", "٣%"])
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="allowed is a share"):
        MemoryLimit.parse(text)


@pytest.mark.parametrize(
    ("limit", "memory", "exceeded"),
    [
        (MemoryLimit(share=0.8), Memory(79, 100), None),
        (MemoryLimit(share=0.8), Memory(80, 100), 80),
        (MemoryLimit(share=0.8), Memory(10**12, 0), None),
        (MemoryLimit(size=50), Memory(49, 0), None),
        (MemoryLimit(size=50), Memory(50, 0), 50),
        (MemoryLimit(size=50), Memory(50, 10**6), 50),
        (MemoryLimit(), Memory(10**12, 1), None),
    ],
)
def test_a_share_needs_a_maximum_and_a_size_does_not(limit: MemoryLimit, memory: Memory, exceeded: int | None) -> None:
    assert limit.exceeded_by(memory) == exceeded


def test_memory_is_read_from_what_a_server_says() -> None:
    info = {"used_memory": 100, "mem_not_counted_for_evict": 30, "maxmemory": 1000}
    assert Memory.read(info) == Memory(70, 1000)
    assert Memory.read({"used_memory": 100}) == Memory(100, 0)
    assert Memory.read({}) is None


class Server:
    """Answers what the test wants, and counts how often it is asked."""

    def __init__(self, used: int = 0) -> None:
        self.used = used
        self.away = False
        self.asked = 0

    def memory(self) -> Memory | None:
        self.asked += 1
        if self.away:
            raise ConnectionError
        return Memory(self.used, 100)


def test_servers_are_asked_a_few_times_a_second() -> None:
    clock, server = ManualClock(), Server()
    guard = MemoryGuard(MemoryLimit(share=0.8), {"broker": server.memory}, (ConnectionError,), clock)
    for _ in range(10):
        assert guard.exceeded() is None
    assert server.asked == 1
    server.used = 90
    assert guard.exceeded() is None
    clock.advance(LOOK_INTERVAL)
    assert guard.exceeded() == 80
    server.used = 10
    clock.advance(LOOK_INTERVAL)
    assert guard.exceeded() is None


def test_a_flood_makes_it_ask_more_often() -> None:
    server = Server()
    guard = MemoryGuard(MemoryLimit(size=50), {"broker": server.memory}, (ConnectionError,), ManualClock())
    guard.exceeded()
    server.used = 60
    answers = [guard.exceeded() for _ in range(LOOK_EVERY)]
    assert answers == [None] * (LOOK_EVERY - 1) + [50]
    assert server.asked == 2


def test_one_full_server_is_enough_and_one_that_says_nothing_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    clock, broker, store = ManualClock(), Server(), Server(used=95)
    broker.away = True
    servers = {"broker": broker.memory, "silent": lambda: None, "store": store.memory}
    guard = MemoryGuard(MemoryLimit(share=0.8), servers, (ConnectionError,), clock)
    for _ in range(3):
        assert guard.exceeded() == 80
        clock.advance(LOOK_INTERVAL)
    store.used = 10
    assert guard.exceeded() is None
    assert [record.getMessage() for record in caplog.records] == [
        "nothing more is deferred: the store uses 95 bytes of memory, and deferring may fill 80",
        "tasks are deferred again: the servers are below their memory limit",
    ]
