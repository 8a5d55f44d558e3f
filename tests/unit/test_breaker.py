"""What users hold in their hands: guarded calls in every state, the probe, the operator's verbs."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import trio
import trio.lowlevel
from celery import Celery

from resilient_tasks.breaker import Breaker
from resilient_tasks.checks import Probe
from resilient_tasks.core.classification import Verdict
from resilient_tasks.core.model import Grant, Outcome, State, Transition
from resilient_tasks.dependency import Admitted, Fleet
from resilient_tasks.errors import BreakerOpenError, ConfigurationError, StoreError
from resilient_tasks.guard import Scope
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.view import DENIAL_MEMORY
from tests.support.doubles import FlakyStore, ManualClock, wait_until

POLICY = BreakerPolicy(minimum_calls=4, window=20, open_duration=5, open_jitter=0, trial_calls=2)


class Rig:
    """A breaker in a fleet of one, on a clock that stops."""

    def __init__(self, policy: BreakerPolicy = POLICY) -> None:
        self.clock = ManualClock()
        self.store = FlakyStore(self.clock)
        self.made: list[Transition] = []
        self.fleet = Fleet(self.store, announce=self.made.append, clock=self.clock)
        self.breaker = Breaker("payments", policy, fleet=lambda: self.fleet)
        self.ran = 0

    def acquire(self, holder: str) -> Grant:
        return self.fleet.acquire(self.breaker._dependency.spec, holder)

    def works(self) -> str:
        self.ran += 1
        return "paid"

    def fails(self) -> None:
        self.ran += 1
        raise ConnectionResetError("no")

    def fail(self, times: int) -> None:
        for _ in range(times):
            with pytest.raises(ConnectionResetError):
                self.breaker.call(self.fails)

    def half_open(self) -> None:
        """Open the breaker and let its time pass."""
        self.breaker.trip()
        self.clock.advance(5)
        self.breaker.snapshot()  # what a follower has read before the time was up is no news any more

    def figures(self) -> tuple[int, int]:
        assert self.fleet.reporter.flush(60)
        snapshot = self.breaker.snapshot()
        return snapshot.calls, snapshot.failures

    def decisions(self) -> int:
        return sum(self.store.calls[name] for name in ("read", "acquire", "record", "settle", "renew"))


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.fleet.close()


def use_call(rig: Rig, fn: Any) -> Any:
    return rig.breaker.call(fn)


def use_guard(rig: Rig, fn: Any) -> Any:
    with rig.breaker.guard():
        return fn()


def use_decorator(rig: Rig, fn: Any) -> Any:
    @rig.breaker
    def guarded() -> Any:
        return fn()

    return guarded()


def use_async_guard(rig: Rig, fn: Any) -> Any:
    async def main() -> Any:
        async with rig.breaker.guard():
            return fn()

    return asyncio.run(main())


def use_async_decorator(rig: Rig, fn: Any) -> Any:
    @rig.breaker
    async def guarded() -> Any:
        return fn()

    return asyncio.run(guarded())


def use_async_call(rig: Rig, fn: Any) -> Any:
    async def body() -> Any:
        await asyncio.sleep(0)
        return fn()

    async def main() -> Any:
        return await rig.breaker.call(body)

    return asyncio.run(main())


def use_coroutine_of_a_plain_function(rig: Rig, fn: Any) -> Any:
    async def body() -> Any:
        return fn()

    async def main() -> Any:
        return await rig.breaker.call(functools.partial(returning, body))

    return asyncio.run(main())


def returning(body: Any) -> Any:
    """Make a coroutine without being a coroutine function."""
    return body()


every_way = pytest.mark.parametrize(
    "use",
    [
        use_call,
        use_guard,
        use_decorator,
        use_async_guard,
        use_async_decorator,
        use_async_call,
        use_coroutine_of_a_plain_function,
    ],
)


def elsewhere(fn: Callable[..., Any], *args: Any) -> Any:
    """Call a function as another thread of the same process would: with nothing around it."""
    return contextvars.Context().run(fn, *args)


# --- guarded calls, every way -------------------------------------------------------------------------


@every_way
def test_a_call_runs_and_is_counted(rig: Rig, use: Any) -> None:
    assert use(rig, rig.works) == "paid"
    assert rig.ran == 1
    assert rig.figures() == (1, 0)


@every_way
def test_failures_reach_the_caller_until_it_trips_and_the_next_call_does_not_run(rig: Rig, use: Any) -> None:
    for _ in range(4):
        with pytest.raises(ConnectionResetError, match="no"):
            use(rig, rig.fails)
    assert rig.breaker.state is State.OPEN
    with pytest.raises(BreakerOpenError) as refused:
        use(rig, rig.works)
    assert rig.ran == 4
    assert (refused.value.breaker, refused.value.state, refused.value.retry_after) == ("payments", "OPEN", 5.0)
    assert [(made.previous, made.state) for made in rig.made] == [(State.CLOSED, State.OPEN)]


@every_way
def test_trials_close_the_breaker(rig: Rig, use: Any) -> None:
    rig.half_open()
    assert use(rig, rig.works) == "paid"
    assert rig.breaker.state is State.HALF_OPEN
    assert use(rig, rig.works) == "paid"
    assert rig.breaker.state is State.CLOSED
    assert [made.state for made in rig.made] == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    assert rig.figures() == (0, 0)


@every_way
def test_a_failed_trial_opens_it_again(rig: Rig, use: Any) -> None:
    rig.half_open()
    with pytest.raises(ConnectionResetError):
        use(rig, rig.fails)
    assert rig.breaker.state is State.OPEN
    assert rig.breaker.snapshot().openings == 2


@every_way
def test_a_trial_that_says_nothing_frees_its_permit(rig: Rig, use: Any) -> None:
    def mistake() -> None:
        raise KeyError("id")

    rig.half_open()
    for _ in range(5):
        with pytest.raises(KeyError):
            use(rig, mistake)
    assert rig.breaker.state is State.HALF_OPEN
    assert rig.breaker.snapshot().trials == 0


@every_way
def test_interruptions_say_nothing(rig: Rig, use: Any) -> None:
    def interrupted() -> None:
        raise GeneratorExit

    with pytest.raises(GeneratorExit):
        use(rig, interrupted)
    assert rig.figures() == (0, 0)


@every_way
def test_a_forced_open_breaker_refuses_for_ever(rig: Rig, use: Any) -> None:
    rig.breaker.isolate("maintenance")
    rig.clock.advance(10**7)
    with pytest.raises(BreakerOpenError) as refused:
        use(rig, rig.works)
    assert refused.value.state == "FORCED_OPEN"
    assert refused.value.retry_after is None
    assert rig.ran == 0


@every_way
def test_slow_calls_count_as_slow(use: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 100_000, 3))
    monkeypatch.setattr("resilient_tasks.guard.perf_counter", lambda: next(ticks))
    rig = Rig(BreakerPolicy(minimum_calls=2, slow_call_duration=2.0, slow_call_rate_threshold=1.0))
    use(rig, rig.works)
    use(rig, rig.works)
    assert rig.fleet.reporter.flush(60)
    assert rig.breaker.state is State.OPEN
    assert rig.breaker.snapshot().slow_rate == 1.0
    rig.fleet.close()


# --- what admission costs -----------------------------------------------------------------------------


def test_a_closed_breaker_is_read_once_and_then_no_more(rig: Rig) -> None:
    rig.breaker.call(rig.works)
    assert rig.fleet.reporter.flush(60)
    before = rig.decisions()
    for _ in range(1000):
        rig.breaker.call(rig.works)
        with rig.breaker.guard():
            rig.works()
    assert rig.fleet.reporter.flush(60)
    assert rig.decisions() - before <= 2
    assert rig.figures() == (2001, 0)


def test_an_open_breaker_refuses_without_asking(rig: Rig) -> None:
    rig.breaker.trip()
    before = rig.decisions()
    for _ in range(1000):
        with pytest.raises(BreakerOpenError):
            rig.breaker.call(rig.works)
    assert rig.decisions() == before


def test_a_breaker_joins_knowing_its_state(rig: Rig) -> None:
    rig.breaker.isolate()
    newcomer = Fleet(rig.store, clock=rig.clock)
    breaker = Breaker("payments", POLICY, fleet=lambda: newcomer)
    with pytest.raises(BreakerOpenError):
        breaker.call(rig.works)
    newcomer.close()


def test_a_denial_is_not_asked_for_again_at_once(rig: Rig) -> None:
    rig.half_open()
    first, second = rig.breaker.guard(), rig.breaker.guard()
    with first, contextlib.ExitStack() as stack:
        elsewhere(second.__enter__)
        stack.push(second)
        for _ in range(50):
            with pytest.raises(BreakerOpenError) as refused:
                elsewhere(rig.breaker.call, rig.works)
        assert refused.value.state == "HALF_OPEN"
        assert rig.store.calls["acquire"] == 3
        rig.clock.advance(DENIAL_MEMORY)
        with pytest.raises(BreakerOpenError):
            elsewhere(rig.breaker.call, rig.works)
        assert rig.store.calls["acquire"] == 4
    assert rig.breaker.state is State.CLOSED


def test_being_a_moment_early_is_no_denial_to_remember(rig: Rig) -> None:
    rig.half_open()
    rig.store.inner._clock = lambda: rig.clock() - 0.002  # the server's clock, which this process can only estimate
    with pytest.raises(BreakerOpenError):
        rig.breaker.call(rig.works)
    rig.clock.advance(0.002)
    assert rig.breaker.call(rig.works) == "paid"


def test_a_permit_given_back_admits_one_more(rig: Rig) -> None:
    def mistake() -> None:
        with pytest.raises(BreakerOpenError):
            elsewhere(rig.breaker.call, rig.works)
        raise KeyError

    rig.half_open()
    with rig.breaker.guard():
        with pytest.raises(KeyError):
            elsewhere(rig.breaker.call, mistake)
        assert elsewhere(rig.breaker.call, rig.works) == "paid"


def test_a_call_from_before_the_trip_changes_nothing_afterwards(rig: Rig) -> None:
    with contextlib.suppress(ConnectionResetError), rig.breaker.guard():
        rig.half_open()
        assert rig.breaker.call(rig.works) == "paid"
        raise ConnectionResetError
    assert rig.breaker.state is State.HALF_OPEN


def test_threads_run_side_by_side(rig: Rig) -> None:
    inside = threading.Barrier(4, timeout=60)
    threads = [threading.Thread(target=rig.breaker.call, args=(inside.wait,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rig.figures() == (4, 0)


# --- the store is unavailable --------------------------------------------------------------------------------


def test_no_call_fails_because_the_store_is_away(rig: Rig) -> None:
    rig.store.is_unavailable = True
    assert rig.breaker.call(rig.works) == "paid"
    rig.fail(4)
    with pytest.raises(BreakerOpenError):
        rig.breaker.call(rig.works)
    rig.clock.advance(5)
    assert rig.breaker.call(rig.works) == "paid"
    assert rig.breaker.call(rig.works) == "paid"
    assert rig.breaker.state is State.CLOSED


def test_the_shared_breaker_takes_over_when_it_is_back(rig: Rig) -> None:
    rig.breaker.call(rig.works)
    assert rig.fleet.reporter.flush(60)
    rig.store.is_unavailable = True
    rig.fail(4)
    assert rig.breaker.state is State.OPEN
    rig.store.is_unavailable = False
    rig.fleet.view.refresh()
    assert rig.breaker.state is State.CLOSED
    assert rig.breaker.call(rig.works) == "paid"
    assert rig.figures() == (2, 0)


def test_a_verb_needs_the_store(rig: Rig) -> None:
    rig.store.is_unavailable = True
    with pytest.raises(StoreError):
        rig.breaker.trip()


# --- coroutines ---------------------------------------------------------------------------------------


def test_a_refused_coroutine_does_not_begin(rig: Rig, recwarn: pytest.WarningsRecorder) -> None:
    async def body() -> None:
        rig.works()

    rig.breaker.trip()
    with pytest.raises(BreakerOpenError):
        asyncio.run(rig.breaker.call(body))
    assert rig.ran == 0
    assert not [warning for warning in recwarn if "never awaited" in str(warning.message)]


def test_admission_happens_when_a_coroutine_is_awaited(rig: Rig) -> None:
    async def body() -> None:
        rig.works()

    async def main() -> None:
        waiting = rig.breaker.call(body)
        rig.breaker.trip()
        with pytest.raises(BreakerOpenError):
            await waiting

    rig.breaker.call(rig.works)
    asyncio.run(main())
    assert rig.ran == 1


@pytest.fixture
def answer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Lets a store answer that has been asked for a permit."""
    rig.half_open()
    answer, acquire = threading.Event(), rig.store.inner.acquire

    def slow(*args: Any, **kwargs: Any) -> Any:
        answer.wait(60)
        return acquire(*args, **kwargs)

    monkeypatch.setattr(rig.store.inner, "acquire", slow)
    return answer


