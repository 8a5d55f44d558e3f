"""Every task option, seen from outside."""

from __future__ import annotations

import pytest
from celery.exceptions import TimeoutError as ResultTimeoutError

from resilient_tasks import BreakerOpenError, DeferralExpiredError, DeferredQueueFullError
from tests.integration.conftest import Shop


def test_on_open_fail_fails_at_once(running: Shop) -> None:
    running.open("accounts")
    result = running.strict.apply_async((1,), link_error=running.note.si("failed"))
    with pytest.raises(BreakerOpenError) as refused:
        result.get(timeout=60)
    assert (refused.value.breaker, refused.value.state) == ("accounts", "FORCED_OPEN")
    running.wait(running.notes, "the error callback")
    assert running.calls("accounts") == 0


def test_cached_serves_the_last_good_value_and_says_how_old_it_is(running: Shop) -> None:
    assert running.balance.delay(1).get(timeout=60) == 100
    running.open("accounts")
    result = running.balance.delay(1)
    assert result.get(timeout=60) == 100
    provenance = running.resilience.provenance(result.id)
    assert (provenance.source, provenance.breaker) == ("cached", "accounts")
    assert provenance.age >= 0
    with pytest.raises(BreakerOpenError):
        running.balance.delay(2).get(timeout=60)


def test_a_fallback_answers_for_a_call_that_fails(running: Shop) -> None:
    running.set_health("accounts", "down")
    result = running.nickname.delay(1)
    assert result.get(timeout=60) == "n/a"
    assert running.resilience.provenance(result.id).source == "constant"


def test_without_a_deferral_a_failure_is_celerys(running: Shop) -> None:
    running.set_health("accounts", "down")
    with pytest.raises(ConnectionError):
        running.strict.delay(1).get(timeout=60)


def test_max_attempts_counts_only_while_others_succeed(running: Shop) -> None:
    running.set_health("broken", "down")
    result = running.poison.delay("broken")
    running.wait(lambda: len(running.runs("poison")) >= 4, "a total outage to use up no attempts")
    assert result.state != "FAILURE"

    def others_succeed_until_it_fails() -> bool:
        running.antidote.delay().get(timeout=60)
        return result.state == "FAILURE"

    running.wait(others_succeed_until_it_fails, "the attempts to be used up")
    assert isinstance(result.result, ConnectionError) or "broken is down" in str(result.result)


def test_defer_for_ends_in_failure_and_a_dead_letter(running: Shop) -> None:
    running.open("payments")
    result = running.urgent.apply_async(link_error=running.note.si("expired"))
    with pytest.raises(DeferralExpiredError) as expired:
        result.get(timeout=60)
    assert expired.value.breaker == "payments"
    running.wait(running.notes, "the error callback")
    running.wait(lambda: running.broker.llen("resilient.dead.payments") == 1, "the dead letter")
    assert running.waiting("payments") == 0


def test_max_deferred_bounds_the_queue(running: Shop) -> None:
    running.open("narrow")
    results = [running.squeeze.delay() for _ in range(5)]
    running.wait(lambda: sum(result.state == "FAILURE" for result in results) == 3, "three to be denied")
    assert running.waiting("narrow") == 2
    denied = next(result for result in results if result.state == "FAILURE")
    assert isinstance(denied.result, DeferredQueueFullError)


def test_a_task_that_retries_itself_is_never_also_deferred(running: Shop) -> None:
    running.set_health("tolerant-elsewhere", "down")
    result = running.insistent.delay()
    with pytest.raises(ConnectionError):
        result.get(timeout=60)
    assert len(running.runs("insistent")) == 2
    assert running.waiting("payments") == 0
    running.wait(lambda: running.payments.snapshot().failures == 2, "both runs to be counted")
    evidence = 1 / running.payments.policy.minimum_calls
    assert running.payments.snapshot().evidence == pytest.approx(evidence), "as one vote"


def test_retrying_makes_quick_attempts_that_all_count(running: Shop) -> None:
    before = running.tolerant.snapshot()
    assert running.stubborn.delay("tries").get(timeout=60) == 3
    running.wait(lambda: running.tolerant.snapshot().calls == before.calls + 3, "all attempts to be counted")
    assert running.tolerant.snapshot().failures == before.failures + 2


def test_a_refused_guard_inside_the_body_defers_the_task(running: Shop) -> None:
    running.open("payments")
    result = running.inner.delay()
    running.wait(lambda: running.waiting("payments") == 1, "it to wait")  # its state says so a moment earlier
    assert result.state == "DEFERRED"
    running.close("payments")
    assert result.get(timeout=60) == "ok"


def test_a_hard_time_limit_is_one_failure_and_defers(running: Shop) -> None:
    running.set_health("overrun", "hang")
    result = running.overrun.delay()
    running.wait_state(result, "DEFERRED")
    running.set_health("overrun", "up")
    assert result.get(timeout=90) == "in time"
    runs = int(running.side.get("runs:overrun"))
    # more, if a success of a former test was reported after the counts were reset
    running.wait(lambda: running.tolerant.snapshot().calls >= runs, "all runs to be counted")
    assert running.tolerant.snapshot().failures == runs - 1


def test_the_dependency_of_others_does_not_matter(running: Shop) -> None:
    running.open("payments")
    assert running.ping.delay().get(timeout=60) == "pong"
    with pytest.raises(ResultTimeoutError):
        running.charge.delay(1).get(timeout=0.5)


def test_shadow_counts_how_often_it_would_have_opened(running: Shop) -> None:
    running.accounts.shadow(reason="test")
    running.wait_until_known("accounts")
    running.set_health("accounts", "down")
    for _ in range(3):
        running.strict.delay(1)
    running.wait(lambda: running.accounts.snapshot().would_have_opened == 1, "what would have opened it")
    assert running.accounts.state == "SHADOW"
