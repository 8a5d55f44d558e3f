"""A process's copy of the breakers: which news wins, what admission reads from it, and who keeps it fresh."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast
from zlib import crc32

import pytest

from resilient_tasks.core.model import Snapshot, State, Verb
from resilient_tasks.errors import StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store import view as view_module
from resilient_tasks.store.base import Spec, Store
from resilient_tasks.store.local import FailoverStore
from resilient_tasks.store.view import DENIAL_MEMORY, POLL_INTERVAL, View
from tests.support.doubles import FlakyStore, ManualClock, wait_until

SPEC = Spec("payments", BreakerPolicy(ramp=10))
SERVER_AHEAD = 500_000.0


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> FlakyStore:
    return FlakyStore(lambda: clock() + SERVER_AHEAD)


@pytest.fixture
def view(store: FlakyStore, clock: ManualClock) -> Iterator[View]:
    view = View(store, clock)
    view.declare(SPEC)
    yield view
    view.stop()


def snapshot(
    clock: ManualClock, state: State = State.CLOSED, epoch: int = 5, version: int = 5, **fields: Any
) -> Snapshot:
    now = clock() + SERVER_AHEAD
    return Snapshot(SPEC.name, state, epoch, version, now=now, since=now, **fields)


# --- what admission reads -----------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(State))
def test_only_some_states_admit(view: View, clock: ManualClock, state: State) -> None:
    view.update(snapshot(clock, state))
    assert view.state("payments").admits is (state in {State.CLOSED, State.DISABLED, State.SHADOW})
    assert view.state("payments").epoch == 5


def test_an_unknown_breaker_admits(view: View) -> None:
    cached = view.state("payments")
    assert cached.admits
    assert not cached.known
    assert cached.epoch == 0


def test_open_refuses_until_its_deadline_on_this_clock(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.OPEN, open_until=clock() + SERVER_AHEAD + 10))
    cached = view.state("payments")
    assert cached.refuses
    assert cached.retry_after == pytest.approx(10)
    clock.advance(9.99)
    assert cached.refuses
    assert cached.retry_after == pytest.approx(0.01)
    clock.advance(0.01)
    assert not cached.refuses
    assert not cached.admits
    assert cached.retry_after == 0.0


def test_forced_open_has_no_deadline(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.FORCED_OPEN))
    cached = view.state("payments")
    clock.advance(10**9)
    assert cached.refuses
    assert cached.deadline == math.inf
    assert cached.retry_after is None


def test_a_denial_is_remembered_until_the_version_moves(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.HALF_OPEN))
    cached = view.state("payments")
    assert not cached.refuses
    cached.deny()
    assert cached.refuses
    assert cached.retry_after == DENIAL_MEMORY
    view.update(snapshot(clock, State.HALF_OPEN, version=6))
    assert not cached.refuses
    cached.deny()
    clock.advance(DENIAL_MEMORY)
    assert not cached.refuses


def test_the_ramp_grows_from_a_tenth_to_all(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, ramp_since=clock() + SERVER_AHEAD))
    shares = []
    for _ in range(6):
        shares.append(view.state("payments").ramp_share())
        clock.advance(2)
    assert shares == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    view.update(snapshot(clock, State.SHADOW, epoch=6, ramp_since=clock()))
    assert view.state("payments").ramp_share() == 1.0


def test_the_stores_clock_is_known(view: View, clock: ManualClock) -> None:
    view.refresh()
    clock.advance(3)
    assert view.server_now() == clock() + SERVER_AHEAD


# --- which news wins ----------------------------------------------------------------------------------


def test_higher_epoch_or_version_wins(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.OPEN, epoch=6, version=8))
    assert not view.update(snapshot(clock, State.CLOSED, epoch=5, version=9))
    assert not view.update(snapshot(clock, State.HALF_OPEN, epoch=6, version=7))
    assert view.state("payments").snapshot.state is State.OPEN
    assert view.update(snapshot(clock, State.HALF_OPEN, epoch=7, version=9))
    assert view.state("payments").snapshot.state is State.HALF_OPEN


def test_figures_of_an_older_reading_do_not_come_back(view: View, clock: ManualClock) -> None:
    older = snapshot(clock, calls=1)
    clock.advance(1)
    view.update(snapshot(clock, calls=2))
    view.update(older)
    assert view.state("payments").snapshot.calls == 2


def test_figures_alone_are_no_change(view: View, clock: ManualClock) -> None:
    assert view.update(snapshot(clock, calls=1))
    assert not view.update(snapshot(clock, calls=2))
    assert view.state("payments").snapshot.calls == 2


def test_an_emptied_store_starts_with_a_higher_epoch(view: View, store: FlakyStore, clock: ManualClock) -> None:
    store.command(SPEC, Verb.TRIP)
    view.refresh()
    clock.advance(60)
    store.wipe(lambda: clock() + SERVER_AHEAD)
    store.command(SPEC, Verb.SHADOW)
    view.refresh()
    assert view.state("payments").snapshot.state is State.SHADOW


def test_an_answer_to_a_later_question_wins_even_with_a_lower_epoch(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.OPEN, epoch=9))
    asked = view.asking()
    assert view.update(snapshot(clock, State.CLOSED, epoch=5), asked)
    assert view.state("payments").snapshot.state is State.CLOSED


def test_an_answer_to_an_earlier_question_does_not(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock, State.CLOSED, epoch=5))
    asked = view.asking()
    view.update(snapshot(clock, State.OPEN, epoch=6))
    assert not view.update(snapshot(clock, State.CLOSED, epoch=5), asked)
    assert view.state("payments").snapshot.state is State.OPEN


def test_breakers_that_were_not_declared_are_ignored(view: View, clock: ManualClock) -> None:
    assert not view.update(replace(snapshot(clock), name="other"))
    with pytest.raises(KeyError):
        view.state("other")


def test_declaring_again_keeps_the_cached_state(view: View) -> None:
    cached = view.state("payments")
    renewed = Spec("payments", BreakerPolicy(window=5), revision=2)
    assert view.declare(renewed) is cached
    assert cached.spec is renewed


def names_read(store: FlakyStore) -> list[list[str]]:
    return [[spec.name for spec in arguments[0]] for name, arguments in store.arguments if name == "read"]


def test_the_first_refresh_reads_all_in_one_round_trip(view: View, store: FlakyStore) -> None:
    view.declare(Spec("mail"))
    view.refresh()
    assert names_read(store) == [["payments", "mail"]]
    assert all(cached.known for cached in view.states())


def test_a_refresh_reads_what_has_changed_and_what_is_not_closed(
    view: View, store: FlakyStore, clock: ManualClock
) -> None:
    mail, idle = Spec("mail"), Spec("idle")
    for spec in (mail, idle):
        view.declare(spec)
    view.refresh()
    clock.advance(10)
    store.command(mail, Verb.ISOLATE)
    for expected in (["payments", "mail"], ["mail"], ["mail"]):  # payments: swept, as it is their turn
        store.arguments.clear()
        clock.advance(1)
        view.refresh()
        [names] = names_read(store)
        assert sorted(set(names) - {"payments", "idle"}) == ["mail"]
        assert len(names) == len(expected)
    store.command(mail, Verb.RESET)
    view.refresh()
    clock.advance(2)
    view.refresh()  # what has changed at that moment may have been noted as older
    store.arguments.clear()
    clock.advance(1)
    view.refresh()
    assert names_read(store) == []


def test_idle_breakers_are_read_one_at_a_time(view: View, store: FlakyStore, clock: ManualClock) -> None:
    for number in range(9):
        view.declare(Spec(f"idle-{number}"))
    view.refresh()
    store.arguments.clear()
    for _ in range(20):
        clock.advance(view_module.SWEEP_INTERVAL / 2)
        view.refresh()
    assert [len(names) for names in names_read(store)] == [1] * 10
    assert len({names[0] for names in names_read(store)}) == 10


def test_all_are_read_when_nothing_is_known_about_changes(view: View, store: FlakyStore, clock: ManualClock) -> None:
    view.declare(Spec("mail"))
    view.refresh()
    store.arguments.clear()
    clock.advance(1_000)
    view.refresh()
    assert names_read(store) == [["payments", "mail"]]


def test_all_are_read_when_the_store_was_away_meanwhile(store: FlakyStore, clock: ManualClock) -> None:
    failover = FailoverStore(cast("Store", store), clock)
    view = View(failover, clock)
    view.declare(SPEC)
    view.declare(Spec("mail"))
    view.refresh()
    store.is_unavailable = True
    failover.advance(SPEC)
    store.is_unavailable = False
    failover.advance(SPEC)
    store.arguments.clear()
    view.refresh()
    assert names_read(store) == [["payments", "mail"]]


def test_a_refresh_that_fails_changes_nothing(view: View, store: FlakyStore) -> None:
    store.command(SPEC, Verb.ISOLATE)
    view.refresh()
    store.is_unavailable = True
    with pytest.raises(StoreError):
        view.refresh()
    assert view.state("payments").snapshot.state is State.FORCED_OPEN


# --- a process that follows ---------------------------------------------------------------------------


def followers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "resilient-tasks-view"]


def test_changes_are_received(view: View, store: FlakyStore) -> None:
    view.follow()
    wait_until(lambda: store.calls["changes"])
    store.command(SPEC, Verb.ISOLATE)
    wait_until(lambda: not view.state("payments").admits)


def test_a_lost_message_is_made_up_for(view: View, store: FlakyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def silence(*, timeout: float) -> Iterator[None]:
        while True:
            threading.Event().wait(min(timeout, 0.01))
            yield None

    monkeypatch.setattr(view_module, "POLL_INTERVAL", 0.05)
    monkeypatch.setattr(store.inner, "changes", silence)
    view.follow()
    wait_until(lambda: store.calls["read"])
    store.command(SPEC, Verb.ISOLATE)
    wait_until(lambda: not view.state("payments").admits)


def test_a_change_is_looked_at_again_if_the_store_was_away_meanwhile(
    store: FlakyStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = replace(SPEC, name="payments:a")
    view = View(FailoverStore(cast("Store", store), clock), clock)
    for spec in (SPEC, child):
        view.declare(spec)
    view.refresh()
    view.look(child)
    clock.advance(60)
    store.command(child, Verb.ISOLATE)
    with monkeypatch.context() as away:
        away.setattr(store.inner, "changed", lambda since, ask=store.inner.changed: pull(store, ask(since)))
        view.refresh()
    store.is_unavailable = False
    assert view.state(child.name).admits, "a local store has answered"
    clock.advance(5)
    view.refresh()
    assert not view.state(child.name).admits


def pull(store: FlakyStore, answer: Any) -> Any:
    store.is_unavailable = True
    return answer


def test_following_survives_an_outage(view: View, store: FlakyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view_module, "POLL_INTERVAL", 0.01)
    store.is_unavailable = True
    view.follow()
    wait_until(lambda: store.calls["changed"] > 3)
    store.is_unavailable = False
    store.command(SPEC, Verb.ISOLATE)
    wait_until(lambda: not view.state("payments").admits)


def test_following_survives_a_mistake_in_the_store(
    view: View, store: FlakyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(view_module, "POLL_INTERVAL", 0.01)
    with monkeypatch.context() as broken:
        broken.setattr(store.inner, "read", lambda specs: 1 / 0)
        view.follow()
        wait_until(lambda: "ZeroDivisionError" in caplog.text)
    store.command(SPEC, Verb.ISOLATE)
    wait_until(lambda: not view.state("payments").admits)


def test_a_connection_closed_at_the_end_is_no_news(
    view: View, store: FlakyStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    listening, closed = threading.Event(), threading.Event()

    def cut(*, timeout: float) -> Iterator[None]:
        listening.set()
        closed.wait(60)
        raise ValueError("I/O operation on closed file")
        yield None

    monkeypatch.setattr(store.inner, "changes", cut)
    view.follow()
    listening.wait(60)
    view.stop(timeout=0)
    closed.set()
    view.stop()
    assert caplog.text == ""


def test_there_is_one_follower_and_it_stops(view: View) -> None:
    before = len(followers())
    view.follow()
    view.follow()
    assert len(followers()) == before + 1
    view.stop()
    assert len(followers()) == before
    view.follow()
    assert len(followers()) == before + 1


# --- children of a prefork pool -----------------------------------------------------------------------


def in_child(work: Any) -> str:
    """Run ``work`` in a forked process and return the text that it returns."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            text = str(work())
        except BaseException as error:
            text = repr(error)
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def become_child(view: View) -> None:
    """Let the fork handler's part happen in this process: it is the child now, and another is the main process."""
    view.after_fork()
    view.become_child()