def test_asking_for_a_permit_does_not_block_the_loop(rig: Rig, answer: threading.Event) -> None:
    async def main() -> int:
        turns = 0
        trial = asyncio.create_task(rig.breaker(_noop)())
        while not rig.store.calls["acquire"] or turns < 10:
            turns += 1
            await asyncio.sleep(0.001)
        answer.set()
        await trial
        return turns

    assert asyncio.run(main()) >= 10


async def _noop() -> None:
    pass


async def until(condition: Callable[[], object]) -> None:
    await asyncio.to_thread(wait_until, condition)


def test_a_permit_that_comes_after_the_cancellation_is_given_back(rig: Rig, answer: threading.Event) -> None:
    async def main() -> None:
        trial = asyncio.create_task(rig.breaker(_noop)())
        await until(lambda: rig.store.calls["acquire"])
        trial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await trial
        answer.set()
        await until(lambda: rig.store.calls["settle"])

    asyncio.run(main())
    wait_until(lambda: rig.breaker.snapshot().trials == 0)
    assert rig.breaker.state is State.HALF_OPEN


async def cancelled_call(rig: Rig, begun: Callable[[], object]) -> None:
    call = asyncio.create_task(rig.breaker.call(asyncio.sleep, 60))
    await asyncio.sleep(0)
    await until(begun)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


