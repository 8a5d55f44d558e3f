"""The drill's verdict: a good recording passes, and each kind of harm fails its own line."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest
from rich.console import Console

from workers.display import PlainLines, Status, StreamStatus
from workers.load import BreakerEvent, Result, Stream, Submission, schedule
from workers.verdict import Limits, Marks, Recording, judge, passed

FAILED_AT, HEALED_AT = 100.0, 120.0


def mail_tasks(*, during: float = 20.0) -> tuple[list[Submission], dict[str, Result]]:
    """Ten seconds at 20/s before the outage and 20 seconds at ``during``/s in it."""
    times = [90 + n / 20 for n in range(200)] + [FAILED_AT + n / during for n in range(int(20 * during))]
    submissions = [Submission(f"mail-{n}", "mail", n, at) for n, at in enumerate(times)]
    return submissions, {s.task_id: Result(s.task_id, "SUCCESS", {"id": str(s.key)}, s.at) for s in submissions}


def figures(**changes: Any) -> dict[str, Any]:
    return {"repeated": {}, "arrivals_while_failing": [], **changes}


def recording(**changes: Any) -> Recording:
    submissions, finished = mail_tasks()
    submissions.append(Submission("order", "payments", 7, 105.0))
    finished["order"] = Result("order", "SUCCESS", {"id": "7"}, 123.0)
    good = Recording(
        submissions=submissions,
        finished=finished,
        strays=[],
        stats={"payments": figures(arrivals_while_failing=[101.0] * 12), "mail": figures(), "accounts": figures()},
        transitions=[
            BreakerEvent(102.0, "breaker-opened", "payments"),
            BreakerEvent(112.5, "breaker-half-opened", "payments"),
        ],
        deferred=frozenset({"order"}),
        fallbacks=Counter(cached=30),
        peak_deferred=40,
        limits={"payments": Limits(calls_to_open=5, trial_calls=3, slots=4, first_open=5.0, growth=2.0, jitter=0.1)},
        marks=Marks(measured_from=90.0, failed_at=FAILED_AT, healed_at=HEALED_AT),
    )
    return replace(good, **changes)


def failed_lines(judged: Recording) -> list[str]:
    return [row.what for row in judge(judged) if row.ok is False]


def without(task_id: str) -> dict[str, Result]:
    return {key: result for key, result in recording().finished.items() if key != task_id}


def with_result(state: str, value: Any) -> dict[str, Result]:
    return {**recording().finished, "order": Result("order", state, value, 123.0)}


def test_a_good_recording_passes() -> None:
    assert failed_lines(recording()) == []
    assert passed(judge(recording()))


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"finished": with_result("FAILURE", ValueError())}, ["finished under their own id", "failed"]),
        ({"finished": with_result("SUCCESS", {"id": "8"})}, ["finished under their own id"]),
        ({"strays": ["other"]}, ["finished under another id"]),
        ({"fallbacks": Counter()}, ["answered by a fallback"]),
        ({"peak_deferred": 0}, ["DEFERRED at the peak"]),
        ({"deferred": frozenset()}, ["deferred tasks finished after healing"]),
    ],
)
def test_harm_fails_its_line(changes: dict[str, Any], lines: list[str]) -> None:
    assert failed_lines(recording(**changes)) == lines


def test_a_lost_task_is_seen() -> None:
    assert "lost" in failed_lines(recording(finished=without("order")))


def test_an_order_executed_twice_is_seen_but_a_repeated_read_is_fine() -> None:
    stats = recording().stats
    twice = {**stats, "payments": figures(repeated={"7": 2})}
    reads = {**stats, "accounts": figures(repeated={"7": 9})}
    assert failed_lines(recording(stats=twice)) == ["run twice"]
    assert failed_lines(recording(stats=reads)) == []


def test_calls_to_a_dead_service_are_bounded_by_trip_slots_and_trials() -> None:
    at_bound = {**recording().stats, "payments": figures(arrivals_while_failing=[101.0] * 12)}
    over = {**recording().stats, "payments": figures(arrivals_while_failing=[101.0] * 13)}
    assert failed_lines(recording(stats=at_bound)) == []
    assert failed_lines(recording(stats=over)) == ["calls that reached payments while it failed"]


@pytest.mark.parametrize("opened", [[], [BreakerEvent(106.5, "breaker-opened", "payments")]], ids=["never", "late"])
def test_an_outage_that_is_noticed_late_or_never_fails(opened: list[BreakerEvent]) -> None:
    half_opened = BreakerEvent(112.5, "breaker-half-opened", "payments")
    assert failed_lines(recording(transitions=[*opened, half_opened])) == ["payments noticed"]


def test_healthy_work_that_slows_down_fails() -> None:
    submissions, finished = mail_tasks(during=17.0)
    order = recording().finished["order"]
    slow = recording(
        submissions=[*submissions, Submission("order", "payments", 7, 105.0)], finished={**finished, "order": order}
    )
    assert failed_lines(slow) == ["mail, which stays healthy"]


def test_a_late_first_resumption_fails() -> None:
    late = {**recording().finished, "order": Result("order", "SUCCESS", {"id": "7"}, HEALED_AT + 11.0)}
    assert failed_lines(recording(finished=late)) == ["first deferred task finished"]


def test_plain_lines_show_each_phase_at_once_and_then_every_two_seconds() -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    lines = PlainLines(console)
    stream = StreamStatus(
        "payments",
        "OPEN",
        submitted=9,
        finished=4,
        deferred=5,
        failed=0,
        rate=3.0,
        evidence="10 of 10",
        calls_while_failing=2,
    )
    for elapsed, phase in ((0.1, "before"), (0.6, "before"), (1.1, "outage"), (2.2, "outage")):
        lines.show(Status(phase, elapsed, [stream]))
    assert screen.getvalue().splitlines() == [
        "  0.1 s  before",
        "  0.1 s  payments OPEN (evidence 10 of 10) 4/9 at 3/s, 5 deferred",
        "  1.1 s  outage",
        "  2.2 s  payments OPEN (evidence 10 of 10) 4/9 at 3/s, 5 deferred",
    ]


def test_the_schedule_keeps_each_rate_and_the_order_of_time() -> None:
    fast, slow = Stream("fast", task=None, rate=4.0), Stream("slow", task=None, rate=1.0, keys=2)
    calls = list(islice(schedule([fast, slow], start=100.0), 15))
    assert [due for due, _, _ in calls] == sorted(due for due, _, _ in calls)
    assert [due for due, stream, _ in calls if stream is fast][:5] == [100.0, 100.25, 100.5, 100.75, 101.0]
    assert [stream.key(number) for _, stream, number in calls if stream is slow] == [0, 1, 0]
