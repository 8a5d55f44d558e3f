"""Permits and trials."""

from __future__ import annotations

from dataclasses import replace

import pytest

from resilient_tasks.core.model import State
from tests.contract.lab import Lab


def test_no_more_permits_live_than_trial_calls(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=4).half_open()
    grants = [breaker.ask(holder) for holder in "abcdef"]
    assert [grant.trial for grant in grants] == [True] * 4 + [False] * 2
    assert [grant.admitted for grant in grants] == [True] * 4 + [False] * 2
    assert [grant.snapshot.trials for grant in grants] == [1, 2, 3, 4, 4, 4]

    breaker.settle("b", "I")
    assert [breaker.ask(holder).trial for holder in "gh"] == [True, False]


def test_a_permit_given_back_moves_the_version_that_views_watch(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("a")
    denied = breaker.ask("b").snapshot
    freed = breaker.settle("a", "I").snapshot
    assert freed.version > denied.version
    assert freed.epoch == denied.epoch


@pytest.mark.parametrize(
    ("trial_calls", "trial_successes", "outcomes", "ends_in"),
    [
        (4, None, "SSS", State.HALF_OPEN),
        (4, None, "SSSS", State.CLOSED),
        (4, 4, "F", State.OPEN),
        (4, 4, "SSSF", State.OPEN),
        (4, 3, "SFS", State.HALF_OPEN),
        (4, 3, "SFSS", State.CLOSED),
        (4, 3, "FF", State.OPEN),
        (4, 3, "F", State.HALF_OPEN),
        (4, 1, "FFFF", State.OPEN),
        (4, 1, "FFFS", State.CLOSED),
        (1, None, "S", State.CLOSED),
        (4, None, "SSSI", State.HALF_OPEN),
        (4, None, "IIIIIIIISSSS", State.CLOSED),
    ],
)
def test_trials_decide_as_soon_as_they_can(
    lab: Lab, trial_calls: int, trial_successes: int | None, outcomes: str, ends_in: State
) -> None:
    breaker = lab.breaker(trial_calls=trial_calls, trial_successes=trial_successes).half_open()
    assert breaker.trials(outcomes) is ends_in


def test_closing_empties_the_window_and_starts_the_ramp(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2).half_open()
    breaker.trials("SS")
    snapshot = breaker.snapshot()
    assert (snapshot.calls, snapshot.failures, snapshot.ramp_since) == (0, 0, lab.clock())
    assert snapshot.reason == "2 of 2 trials succeeded"
    assert breaker.calls("FFFF").snapshot.state is State.CLOSED, "four of minimum_calls=5"


def test_only_trials_that_can_matter_are_admitted(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=3).half_open()
    breaker.ask("a")
    breaker.settle("a", "S")
    assert [breaker.ask(holder).trial for holder in "bcd"] == [True, True, False]


def test_a_late_success_after_reopening_changes_nothing(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2).half_open()
    epoch = breaker.snapshot().epoch
    breaker.ask("a")
    breaker.ask("b")
    reopened = breaker.settle("a", "F", cause="ReadTimeout").snapshot
    assert (reopened.state, reopened.reason) == (State.OPEN, "1 of 2 trials failed, last: ReadTimeout")
    late = breaker.settle("b", "S", epoch=epoch).snapshot
    assert late == replace(reopened, version=late.version, trials=0), "nothing but that its permit is free"


def test_a_trial_of_an_older_epoch_changes_nothing(lab: Lab) -> None:
    """Its holder got a permit in the HALF_OPEN before this one, under the same name."""
    breaker = lab.breaker(trial_calls=2).half_open()
    old = breaker.ask("a").snapshot.epoch
    breaker.ask("b")
    breaker.settle("b", "F")
    lab.clock.advance(10)
    assert breaker.ask("a").trial
    answer = breaker.settle("a", "F", epoch=old)
    assert (answer.snapshot.state, answer.snapshot.trials) == (State.HALF_OPEN, 1)


def test_calls_that_started_while_closed_change_nothing_on_trial(lab: Lab) -> None:
    breaker = lab.breaker()
    closed_epoch = breaker.calls("S").snapshot.epoch
    before = breaker.half_open().snapshot()
    assert breaker.calls("FFFFFFFF", epoch=closed_epoch).snapshot == before
    assert breaker.calls("FFFFFFFF").snapshot == before, "nor do calls without a permit"


def test_settling_without_a_permit_changes_nothing(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    before = breaker.snapshot()
    assert breaker.settle("unknown", "F").snapshot == before
    assert breaker.settle("unknown", "S").snapshot == before


def test_a_permit_is_settled_once(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2, trial_successes=2).half_open()
    breaker.ask("a")
    breaker.settle("a", "S")
    assert breaker.settle("a", "S").snapshot.state is State.HALF_OPEN


def test_a_slow_trial_fails_where_slow_calls_matter(lab: Lab) -> None:
    assert lab.breaker("strict", trial_calls=1, slow_call_duration=1.0).half_open().trials("L") is State.OPEN
    assert lab.breaker("one trial", trial_calls=1).half_open().trials("L") is State.CLOSED


def test_trials_count_in_the_totals(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=3, trial_successes=2).half_open()
    breaker.trials("FS")
    snapshot = breaker.snapshot()
    assert (snapshot.total_failures, snapshot.last_success_at) == (6, lab.clock())


@pytest.mark.parametrize("found_by", ["acquire", "advance", "settle"])
def test_a_lease_that_runs_out_is_a_failure(lab: Lab, found_by: str) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("dead", lease=3)
    lab.clock.advance(2.999)
    assert breaker.advance().snapshot.state is State.HALF_OPEN
    lab.clock.advance(0.001)
    assert breaker.snapshot().trials == 0
    {
        "acquire": lambda: breaker.ask("other"),
        "advance": breaker.advance,
        "settle": lambda: breaker.settle("dead", "S"),
    }[found_by]()
    snapshot = breaker.snapshot()
    assert (snapshot.state, snapshot.reason) == (State.OPEN, "1 of 1 trials failed, last: permit expired")
    assert snapshot.retry_after == pytest.approx(10.0), "the second opening in a row"
    assert breaker.transitions[-1].previous is State.HALF_OPEN


def test_a_dead_holder_blocks_no_other_however_often_others_ask(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2, trial_successes=1).half_open()
    breaker.ask("dead", lease=3)
    breaker.ask("alive", lease=100)
    for _ in range(29):
        lab.clock.advance(0.1)
        assert not breaker.ask("other", lease=3).trial
    lab.clock.advance(0.1)
    breaker.settle("alive", "I")
    assert breaker.ask("other").trial
    breaker.settle("other", "S")
    assert breaker.state is State.CLOSED


def test_a_denial_writes_nothing_that_lengthens_a_lease(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("dead", lease=1)
    for _ in range(10):
        lab.clock.advance(0.09)
        assert not breaker.ask("other", lease=1).trial
    lab.clock.advance(0.1)
    assert breaker.advance().snapshot.state is State.OPEN


def test_renewed_permits_live_on(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2).half_open()
    breaker.ask("a", lease=1)
    breaker.ask("b", lease=1)
    for _ in range(10):
        lab.clock.advance(0.9)
        assert lab.store.renew(breaker.name, ["a", "unknown", "b"], lease=1) == [True, False, True]
    assert breaker.advance().snapshot.trials == 2
    lab.clock.advance(1)
    assert lab.store.renew(breaker.name, ["a"], lease=1) == [False]


def test_renewing_never_shortens(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("a", lease=10)
    assert lab.store.renew(breaker.name, ["a"], lease=1) == [True]
    assert breaker.ask("a", lease=1).trial
    lab.clock.advance(9.999)
    assert breaker.advance().snapshot.trials == 1


def test_asking_again_with_a_live_permit_renews_it(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=1).half_open()
    breaker.ask("a", lease=1)
    lab.clock.advance(0.5)
    grant = breaker.ask("a", lease=1)
    assert (grant.trial, grant.snapshot.trials) == (True, 1)
    lab.clock.advance(0.999)
    assert breaker.advance().snapshot.trials == 1


def test_renewing_an_unknown_breaker_finds_no_permit(lab: Lab) -> None:
    assert lab.store.renew("unknown", ["a", "b"], lease=1) == [False, False]


def test_a_trial_that_outlives_its_epoch_is_still_one_in_flight(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2).half_open()
    epoch = breaker.ask("earlier", lease=1).snapshot.epoch
    breaker.ask("a")
    breaker.settle("a", "F")
    assert lab.store.renew(breaker.name, ["earlier"], lease=1000) == [True]
    lab.clock.advance(10)
    assert [breaker.ask(holder).trial for holder in ("b", "c", "earlier")] == [True, False, False]
    assert breaker.snapshot().trials == 2
    breaker.settle("earlier", "F", epoch=epoch)
    assert breaker.state is State.HALF_OPEN, "its outcome comes too late"
    assert [breaker.ask(holder).trial for holder in "cd"] == [True, False]


def test_one_of_an_earlier_epoch_whose_lease_runs_out_is_no_failure_of_this_epoch(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2).half_open()
    breaker.ask("earlier", lease=20)
    breaker.ask("a")
    breaker.settle("a", "F")
    lab.clock.advance(10)
    assert [breaker.ask(holder, lease=100).trial for holder in "bc"] == [True, False]
    lab.clock.advance(10)
    assert breaker.ask("c").trial
    assert breaker.state is State.HALF_OPEN
    assert lab.store.renew(breaker.name, ["earlier"], lease=20) == [False]


def test_trials_of_an_earlier_epoch_are_in_flight_until_they_end_whatever_the_breaker_does(lab: Lab) -> None:
    breaker = lab.breaker(trial_calls=2, trial_successes=1).half_open()
    breaker.ask("earlier", lease=1000)
    breaker.trials("S")
    assert (breaker.state, breaker.snapshot().trials) == (State.CLOSED, 1)
    breaker.half_open()
    assert [breaker.ask(holder).trial for holder in "bc"] == [True, False]