def bump(view: View) -> None:
    """Do in the main process's stead what it does when it has received a change."""
    assert view._shared is not None
    view._shared[place_of("payments", view)] += 1


def place_of(name: str, view: View) -> int:
    return crc32(name.encode()) % len(view._shared or ())


def counted(view: View) -> int:
    return 0 if view._shared is None else view._shared[place_of("payments", view)]


def test_a_child_starts_with_what_its_parent_knew(view: View, store: FlakyStore) -> None:
    store.command(SPEC, Verb.ISOLATE)
    view.share()
    view.refresh()

    def look() -> str:
        view.become_child()
        store.calls.clear()
        return f"{view.state('payments').snapshot.state} {dict(store.calls)}"

    assert in_child(look) == "FORCED_OPEN {}"


def test_the_main_process_counts_changes_not_figures(view: View, clock: ManualClock) -> None:
    view.share()
    view.update(snapshot(clock))
    before = counted(view)
    view.update(snapshot(clock, calls=7))
    assert counted(view) == before
    view.update(snapshot(clock, State.OPEN, epoch=6))
    assert counted(view) == before + 1


def test_a_forked_child_follows_the_main_process_through_memory(
    view: View, store: FlakyStore, clock: ManualClock
) -> None:
    view.share()
    view.refresh()
    readable, writable = os.pipe()

    def look() -> str:
        view.become_child()
        os.read(readable, 1)
        store.inner.command(SPEC, Verb.ISOLATE)  # the child's copy of the "shared" store; the bump is the parent's
        store.calls.clear()
        cached = view._states["payments"]
        behind = cached.is_behind
        return f"{behind} {view.state('payments').snapshot.state} {cached.is_behind} {dict(store.calls)}"

    threading.Timer(
        0.05, lambda: (view.update(snapshot(clock, State.FORCED_OPEN, 10**13, 10**13)), os.write(writable, b"!"))
    ).start()
    assert in_child(look) == "True FORCED_OPEN False {'read': 1}"