def test_a_cancelled_call_says_nothing(rig: Rig) -> None:
    asyncio.run(cancelled_call(rig, lambda: True))
    assert rig.figures() == (0, 0)


def test_a_cancelled_call_is_slow_if_it_came_too_late() -> None:
    async def hang(breaker: Breaker, seconds: float) -> None:
        async def wait() -> None:
            with contextlib.suppress(asyncio.TimeoutError):  # from the beginning of the call, which may come late
                await asyncio.wait_for(asyncio.sleep(60), seconds)
            raise asyncio.CancelledError

        with contextlib.suppress(asyncio.CancelledError, BreakerOpenError):  # on a slow machine it opens sooner
            await breaker.call(wait)

    early, late = Rig(replace(POLICY, slow_call_duration=60)), Rig(replace(POLICY, slow_call_duration=0.05))
    asyncio.run(hang(early.breaker, 0.001))
    assert early.figures() == (0, 0)
    wait_until(lambda: asyncio.run(hang(late.breaker, 0.06)) or late.breaker.state is State.OPEN)
    for rig in (early, late):
        rig.fleet.close()


def test_a_cancelled_trial_gives_its_permit_back(rig: Rig) -> None:
    rig.half_open()
    asyncio.run(cancelled_call(rig, lambda: rig.breaker.snapshot().trials == 1))
    wait_until(lambda: rig.breaker.snapshot().trials == 0)
    assert rig.breaker.state is State.HALF_OPEN


