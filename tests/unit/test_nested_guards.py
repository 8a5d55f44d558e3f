"""Guards inside a guarded call, a task's run or a thread of it: they share its permit and slot, and report once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import pytest

from resilient_tasks.breaker import Breaker
from resilient_tasks.core.model import Outcome, State
from resilient_tasks.dependency import Admitted
from resilient_tasks.errors import BreakerOpenError
from resilient_tasks.guard import call_guarded
from tests.unit.test_breaker import (
    POLICY,
    Call,
    Rig,
    elsewhere,
    use_async_decorator,
    use_call,
    use_decorator,
    use_guard,
)

ways = pytest.mark.parametrize("use", [use_call, use_guard, use_decorator, use_async_decorator])


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(replace(POLICY, trial_calls=1))
    yield rig
    rig.fleet.close()


@ways
def test_a_trial_has_one_permit_and_one_outcome_however_many_guards_are_inside(rig: Rig, use: Any) -> None:
    rig.half_open()
    assert use(rig, lambda: rig.breaker.call(lambda: rig.breaker.call(rig.works))) == "paid"
    assert rig.store.calls["acquire"] == 1
    assert rig.breaker.state is State.CLOSED


@ways
def test_a_failure_inside_fails_the_trial_even_if_it_is_handled(rig: Rig, use: Any) -> None:
    def handles() -> None:
        with suppress(ConnectionResetError):
            rig.breaker.call(rig.fails)

    rig.half_open()
    use(rig, handles)
    assert rig.breaker.state is State.OPEN


@ways
def test_the_outcome_counts_once(rig: Rig, use: Any) -> None:
    use(rig, lambda: rig.breaker.call(rig.works))
    assert rig.figures() == (1, 0)
    with pytest.raises(ConnectionResetError):
        use(rig, lambda: rig.breaker.call(rig.fails))
    assert rig.figures() == (2, 1)


@ways
def test_a_failure_of_its_own_counts_although_a_guard_inside_has_succeeded(rig: Rig, use: Any) -> None:
    def charge() -> None:
        rig.breaker.call(rig.works)
        raise ConnectionResetError("no")

    with pytest.raises(ConnectionResetError):
        use(rig, charge)
    assert rig.figures() == (2, 1)


def test_one_exception_object_raised_twice_is_two_failures(rig: Rig) -> None:
    error = ConnectionResetError("the same one")

    def fails() -> None:
        raise error

    for _ in range(2):
        with pytest.raises(ConnectionResetError):
            rig.breaker.call(fails)
    assert rig.figures() == (2, 2)


def test_all_share_one_slot(rig: Rig) -> None:
    narrow = Breaker("narrow", replace(POLICY, max_concurrency=1), fleet=lambda: rig.fleet)

    def both() -> str:
        with pytest.raises(BreakerOpenError, match="at capacity"):
            elsewhere(narrow.call, rig.works)
        return narrow.call(lambda: narrow.call(rig.works))

    assert narrow.call(both) == "paid"
    rig.fleet.reporter.flush(60)
    assert (narrow.snapshot().in_flight, narrow.snapshot().calls) == (0, 1)


@pytest.mark.parametrize("is_trial", [False, True])
def test_a_guard_inside_is_refused_when_the_breaker_has_opened_since(rig: Rig, *, is_trial: bool) -> None:
    if is_trial:
        rig.half_open()
    with rig.breaker.guard():
        rig.breaker.trip()
        with pytest.raises(BreakerOpenError):
            rig.breaker.call(rig.works)


def test_tasks_of_a_group_are_part_of_the_call_around_them(rig: Rig) -> None:
    async def part() -> None:
        async with rig.breaker.guard():
            rig.works()

    async def main() -> None:
        async with rig.breaker.guard():
            await asyncio.gather(*(part() for _ in range(5)), asyncio.to_thread(rig.breaker.call, rig.works))

    rig.half_open()
    asyncio.run(main())
    assert rig.store.calls["acquire"] == 1
    assert rig.breaker.state is State.CLOSED


def test_a_coroutine_that_outlives_the_call_is_no_part_of_it(rig: Rig) -> None:
    async def later(go_on: asyncio.Event) -> None:
        await go_on.wait()
        async with rig.breaker.guard():
            rig.works()

    async def main() -> None:
        go_on = asyncio.Event()
        async with rig.breaker.guard():
            task = asyncio.create_task(later(go_on))
        rig.half_open()
        go_on.set()
        await task

    asyncio.run(main())
    assert rig.store.calls["acquire"] == 1


# --- parent and child -----------------------------------------------------------------------------------


def test_a_childs_guard_inside_its_parents_asks_for_no_second_permit_of_the_parent(rig: Rig) -> None:
    rig.half_open()
    assert rig.breaker.call(lambda: rig.breaker.child("acme").call(rig.works)) == "paid"
    assert rig.breaker.state is State.CLOSED


def test_a_guard_of_the_parent_inside_a_childs_call_counts_for_the_child(rig: Rig) -> None:
    acme = rig.breaker.child("acme")
    for _ in range(4):
        with pytest.raises(ConnectionResetError):
            acme.call(lambda: rig.breaker.call(rig.fails))
    assert (acme.state, rig.figures()) == (State.OPEN, (0, 0))


def test_a_failure_of_a_child_inside_its_parents_call_counts_for_the_child_alone(rig: Rig) -> None:
    acme = rig.breaker.child("acme")
    with pytest.raises(ConnectionResetError):
        rig.breaker.call(lambda: acme.call(rig.fails))
    assert (acme.snapshot().failures, rig.figures()) == (1, (0, 0))


def test_a_child_that_is_open_refuses_inside_its_parents_call(rig: Rig) -> None:
    acme = rig.breaker.child("acme")
    acme.trip()
    with pytest.raises(BreakerOpenError, match="payments:acme"):
        rig.breaker.call(lambda: acme.call(rig.works))


# --- inside a task's run ----------------------------------------------------------------------------------


def in_a_thread(fn: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn).result()


def in_a_bare_thread(fn: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(fn()))
    thread.start()
    thread.join()
    return found[0]


def in_an_executor(fn: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return await asyncio.get_running_loop().run_in_executor(None, fn)

    return asyncio.run(main())


elsewhere_in_the_run = pytest.mark.parametrize("run", [in_a_thread, in_a_bare_thread, in_an_executor])


@elsewhere_in_the_run
@pytest.mark.parametrize("others", [[], [Call(Admitted("mail"), "b")]], ids=["alone", "beside another run"])
def test_threads_of_a_run_are_part_of_its_trial(rig: Rig, run: Any, others: list[Call]) -> None:
    rig.half_open()
    rig.acquire("the task")
    task = Call(Admitted("payments", rig.breaker.snapshot().epoch, trial=True, leased=True), "a")
    with task, ExitStack() as stack:
        for other in others:
            stack.enter_context(other)
        assert run(lambda: rig.breaker.call(rig.works)) == "paid"
    assert rig.store.calls["acquire"] == 1
    assert task.found_in_trial == [Outcome.SUCCESS]


@elsewhere_in_the_run
def test_threads_of_a_run_share_its_slot(rig: Rig, run: Any) -> None:
    narrow = Breaker("narrow", replace(POLICY, max_concurrency=1), fleet=lambda: rig.fleet)
    rig.fleet.acquire(narrow._dependency.spec, "the task")
    with Call(Admitted("narrow", leased=True), "a"):
        assert run(lambda: narrow.call(rig.works)) == "paid"


def test_the_thread_of_another_task_is_part_of_no_run(rig: Rig) -> None:
    running = threading.local()
    rig.fleet._task_id = lambda: getattr(running, "task_id", None)

    def another_task() -> str:
        running.task_id = "b"
        return rig.breaker.call(rig.works)

    task = Call(Admitted("payments"), "a")
    with task:
        assert in_a_bare_thread(another_task) == "paid"
        assert task.noted == []
        assert in_a_bare_thread(lambda: rig.breaker.call(rig.works)) == "paid"
        assert task.noted == ["payments"]


def test_a_call_under_several_breakers_is_around_guards_of_each(rig: Rig) -> None:
    mail = Breaker("mail", POLICY, fleet=lambda: rig.fleet)
    rig.half_open()
    both = [mail._dependency, rig.breaker._dependency]
    assert call_guarded(both, lambda: rig.breaker.call(lambda: mail.call(rig.works))) == "paid"
    assert rig.breaker.state is State.CLOSED
    rig.fleet.reporter.flush(60)
    assert mail.snapshot().calls == 1