def test_a_child_reads_only_when_something_has_moved(view: View, store: FlakyStore) -> None:
    view.share()
    view.refresh()
    become_child(view)
    store.calls.clear()
    for _ in range(100):
        view.state("payments")
    assert store.calls == {}
    bump(view)
    for _ in range(100):
        view.state("payments")
    assert store.calls == {"read": 1}


def test_a_child_that_cannot_read_keeps_what_it_has_and_tries_twice_a_second(
    view: View, store: FlakyStore, clock: ManualClock
) -> None:
    view.share()
    view.refresh()
    become_child(view)
    store.is_unavailable = True
    store.inner.command(SPEC, Verb.ISOLATE)
    bump(view)
    store.calls.clear()
    for _ in range(10):
        assert view.state("payments").admits
    assert store.calls == {"read": 1}
    clock.advance(POLL_INTERVAL)
    store.is_unavailable = False
    assert not view.state("payments").admits


def test_a_child_never_follows_nor_counts(view: View, clock: ManualClock) -> None:
    view.share()
    become_child(view)
    before = len(followers())
    view.follow()
    assert len(followers()) == before
    before = counted(view)
    view.update(snapshot(clock, State.OPEN, epoch=9))
    assert counted(view) == before
    assert view.state("payments").snapshot.state is State.OPEN