# --- trio ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["guard", "decorator", "call"])
def test_under_trio_the_users_own_error_comes_through(rig: Rig, use: str) -> None:
    async def body() -> None:
        await trio.lowlevel.checkpoint()
        rig.fails()

    async def main() -> None:
        if use == "guard":
            async with rig.breaker.guard():
                await body()
        await (rig.breaker(body)() if use == "decorator" else rig.breaker.call(body))

    for _ in range(4):
        with pytest.raises(ConnectionResetError):
            trio.run(main)
    assert rig.figures()[1] == 4
    rig.clock.advance(5)
    rig.breaker.snapshot()
    with pytest.raises(ConnectionResetError):
        trio.run(main)
    wait_until(lambda: rig.breaker.snapshot().openings == 2)


# --- what is awaited, entered or iterated later ---------------------------------------------------------


class Response:
    """Like aiohttp's: to be awaited, or entered."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.url = "http://pay.example"

    def __await__(self) -> Iterator[Any]:
        return self._get().__await__()

    async def _get(self) -> str:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        return "paid"

    async def __aenter__(self) -> str:
        return await self._get()

    async def __aexit__(self, *_: object) -> None:
        pass


def future_of(rig: Rig, fn: Callable[[], Any]) -> Any:
    async def run() -> Any:
        return fn()

    return rig.breaker.call(lambda: asyncio.ensure_future(run()))


def awaitable_of(rig: Rig, fn: Callable[[], Any]) -> Any:
    return rig.breaker.call(lambda: Response(ConnectionResetError("no") if fn == rig.fails else None))


@pytest.mark.parametrize("start", [future_of, awaitable_of])
@pytest.mark.parametrize("state", ["CLOSED", "HALF_OPEN"])
def test_what_is_awaited_is_part_of_the_call(rig: Rig, start: Any, state: str) -> None:
    async def main(fn: Callable[[], Any]) -> Any:
        return await start(rig, fn)

    if state == "HALF_OPEN":
        rig.half_open()
    assert asyncio.run(main(rig.works)) == "paid"
    with pytest.raises(ConnectionResetError):
        asyncio.run(main(rig.fails))
    assert rig.figures() == ((2, 1) if state == "CLOSED" else (0, 0))
    assert rig.breaker.state is (State.CLOSED if state == "CLOSED" else State.OPEN)


@pytest.mark.parametrize("error", [None, ConnectionResetError("no")])
@pytest.mark.parametrize("fails_at", ["entering", "inside"])
def test_a_block_that_is_entered_is_part_of_the_call(rig: Rig, error: Exception | None, fails_at: str) -> None:
    async def main() -> None:
        response = rig.breaker.call(Response, error if fails_at == "entering" else None)
        assert response.url == "http://pay.example"
        async with response as text:
            assert text == "paid"
            assert not rig.fleet.reporter.flush(60) or rig.breaker.snapshot().calls == 0, "it has not ended"
            if error:
                raise error

    with pytest.raises(ConnectionResetError) if error else contextlib.nullcontext():
        asyncio.run(main())
    assert rig.figures() == (1, int(error is not None))


def test_what_is_never_awaited_frees_its_permit(rig: Rig) -> None:
    rig.half_open()
    for _ in range(5):
        rig.breaker.call(Response)
    assert rig.figures() == (0, 0)
    assert rig.breaker.snapshot().trials == 0


@contextlib.contextmanager
def _stream() -> Iterator[int]:
    yield 1


@contextlib.asynccontextmanager
async def _astream() -> AsyncIterator[int]:
    yield 1


async def _apages() -> AsyncIterator[int]:
    yield 1


def _pages() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize("fn", [_pages, _apages, _stream, _astream, functools.partial(_pages)])
@pytest.mark.parametrize("state", ["CLOSED", "HALF_OPEN"])
def test_what_runs_after_the_call_cannot_be_guarded_by_call(rig: Rig, fn: Any, state: str) -> None:
    if state == "HALF_OPEN":
        rig.half_open()
    with pytest.raises(ConfigurationError, match=r"guard\(\)"):
        rig.breaker.call(fn)
    assert rig.figures() == (0, 0)
    assert rig.breaker.snapshot().trials == 0


def test_a_function_that_returns_a_generator_has_been_called(rig: Rig) -> None:
    assert list(rig.breaker.call(lambda: (number for number in range(3)))) == [0, 1, 2]
    assert rig.figures() == (1, 0)


# --- guards inside a task of the same breaker -----------------------------------------------------------


class Call(Scope):
    """What is around a guard, and notes what is reported."""

    def __init__(self, held: Admitted, task_id: str = "") -> None:
        super().__init__([held], task_id)
        self.noted: list[str] = []
        self.found_in_trial: list[Outcome] = []

    def note_report(self, breaker: str) -> None:
        self.noted.append(breaker)

    def note_trial(self, breaker: str, verdict: Verdict) -> None:
        assert breaker == "payments"
        self.found_in_trial.append(verdict.outcome)


@every_way
def test_a_guard_inside_a_task_answers_in_its_stead(rig: Rig, use: Any) -> None:
    task = Call(Admitted("payments"))
    with task:
        use(rig, rig.works)
        assert set(task.noted) == {"payments"}
        task.noted.clear()
        with pytest.raises(ConnectionResetError):
            use(rig, rig.fails)
    assert set(task.noted) == {"payments"}
    assert rig.figures() == (2, 1)


@every_way
def test_a_guard_inside_a_trial_needs_no_permit_of_its_own(rig: Rig, use: Any) -> None:
    rig.half_open()
    epoch = rig.acquire("the task").snapshot.epoch
    rig.acquire("another task")
    task = Call(Admitted("payments", epoch, trial=True, leased=True))
    with task:
        for _ in range(3):
            assert use(rig, rig.works) == "paid"
    assert rig.store.calls["acquire"] == 2
    assert task.noted == []
    assert set(task.found_in_trial) - {Outcome.IGNORED} == {Outcome.SUCCESS}
    assert rig.breaker.snapshot().trials == 2


# --- definition, probe, verbs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["payments", "p", "Pay.API-2_eu", "9lives", "a" * 100])
def test_names(name: str, rig: Rig) -> None:
    assert Breaker(name, fleet=lambda: rig.fleet).name == name


@pytest.mark.parametrize(
    "name", ["", " pay", "-pay", ".pay", "pay:acme", "pay/eu", "pä", "pay\n", "a" * 101, "{pay}", "undecodable"]
)
def test_other_names_are_refused_by_name(name: str, rig: Rig) -> None:
    with pytest.raises(ConfigurationError) as raised:
        Breaker(name, fleet=lambda: rig.fleet)
    assert repr(name) in str(raised.value)
    assert "allowed is" in str(raised.value)


def test_defining_a_breaker_needs_no_fleet() -> None:
    def too_early() -> Fleet:
        raise AssertionError("the application is not configured yet")

    breaker = Breaker("payments", fleet=too_early)
    assert repr(breaker) == "<Breaker 'payments'>"
    assert breaker(lambda: 1) is not None


def test_decorating_keeps_what_a_function_is(rig: Rig) -> None:
    @rig.breaker
    def fetch(a: int, b: int = 2) -> int:
        """Fetch it."""
        return a + b

    assert fetch(1, b=4) == 5
    assert (fetch.__name__, fetch.__doc__) == ("fetch", "Fetch it.")
    assert asyncio.iscoroutinefunction(rig.breaker(_noop))


def test_arguments_named_like_our_own_reach_the_function(rig: Rig) -> None:
    assert rig.breaker.call(lambda **given: given, fn=1, self=2) == {"fn": 1, "self": 2}


def test_a_double_of_a_function_can_be_decorated(rig: Rig) -> None:
    assert rig.breaker(mock.MagicMock(return_value="paid"))() == "paid"
    assert rig.breaker.call(mock.Mock(return_value=mock.MagicMock(name="response"))).status_code


class _Client:
    pass


@pytest.mark.parametrize(
    ("target", "instead"),
    [
        (_Client, r"call\(_Client\)"),
        (_pages, r"_pages.*use guard\(\) inside it"),
        (staticmethod(_noop), "@staticmethod above"),
        (classmethod(lambda _cls: None), "@classmethod above"),
        (property(lambda _self: None), "not callable"),
        (Celery(set_as_current=False).task(_noop, name="charge", shared=False), r"@app.task\(breaker='payments'\)"),
    ],
)
def test_what_cannot_be_decorated_is_an_error_with_what_to_write(rig: Rig, target: Any, instead: str) -> None:
    with pytest.raises(ConfigurationError, match=instead):
        rig.breaker(target)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_breaker_cannot_be_copied(rig: Rig, duplicate: Any) -> None:
    for breaker in (rig.breaker, rig.breaker.child("acme")):
        with pytest.raises(ConfigurationError, match=r"resilience.breaker\('payments"):
            duplicate(breaker)


def test_a_probe_is_registered_once(rig: Rig) -> None:
    def ping() -> None:
        pass

    def pong() -> None:
        pass

    assert rig.breaker._dependency.probe is None
    assert rig.breaker.probe(ping) is ping
    assert rig.breaker._dependency.probe == Probe(breaker="payments", function=ping)
    assert rig.breaker.probe(timeout=5)(ping) is ping
    assert rig.breaker._dependency.probe == Probe(breaker="payments", function=ping, timeout=5)
    with pytest.raises(ConfigurationError, match=r"ping.*pong"):
        rig.breaker.probe(pong)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_probe_ends_some_time(rig: Rig, timeout: float) -> None:
    with pytest.raises(ConfigurationError, match="timeout="):
        rig.breaker.probe(timeout=timeout)


@pytest.mark.parametrize(
    ("verb", "state"),
    [
        ("trip", State.OPEN),
        ("isolate", State.FORCED_OPEN),
        ("disable", State.DISABLED),
        ("shadow", State.SHADOW),
    ],
)
def test_verbs_lead_to_their_state_at_once(rig: Rig, verb: str, state: State) -> None:
    getattr(rig.breaker, verb)(reason="drill", actor="ann")
    assert rig.breaker.state is state
    assert rig.breaker._dependency.cached_state.admits is (state in {State.DISABLED, State.SHADOW})
    getattr(rig.breaker, verb)(reason="again")
    rig.breaker.reset(reason="done")
    assert rig.breaker.state is State.CLOSED
    assert (rig.made[0].state, rig.made[0].reason, rig.made[0].actor) == (state, "drill", "ann")
    assert len(rig.made) == 2
    assert "@" in rig.made[1].actor


def test_shadow_admits_counts_and_reports_once_and_disabled_admits_and_counts_nothing(rig: Rig) -> None:
    rig.breaker.shadow()
    rig.fail(8)
    assert (rig.breaker.state, rig.figures()) == (State.SHADOW, (8, 8))
    assert [made.would_open for made in rig.made] == [False, True]
    rig.breaker.disable()
    reports = rig.store.calls["record"]
    rig.fail(8)
    assert (rig.breaker.state, rig.figures(), rig.store.calls["record"]) == (State.DISABLED, (8, 8), reports)


def test_a_breaker_can_change_its_fleet(rig: Rig) -> None:
    rig.breaker.trip()
    other = Fleet(FlakyStore(rig.clock), clock=rig.clock)
    former, rig.fleet = rig.fleet, other
    rig.breaker._dependency.detach()
    assert rig.breaker.state is State.CLOSED
    former.close()


# --- what a task layer asks -----------------------------------------------------------------------------


def test_the_task_layers_side(rig: Rig) -> None:
    rig.half_open()
    grant = rig.acquire("task-1")
    assert grant.trial
    rig.breaker._dependency.hold("task-1", 30)
    verdict = Verdict(Outcome.FAILURE, "HTTP 503", 60.0)
    rig.breaker._dependency.fleet.reporter.settle(
        rig.breaker._dependency.spec, "task-1", grant.snapshot.epoch, verdict, wait=5
    )
    assert rig.breaker.state is State.OPEN
    assert rig.breaker._dependency.refuse().retry_after == 60.0
    assert rig.breaker.snapshot().reason.endswith("HTTP 503")


# --- returned values ----------------------------------------------------------------------------------


@pytest.mark.parametrize("use", [use_call, use_decorator, use_async_decorator, use_async_call])
def test_a_classify_of_the_users_judges_what_calls_return(use: Callable[[Rig, Any], Any]) -> None:
    def classify(result: Any) -> Outcome:
        return Outcome.FAILURE if result == "declined" else Outcome.SUCCESS

    rig = Rig(replace(POLICY, classify=classify))
    try:
        assert [use(rig, lambda: "paid"), use(rig, lambda: "declined")] == ["paid", "declined"]
        assert rig.figures() == (2, 1)
    finally:
        rig.fleet.close()


def test_a_verb_from_another_checkout_leaves_the_fleet_its_policy(rig: Rig) -> None:
    rig.fail(1)  # which declares the policy
    rig.fleet.reporter.flush(60)
    other = Fleet(rig.store, clock=rig.clock)
    old_checkout = Breaker("payments", BreakerPolicy(open_duration=60), fleet=lambda: other, revision=1)
    assert old_checkout.trip().retry_after == POLICY.open_duration
    other.close()
