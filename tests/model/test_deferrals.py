"""No interleaving of workers, ticks and faults loses a task or puts its message in two places.

And the search does find what it is there for: with one rule of the protocol broken, it shows what becomes of a task.
"""

from __future__ import annotations

from importlib import resources
from itertools import product
from typing import Any

import fakeredis
import pytest

from tests.model.deferrals import INDEXED, UNINDEXED, Deferrals, Hand, Task, World, is_over
from tests.model.explorer import BrokenRule, Space

SCRIPTS = resources.files("resilient_tasks.worker") / "lua"
QUEUED, UNACKED, INDEX, DEFERRED, DEAD = ["queue", "unacked", "unacked_index", "deferred", "dead"]


def explore(**arguments: Any) -> Space[World]:
    space = Space(Deferrals(**arguments))
    space.always_leads_to(is_over, "the end of every task")
    return space


@pytest.mark.parametrize(
    "arguments",
    [
        {"atomic": True, "faults": 3},
        {"atomic": True, "tasks": 2, "ticks": 1, "faults": 1},
        {"atomic": False, "faults": 2},
        {"atomic": False, "tasks": 2, "ticks": 1, "faults": 1},
    ],
    ids=["scripts", "scripts-two-tasks", "publish-acknowledge", "publish-acknowledge-two-tasks"],
)
def test_no_interleaving_loses_a_task(arguments: dict[str, Any]) -> None:
    space = explore(**arguments)
    print(space)
    assert len(space) > 1000


@pytest.mark.parametrize(
    ("arguments", "broken"),
    [
        ({"atomic": True, "pushes_unowned": True}, "0 is deferred: a message is in two places"),
        ({"atomic": True, "moves_unseen": True}, "0 is resumed: a message is in two places"),
        ({"atomic": True, "pops_first": True}, "0 is resumed: a task is lost"),
        ({"atomic": False, "acks_first": True}, "half a deferral: a task is lost"),
        ({"atomic": True, "reconciles": False}, "the end of every task cannot be reached any more"),
        (
            {"atomic": False, "reconciles": False, "ticks": 1, "faults": 1},
            "the end of every task cannot be reached any more",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_broken_rule_is_found(arguments: dict[str, Any], broken: str) -> None:
    with pytest.raises(BrokenRule, match=broken):
        explore(**arguments)


# --- the model's steps are those of the scripts -----------------------------------------------------------


@pytest.fixture
def server() -> fakeredis.FakeRedis:
    return fakeredis.FakeRedis(decode_responses=True)


def put(server: fakeredis.FakeRedis, task: Task) -> None:
    """Put the copies of a task's message where the model says that they are."""
    for key, copies in ((QUEUED, task.queued), (DEFERRED, task.deferred), (DEAD, task.dead)):
        for _ in range(copies):
            server.lpush(key, "message")
    if task.unacked:
        server.hset(UNACKED, "tag", "message")
        server.zadd(INDEX, {"tag": 1.0})


def found(server: fakeredis.FakeRedis) -> tuple[int, ...]:
    """Return how many copies are queued, unacknowledged, deferred and dead."""
    assert server.hlen(UNACKED) == server.zcard(INDEX)
    return server.llen(QUEUED), server.hlen(UNACKED), server.llen(DEFERRED), server.llen(DEAD)


def places(world: World) -> tuple[int, ...]:
    [task] = world.tasks
    return task.queued, task.unacked, task.deferred, task.dead


TASKS = [Task(queued, unacked, deferred) for queued, unacked, deferred in product((0, 1), repeat=3)]


@pytest.mark.parametrize("task", TASKS)
def test_a_deferral_is_the_step_of_the_model(server: fakeredis.FakeRedis, task: Task) -> None:
    put(server, task)
    server.eval((SCRIPTS / "defer.lua").read_text(), 3, UNACKED, INDEX, DEFERRED, "tag", "message", "", "LPUSH")
    world = World((task,), (Hand(0, INDEXED),), (None,))
    [step] = Deferrals(atomic=True)._defer(world, 0, Hand(0, INDEXED))
    assert found(server) == places(step.after)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("destination", "number"), [("resumed", 3), ("dead-lettered", 2), ("dropped", 0)])
def test_a_move_is_the_step_of_the_model(
    server: fakeredis.FakeRedis, task: Task, destination: str, number: int
) -> None:
    put(server, task)
    keys = [DEFERRED, DEAD, QUEUED]
    server.eval((SCRIPTS / "move.lua").read_text(), len(keys), *keys, "message", number, "message")
    world = World((task,), (None,), (Hand(0, UNINDEXED),))
    steps = {step.what: step.after for step in Deferrals(atomic=True)._moved(world, 0, Hand(0, UNINDEXED))}
    assert found(server) == places(steps.get(f"0 is {destination}") or world)