def test_a_fork_without_shared_memory_follows_for_itself(view: View) -> None:
    view.follow()

    def look() -> str:
        before = len(followers())
        [cached] = view.states()
        behind = cached.is_behind
        view.catch_up(cached)
        return f"{before} {behind} {len(followers())} {cached.is_behind}"

    assert in_child(look) == "0 True 1 False"


def test_locks_held_at_the_fork_do_not_block_the_child(view: View, clock: ManualClock) -> None:
    view.share()
    with view._lock:
        assert in_child(lambda: view.update(snapshot(clock, State.OPEN))) == "True"


# --- many children ------------------------------------------------------------------------------------


def flap(view: View, clock: ManualClock, names: list[str], epoch: int) -> None:
    for name in names:
        view.update(replace(snapshot(clock, State.OPEN, epoch, epoch), name=name))


def test_what_becomes_of_others_costs_a_child_process_nothing(
    view: View, store: FlakyStore, clock: ManualClock
) -> None:
    view.share()
    view.refresh()
    others = [f"payments:{number}" for number in range(10_000)]
    elsewhere = [name for name in others if place_of(name, view) != place_of("payments", view)]
    counts = view._shared
    become_child(view)
    store.calls.clear()
    main = View(store, clock)
    main._shared = counts
    for epoch in (6, 7):
        flap(main, clock, elsewhere, epoch)
        for _ in range(100):
            view.state("payments")
    assert store.calls == {}
    flap(main, clock, ["payments"], 8)
    view.state("payments")
    assert store.calls == {"read": 1}


