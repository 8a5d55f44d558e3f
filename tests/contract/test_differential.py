"""The rules in Python and the rules in Lua, driven with the same sequences, say the same.

``DIFFERENTIAL_EXAMPLES=20000 pytest tests/contract/test_differential.py`` looks at that many, new ones
each time; by default it looks at the same 800 each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilient_tasks.core.model import Calls, Outcome, Snapshot, State, Transition, Verb, voter_of
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec, Store, Wish
from resilient_tasks.store.local import LocalStore
from resilient_tasks.store.redis import RedisStore
from tests.contract.lab import CLOCK_LUA, LocalClock, ServerClock
from workers.processes import Server

BY_DEFAULT = 800
EXAMPLES = int(os.environ.get("DIFFERENTIAL_EXAMPLES", "0"))
NAME = "payments"
TASKS = ["task 1", "task 2", "task 3", "task 4", "task 5"]

Step = Callable[["Pair"], object]
Draw = Callable[[st.SearchStrategy[Any]], Any]

policies = st.builds(
    BreakerPolicy,
    failure_rate_threshold=st.sampled_from([0.1, 1 / 3, 0.5, 0.6, 1.0]),
    slow_call_duration=st.sampled_from([None, 1.0]),
    slow_call_rate_threshold=st.sampled_from([0.3, 0.5, 1.0]),
    consecutive_failures=st.sampled_from([None, None, 1, 3, 6]),
    minimum_calls=st.sampled_from([1, 2, 5, 40]),
    minimum_tasks=st.sampled_from([None, None, 1, 3]),
    window=st.sampled_from([0.1, 1.0, 7.777, 20.0]),
    open_duration=st.sampled_from([0.001, 0.3333, 1.0, 5.0]),
    open_multiplier=st.sampled_from([1.0, 1.0001, 1.7, 2.0, 100.0]),
    max_open_duration=st.sampled_from([5.0, 7.5, 30.0]),
    open_jitter=st.sampled_from([0.0, 0.1, 1.0]),
    trial_calls=st.sampled_from([3, 4]),
    trial_successes=st.sampled_from([None, 1, 2, 3]),
    ramp=st.sampled_from([0.0, 0.777, 10.0]),
    max_concurrency=st.sampled_from([None, 4, 7]),
    concurrency=st.sampled_from(["fixed", "adaptive"]),
    min_concurrency=st.sampled_from([1, 3]),
) | st.builds(BreakerPolicy, trial_calls=st.sampled_from([1, 2]), minimum_calls=st.sampled_from([1, 10]))
specs = st.builds(Spec, st.just(NAME), policies, st.sampled_from([0, 0, 0, 1, 2]), st.sampled_from([None, None, 1, 5]))


@dataclass
class Pair:
    """Two stores that must agree, and what both said last."""

    ours: Store
    theirs: Store
    clocks: tuple[LocalClock, ServerClock]
    specs: list[Spec]
    last: Snapshot | None = None
    permits: dict[str, float] = field(default_factory=dict)  # holder -> when its lease ends
    transitions: list[Transition] = field(default_factory=list)

    def both(self, what: str, *args: Any, **kwargs: Any) -> Any:
        mine, other = (getattr(store, what)(*args, **kwargs) for store in (self.ours, self.theirs))
        assert mine == other, f"{what}{args} {kwargs}"
        self.last = getattr(mine, "snapshot", self.last)
        self.transitions += [mine.transition] if getattr(mine, "transition", None) else []
        return mine

    def spec(self, number: int) -> Spec:
        return self.specs[number % len(self.specs)]

    def evidence(self, age: int | None, *told: Any) -> Evidence:
        """Return evidence of ``age`` transitions ago; None: of before the breaker was known."""
        return Evidence(0 if age is None or self.last is None else self.last.epoch - age, *told)

    def holder(self, number: int) -> str:
        """Return a holder of a permit, dead or alive, if there is any."""
        return sorted(self.permits)[number % len(self.permits)] if self.permits else "nobody"

    def pass_time(self, seconds: float) -> None:
        for clock in self.clocks:
            clock.advance(max(0.0, seconds))

    def pass_until(self, instant: float | None) -> None:
        if instant is not None:
            self.pass_time(instant - self.clocks[0]())


# --- steps ------------------------------------------------------------------------------------------

numbers = st.integers(0, 3)
outcomes = st.sampled_from(list(Outcome))
ages = st.sampled_from([0, 0, 0, 0, 0, 0, 1, None])
jitters = st.sampled_from([0.0, 0.123456789, 0.5, 0.999])
leases = st.sampled_from([0.001, 0.5, 3.0, 60.0])
causes = st.sampled_from(["", "ReadTimeout", "HTTP 503"])
retry_afters = st.sampled_from([None, None, 0.0, 0.7, 12.3456, 1e9])
counts = st.sampled_from([0, 1, 1, 2, 3, 7, 50, 100_000])
limits = st.sampled_from([1, 2, 3])
mostly = st.sampled_from([True, True, True, False])
calls = st.builds(
    Calls, outcomes, counts, st.just(""), st.booleans(), st.just(False)
)  # builds() makes up what is missing
voters = st.sampled_from([voter_of(str(number)) for number in range(6)])
votes = st.builds(Calls, outcomes, counts, voters, st.booleans(), st.booleans())
off_by = st.sampled_from([-0.001, 0.0, 0.0, 0.001])


@st.composite
def record(draw: Draw) -> Step:
    n, age, jitter = draw(numbers), draw(ages), draw(jitters)
    told = tuple(draw(st.lists(calls | votes, max_size=4))), draw(causes), draw(retry_afters)
    return lambda pair: pair.both("record", pair.spec(n), pair.evidence(age, *told), jitter=jitter)


@st.composite
def trip(draw: Draw) -> Step:
    n, outcome, told = draw(numbers), draw(st.sampled_from("FFS")), (draw(causes), draw(retry_afters))
    runs = (Calls(Outcome.FAILURE if outcome == "F" else Outcome.SLOW, 100),)
    return lambda pair: pair.both("record", pair.spec(n), pair.evidence(0, runs, *told))


@st.composite
def ask(draw: Draw) -> Step:
    n, holder, lease, jitter = draw(numbers), draw(st.sampled_from("abcdef")), draw(leases), draw(jitters)
    wish = Wish(draw(st.sampled_from(["", "", *TASKS])), waits=draw(st.booleans()), has_room=draw(mostly))

    def step(pair: Pair) -> None:
        if pair.both("acquire", pair.spec(n), holder, lease=lease, jitter=jitter, wish=wish).leased:
            pair.permits[holder] = pair.clocks[0]() + lease

    return step


@st.composite
def keep(draw: Draw) -> Step:
    n, tasks, lease, most = (
        draw(numbers),
        draw(st.lists(st.sampled_from(TASKS), unique=True)),
        draw(leases),
        draw(counts),
    )
    return lambda pair: pair.both("keep_slots", pair.spec(n), tasks, lease=lease, most=most)


@st.composite
def settle(draw: Draw) -> Step:
    n, age, number, outcome, cause, jitter = (draw(s) for s in (numbers, ages, numbers, outcomes, causes, jitters))

    def step(pair: Pair) -> None:
        pair.both("settle", pair.spec(n), pair.holder(number), outcome, pair.evidence(age, (), cause), jitter=jitter)

    return step


@st.composite
def trial(draw: Draw) -> Step:
    """Ask for a permit and settle it at once."""
    n, outcome, cause = draw(numbers), draw(outcomes), draw(causes)

    def step(pair: Pair) -> None:
        pair.both("acquire", pair.spec(n), "quick", lease=60.0)
        pair.both("settle", pair.spec(n), "quick", outcome, pair.evidence(0, (), cause))

    return step


@st.composite
def renew(draw: Draw) -> Step:
    few, lease = draw(st.lists(numbers, max_size=3)), draw(leases)
    return lambda pair: pair.both("renew", NAME, [pair.holder(number) for number in few], lease=lease)


@st.composite
def until_open_ends(draw: Draw) -> Step:
    off = draw(off_by)

    def step(pair: Pair) -> None:
        if pair.last is not None and pair.last.open_until is not None:
            pair.pass_until(pair.last.open_until + off)

    return step


@st.composite
def shadowed(draw: Draw) -> Step:
    """Let it open in SHADOW, let calls wait until about its end, and report one more."""
    n, off, count, jitter = draw(numbers), draw(off_by), draw(counts), draw(jitters)
    told, length = (draw(causes), draw(retry_afters)), draw(st.sampled_from([0.0, 3.0, 7.5, 40.0]))

    def step(pair: Pair) -> None:
        pair.both("command", pair.spec(n), Verb.SHADOW)
        pair.both("record", pair.spec(n), pair.evidence(0, (Calls(Outcome.FAILURE, 100),), *told), jitter=jitter)
        pair.both("record", pair.spec(n), pair.evidence(0, (Calls(Outcome.SUCCESS, count), Calls(Outcome.FAILURE))))
        if pair.last is not None and pair.last.shadow_openings:
            pair.pass_until(pair.last.shadow_openings[-1].until + off)
        pair.both("read", [pair.spec(n)])
        pair.pass_time(length)
        pair.both("record", pair.spec(n), pair.evidence(0, (Calls(Outcome.FAILURE, count),)), jitter=jitter)

    return step


@st.composite
def until_lease_ends(draw: Draw) -> Step:
    off, number = draw(off_by), draw(numbers)
    return lambda pair: pair.pass_until(pair.permits[pair.holder(number)] + off if pair.permits else None)


@st.composite
def pass_one_of_the_policys_times(draw: Draw) -> Step:
    n, off, share = draw(numbers), draw(off_by), draw(st.sampled_from([0.1, 0.95, 1.0, 1.05]))
    name = draw(st.sampled_from(["window", "window", "max_open_duration"]))
    return lambda pair: pair.pass_time(share * getattr(pair.spec(n).policy, name) + off)


@st.composite
def advance(draw: Draw) -> Step:
    n, jitter = draw(numbers), draw(jitters)
    return lambda pair: pair.both("advance", pair.spec(n), jitter=jitter)


@st.composite
def command(draw: Draw) -> Step:
    n, verb, jitter = draw(numbers), draw(st.sampled_from(list(Verb))), draw(jitters)
    return lambda pair: pair.both("command", pair.spec(n), verb, reason="drill", actor="ada", jitter=jitter)


@st.composite
def reset(draw: Draw) -> Step:
    n = draw(numbers)
    return lambda pair: pair.both("command", pair.spec(n), Verb.RESET)


@st.composite
def recover(draw: Draw) -> Step:
    """Wait for HALF_OPEN and make as many successful trials as it takes."""
    n = draw(numbers)

    def step(pair: Pair) -> None:
        pair.pass_until(pair.last.open_until if pair.last else None)
        while pair.both("acquire", pair.spec(n), "quick", lease=60.0).trial:
            pair.both("settle", pair.spec(n), "quick", Outcome.SUCCESS, pair.evidence(0, ()))

    return step


@st.composite
def outlive(draw: Draw) -> Step:
    """Begin a long trial, have others fail until the breaker opens, and wait for the next HALF_OPEN."""
    n, holder = draw(numbers), draw(st.sampled_from("abcdef"))

    def step(pair: Pair) -> None:
        pair.pass_until(pair.last.open_until if pair.last else None)
        if pair.both("acquire", pair.spec(n), holder, lease=10_000.0).trial:
            pair.permits[holder] = pair.clocks[0]() + 10_000.0
        while pair.both("acquire", pair.spec(n), "quick", lease=60.0).trial:
            pair.both("settle", pair.spec(n), "quick", Outcome.FAILURE, pair.evidence(0, ()))
        pair.pass_until(pair.last.open_until if pair.last else None)

    return step


@st.composite
def back_from_the_operator(draw: Draw) -> Step:
    n = draw(numbers)

    def step(pair: Pair) -> None:
        if pair.last is not None and pair.last.state not in {State.CLOSED, State.OPEN, State.HALF_OPEN}:
            pair.both("command", pair.spec(n), Verb.RESET)

    return step


@st.composite
def health_check(draw: Draw) -> Step:
    n, age, outcome, limit, told = draw(numbers), draw(ages), draw(st.sampled_from("FFS")), draw(limits), draw(causes)
    said = Outcome.FAILURE if outcome == "F" else Outcome.SUCCESS
    retry_after, ago, jitter = draw(retry_afters), draw(off_by), draw(jitters)

    def step(pair: Pair) -> None:
        pair.both("begin_health_check", pair.spec(n), since=round(pair.clocks[0]() - abs(ago), 3))
        evidence = pair.evidence(age, (), told, retry_after)
        pair.both("report_health_check", pair.spec(n), said, evidence, limit=limit, jitter=jitter)

    return step


@st.composite
def look(draw: Draw) -> Step:
    n = draw(numbers)
    return lambda pair: pair.both("read", [pair.spec(n), Spec("unknown")])


def some(most: int, *strategies: st.SearchStrategy[Step]) -> st.SearchStrategy[list[Step]]:
    return st.lists(st.one_of(*strategies), min_size=most // 2, max_size=most)


times = (pass_one_of_the_policys_times(), pass_one_of_the_policys_times())
healthy = some(6, record(), record(), trip(), look(), reset(), health_check(), health_check(), *times)
outage = st.tuples(trip(), until_open_ends()).map(list)
waiting = (until_lease_ends(), until_lease_ends())
on_trial = some(8, ask(), ask(), settle(), trial(), renew(), health_check(), *waiting, advance(), record())
in_flight = some(12, ask(), ask(), ask(), ask(), settle(), settle(), keep(), renew(), record(), *waiting)
over = st.tuples(trip(), recover(), pass_one_of_the_policys_times(), look()).map(list)
operated = st.tuples(
    command(),
    st.one_of(record(), trip(), ask(), command(), health_check(), *times),
    shadowed(),
    st.one_of(shadowed(), health_check()),
    back_from_the_operator(),
).map(list)
straggling = st.tuples(trip(), outlive(), ask(), ask(), settle(), renew(), look()).map(list)
chapters = st.one_of(healthy, in_flight, outage, outage, on_trial, on_trial, straggling, over, operated)
stories = st.lists(chapters, min_size=6, max_size=12).map(lambda story: [step for chapter in story for step in chapter])


# --- the test -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(running_server: Server) -> Any:
    client = redis.Redis.from_url(running_server.url())
    store = RedisStore(running_server.url(), namespace="differential", clock=CLOCK_LUA)
    yield store, client
    store.close()
    client.close()


def drive(store: RedisStore, client: redis.Redis, specs: list[Spec], story: list[Step]) -> Pair:
    """Run a sequence on both stores; fails where they differ."""
    client.flushdb()
    clocks = LocalClock(), ServerClock(client)
    pair = Pair(LocalStore(clocks[0]), store, clocks, specs)
    for step in story:
        step(pair)
    pair.both("read", specs)
    return pair


@pytest.mark.timeout(600)  # it computes for a minute; a busy machine takes several
@settings(
    max_examples=EXAMPLES or BY_DEFAULT,
    derandomize=not EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    database=None,
)
@given(specs=st.lists(specs, min_size=1, max_size=2), story=stories)
def test_lua_and_python_agree(shared: tuple[RedisStore, redis.Redis], specs: list[Spec], story: list[Step]) -> None:
    drive(*shared, specs, story)
