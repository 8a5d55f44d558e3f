"""A guarded call that hangs adds to the slow evidence while it runs, once for each breaker, whatever its end."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from resilient_tasks import Breaker, BreakerPolicy
from resilient_tasks.core.model import State
from resilient_tasks.dependency import Admitted
from resilient_tasks.guard import Scope
from tests.support.doubles import wait_until
from tests.unit.test_breaker import Rig

SLOW = 0.05
POLICY = BreakerPolicy(minimum_calls=100, minimum_tasks=1, slow_call_duration=SLOW)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig(POLICY)
    assert rig.breaker.snapshot().calls == 0
    yield rig
    rig.fleet.close()


def score(breaker: Breaker) -> int:
    """Return the slow score, of 100."""
    breaker._dependency.fleet.reporter.flush(60)
    return round(breaker.snapshot().slow_evidence * 100)


def test_the_score_grows_while_a_call_runs_and_not_at_its_end(rig: Rig) -> None:
    with rig.breaker.guard():
        wait_until(lambda: score(rig.breaker) >= 3)
        before = time.perf_counter()
        least = score(rig.breaker)
    most = least + (time.perf_counter() - before) / SLOW + 1
    assert least <= score(rig.breaker) <= most
    assert rig.figures() == (1, 0), "it is one call for people"
    ended = score(rig.breaker)
    time.sleep(3 * SLOW)
    assert score(rig.breaker) == ended


@pytest.mark.parametrize("ends", ["returns", "fails", "is ignored"])
def test_its_end_adds_nothing_more_to_the_slow_score(rig: Rig, ends: str) -> None:
    errors = {"returns": contextlib.nullcontext, "fails": ConnectionError, "is ignored": KeyError}

    def hang() -> None:
        wait_until(lambda: score(rig.breaker) >= 1)
        if ends != "returns":
            raise errors[ends]

    began = time.perf_counter()
    with contextlib.suppress(ConnectionError, KeyError):
        rig.breaker.call(hang)
    most = (time.perf_counter() - began) / SLOW
    rig.breaker._dependency.fleet.reporter.flush(60)
    snapshot = rig.breaker.snapshot()
    assert round(snapshot.slow_evidence * 100) <= most
    assert round(snapshot.evidence * 100) == (ends == "fails")


def test_what_a_cancelled_coroutine_has_taken_counts(rig: Rig) -> None:
    async def hang() -> None:
        async with rig.breaker.guard():
            await asyncio.sleep(60)

    async def main() -> None:
        call = asyncio.create_task(hang())
        await asyncio.to_thread(wait_until, lambda: score(rig.breaker) >= 2)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call

    began = time.perf_counter()
    asyncio.run(main())
    assert score(rig.breaker) <= (time.perf_counter() - began) / SLOW
    ended = score(rig.breaker)
    time.sleep(2 * SLOW)
    assert score(rig.breaker) == ended


def test_guards_inside_a_guard_report_one_hang_once(rig: Rig) -> None:
    began = time.perf_counter()
    with rig.breaker.guard(), rig.breaker.guard():
        wait_until(lambda: score(rig.breaker) >= 2)
    assert score(rig.breaker) <= (time.perf_counter() - began) / SLOW


def test_what_the_main_process_watches_guards_inside_the_run_do_not_report(rig: Rig) -> None:
    run = Scope([Admitted("payments", rig.breaker._dependency.cached_state.epoch, watched=True)], "a task")
    with run, rig.breaker.guard():
        time.sleep(3 * SLOW)
    assert score(rig.breaker) == 0
    with Scope([Admitted("payments", rig.breaker._dependency.cached_state.epoch)], "a task"), rig.breaker.guard():
        wait_until(lambda: score(rig.breaker) >= 1)


def test_calls_in_several_threads_open_it_while_all_hang() -> None:
    rig = Rig(BreakerPolicy(minimum_calls=6, slow_call_duration=SLOW))
    go_on = threading.Event()

    def hang() -> None:
        with rig.breaker.guard():
            go_on.wait(60)

    threads = [threading.Thread(target=hang) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: rig.breaker.snapshot().state is State.OPEN)
    go_on.set()
    for thread in threads:
        thread.join()
    rig.fleet.close()