def test_a_refresh_reads_a_child_whose_change_has_not_been_received(
    view: View, store: FlakyStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = replace(SPEC, name="payments:acme")
    view.declare(child)
    read: list[str] = []
    reading = store.inner.read

    def noted_read(specs: list[Spec]) -> list[Snapshot]:
        read.extend(spec.name for spec in specs)
        return reading(specs)

    monkeypatch.setattr(store.inner, "read", noted_read)
    view.update(store.inner.command(child, Verb.TRIP).snapshot)
    clock.advance(0.1)
    store.inner.command(child, Verb.ISOLATE)  # and the message is lost
    view.refresh()
    assert read == ["payments", "payments:acme"]
    assert view.state("payments:acme").snapshot.state is State.FORCED_OPEN


def test_a_deferral_in_the_millisecond_of_a_transition_is_seen(view: View, clock: ManualClock) -> None:
    view.update(snapshot(clock))
    cached = view.state("payments")
    assert not cached.has_seen(cached.snapshot.since), "what came after it may have been noted as older"
    assert not cached.has_seen(cached.snapshot.since + 0.0005)
    assert not cached.has_seen(cached.snapshot.now - 0.5), "others know the store's time roughly"
    assert cached.has_seen(cached.snapshot.now - 5)


def test_a_refresh_reads_at_most_so_many_children_and_only_what_has_changed(
    view: View, store: FlakyStore, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    reading = store.inner.read

    def counted_read(specs: list[Spec]) -> list[Snapshot]:
        read.append(len(specs))
        return reading(specs)

    monkeypatch.setattr(store.inner, "read", counted_read)
    for number in range(1_200):
        store.inner.command(replace(SPEC, name=f"payments:{number:04}"), Verb.TRIP)
    for _ in range(6):
        clock.advance(POLL_INTERVAL)
        view.refresh()
    assert max(read) <= 500
    clock.advance(10)
    view.refresh()
    read.clear()
    store.inner.command(replace(SPEC, name=view.active_children()[0]), Verb.ISOLATE)
    known = len(view.states())
    view.refresh()
    assert len(view.states()) <= known + 500
    assert read[0] == 1, "the parent"
