"""The drill's verdict: a good recording passes, and each kind of harm fails its own line."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from workers.load import BreakerEvent, Result, Submission
from workers.verdict import Limits, Marks, Recording, judge, passed

ILL_AT, HEALED_AT = 100.0, 120.0


def mail_tasks(*, during: float = 20.0) -> tuple[list[Submission], dict[str, Result]]:
    """Ten seconds at 20/s before the outage and 20 seconds at ``during``/s in it."""
    times = [90 + n / 20 for n in range(200)] + [ILL_AT + n / during for n in range(int(20 * during))]
    submissions = [Submission(f"mail-{n}", "mail", n, at) for n, at in enumerate(times)]
    return submissions, {s.task_id: Result(s.task_id, "SUCCESS", {"id": str(s.key)}, s.at) for s in submissions}


def figures(**changes: Any) -> dict[str, Any]:
    return {"repeated": {}, "arrivals_while_ill": [], **changes}


def recording(**changes: Any) -> Recording:
    submissions, finished = mail_tasks()
    submissions.append(Submission("order", "payments", 7, 105.0))
    finished["order"] = Result("order", "SUCCESS", {"id": "7"}, 123.0)
    good = Recording(
        submissions=submissions,
        finished=finished,
        strays=[],
        stats={"payments": figures(arrivals_while_ill=[101.0] * 12), "mail": figures(), "accounts": figures()},
        transitions=[BreakerEvent(103.0, "breaker-half-opened", "payments")],
        deferred=frozenset({"order"}),
        fallbacks=Counter(cached=30),
        peak_deferred=40,
        limits={"payments": Limits(calls_to_trip=5, trial_calls=3, slots=4, longest_open=5.5)},
        marks=Marks(measured_from=90.0, ill_at=ILL_AT, healed_at=HEALED_AT),
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
        ({"peak_deferred": 0}, ["waiting in state DEFERRED at the peak"]),
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
    at_bound = {**recording().stats, "payments": figures(arrivals_while_ill=[101.0] * 12)}
    over = {**recording().stats, "payments": figures(arrivals_while_ill=[101.0] * 13)}
    assert failed_lines(recording(stats=at_bound)) == []
    assert failed_lines(recording(stats=over)) == ["calls that reached payments while ill"]


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
