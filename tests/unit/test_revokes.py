"""Which revokes reach the ledger, and which waiting tasks they concern."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery.signals import task_revoked
from hypothesis import given
from hypothesis import strategies as st

from resilient_tasks.errors import StoreError
from resilient_tasks.worker import celery_internals
from resilient_tasks.worker.deferred_tasks import REVOKE_DELAY, RevokeRelay, revoked_among
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Entry

NOW = 1_000_000.0


class Book:
    """A ledger that remembers revokes."""

    def __init__(self) -> None:
        self.now = NOW
        self.away = False
        self.calls: list[list[str]] = []
        self.times: dict[str, float] = {}
        self.hastened: list[tuple[str, str]] = []

    def revoke(self, names: Any) -> None:
        if self.away:
            raise StoreError("away")
        if names:
            self.calls.append(sorted(names))
        self.times.update(dict.fromkeys(names, self.now))

    def hasten(self, breakers: Any, task_ids: Any) -> None:
        self.hastened += [(breaker, task_id) for breaker in breakers for task_id in task_ids]

    def revoked(self, names: Any) -> dict[str, float]:
        return {name: self.times[name] for name in names if name in self.times}


@pytest.fixture
def ledger() -> Any:
    return Book()


@pytest.fixture(autouse=True)
def _nothing_revoked() -> Iterator[None]:
    yield
    celery_internals.revoked_ids.clear()
    celery_internals.revoked_stamps.clear()


def waiting(task_id: str, *, since: float = NOW, **headers: Any) -> Entry:
    return Entry(SimpleNamespace(headers={"id": task_id, **headers}), Envelope(since=since))


def test_what_has_expired_is_no_order_to_revoke(ledger: Any) -> None:
    relay = RevokeRelay()
    celery_internals.revoked_ids.update(["expired", "revoked"])
    for task_id in ("expired", "revoked"):
        request = SimpleNamespace(id=task_id)
        task_revoked.send(None, request=request, terminated=False, signum=None, expired=task_id == "expired")
    relay.pass_on(ledger, lambda: ["payments"])
    relay.pass_on(ledger, lambda: ["payments"])
    assert ledger.calls == [["revoked"]]


def stamped(task_id: str, since: float = NOW, **stamps: Any) -> Entry:
    return waiting(task_id, since=since, stamped_headers=list(stamps), stamps=stamps)


def test_each_revoke_is_passed_on_once(ledger: Any) -> None:
    relay = RevokeRelay()
    relay.pass_on(ledger, lambda: ["payments"])
    celery_internals.revoked_ids.add("a")
    celery_internals.revoked_stamps["tenant"] = ["acme"]
    relay.pass_on(ledger, lambda: ["payments"])
    relay.pass_on(ledger, lambda: ["payments"])
    assert ledger.calls == [['["tenant", "acme"]', "a"]]
    assert ledger.hastened == [("payments", "a")]


def test_a_stamp_that_is_revoked_again_is_passed_on_again(ledger: Any) -> None:
    relay = RevokeRelay()
    for values in (["acme"], ["acme", "acme"]):
        celery_internals.revoked_stamps["tenant"] = values
        relay.pass_on(ledger, lambda: ["payments"])
    assert ledger.calls == [['["tenant", "acme"]']] * 2


def test_what_the_ledger_missed_it_gets_later(ledger: Any) -> None:
    relay = RevokeRelay()
    celery_internals.revoked_ids.add("a")
    ledger.away = True
    with pytest.raises(StoreError):
        relay.pass_on(ledger, lambda: ["payments"])
    ledger.away = False
    relay.pass_on(ledger, lambda: ["payments"])
    assert ledger.calls == [["a"]]


def test_tasks_are_found_by_id_and_by_stamp(ledger: Any) -> None:
    celery_internals.revoked_ids.add("a")
    celery_internals.revoked_stamps.update(tenant=["acme"], user=[1, "2"])
    RevokeRelay().pass_on(ledger, lambda: ["payments"])
    entries = [
        waiting("a"), waiting("b"), stamped("c", tenant="acme"), stamped("d", tenant=["bolt", "acme"]),
        stamped("e", tenant="bolt"), stamped("f", user=1), stamped("g", user="1"), stamped("h", user=2),
        waiting("i", stamps={"tenant": "acme"}),
    ]  # fmt: skip
    assert revoked_among(entries, ledger) == {"a", "c", "d", "f"}
    assert revoked_among([], ledger) == set()


def test_a_revoked_stamp_concerns_only_tasks_that_had_been_sent(ledger: Any) -> None:
    celery_internals.revoked_stamps["tenant"] = ["acme"]
    RevokeRelay().pass_on(ledger, lambda: ["payments"])
    since = {"long ago": NOW - 1000, "a moment later": NOW + 1, "the day after": NOW + REVOKE_DELAY + 1}
    entries = [stamped(task_id, at, tenant="acme") for task_id, at in since.items()]
    assert revoked_among(entries, ledger) == {"long ago", "a moment later"}


def test_a_revoked_id_concerns_its_task_for_good(ledger: Any) -> None:
    ledger.revoke(["a"])
    assert revoked_among([waiting("a", since=NOW + 2 * REVOKE_DELAY)], ledger) == {"a"}


JSON = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(stamped_headers=JSON, stamps=JSON | st.dictionaries(st.sampled_from(["a", "b"]), JSON))
def test_stamps_may_be_anything(stamped_headers: Any, stamps: Any) -> None:
    entry = waiting("a", stamped_headers=stamped_headers, stamps=stamps)
    assert revoked_among([entry], Book()) == set()  # type: ignore[arg-type] # a double
