"""The header that a deferred message carries, and anything else in its place."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.app.task import Context
from hypothesis import example, given
from hypothesis import strategies as st
from kombu.utils.json import dumps, loads

from resilient_tasks.worker.envelope import HEADER, MOST_STEPS, Envelope, Step
from resilient_tasks.worker.request import GatedRequest

SECONDS = st.floats(min_value=0, max_value=1e12)
COUNTS = st.integers(min_value=0, max_value=10**12)
ENVELOPES = st.builds(
    Envelope, breaker=st.text(), origin=st.text(), reason=st.text(), since=SECONDS, attempts=COUNTS,
    attempted_at=SECONDS, not_before=SECONDS, deadline=SECONDS, expires=SECONDS, died_at=SECONDS, resumed=COUNTS,
    exchange=st.text(), routing_key=st.text(), expiration=COUNTS,
    history=st.lists(st.builds(Step, SECONDS, st.text(), st.text()), max_size=MOST_STEPS).map(tuple),
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20)
NEARLY_ENVELOPES = st.dictionaries(st.sampled_from(sorted(asdict(Envelope()))), SCALARS | JSON)


@given(ENVELOPES)
def test_an_envelope_survives_the_message(envelope: Envelope) -> None:
    headers = loads(dumps(envelope.write({"id": "an-id"})))
    assert Envelope.read(headers) == envelope
    assert Envelope.take(headers) == envelope
    assert headers == {"id": "an-id"}


@given(JSON | NEARLY_ENVELOPES)
@example({"attempts": 10**400})
@example({"since": 10**400})
@example({"since": float("inf")})
@example({"attempts": True})
@example({"unknown": {"nested": [[[]]]}})
@example({"history": [[1.0, "deferred", ""]] * (MOST_STEPS + 1)})
@example({"history": [[1.0, "deferred"]]})
@example({"history": [[1.0, "deferred", None]]})
@example({"history": [["1", "deferred", ""]]})
@example({"history": {"at": 1}})
def test_whatever_is_in_the_header_a_sane_envelope_is_read(value: Any) -> None:
    envelope = Envelope.read({HEADER: value})
    assert Envelope.read(loads(dumps(envelope.write({})))) == envelope


@given(JSON)
def test_headers_of_any_kind_hold_no_envelope(headers: Any) -> None:
    assert Envelope.read(headers) == Envelope()


@pytest.fixture(scope="module")
def app() -> Celery:
    app = Celery("envelopes", broker="memory://", set_as_current=False)

    @app.task(name="known", shared=False)
    def known() -> None: ...

    app.finalize()
    return app


@given(value=JSON | NEARLY_ENVELOPES)
def test_the_header_never_reaches_the_task(app: Celery, value: Any) -> None:
    headers = {"id": "an-id", "task": "known", "x-trace": "abc", HEADER: value}
    message = SimpleNamespace(
        headers=headers, body="[[], {}, {}]", payload=[[], {}, {}], content_type="application/json",
        content_encoding="utf-8", delivery_info={}, properties={"application_headers": headers},
    )  # fmt: skip
    request = GatedRequest(message, app=app, task=app.tasks["known"], headers=headers)
    assert HEADER not in request.request_dict
    assert HEADER not in request.request_dict["properties"]["application_headers"]
    assert HEADER not in (Context(request.request_dict).headers or {})
    assert HEADER not in vars(request.context)
    assert Context(request.request_dict).headers == {"x-trace": "abc"}
    assert HEADER in message.headers  # the message itself is not ours to change


def test_a_task_sees_the_exchange_that_it_was_sent_to(app: Celery) -> None:
    headers = Envelope(breaker="payments", exchange="orders", routing_key="order.new").write(
        {"id": "i", "task": "known"}
    )
    message = SimpleNamespace(
        headers=headers, body="[[], {}, {}]", payload=[[], {}, {}], content_type="application/json",
        content_encoding="utf-8", delivery_info={"exchange": "", "routing_key": "a-queue"}, properties={},
    )  # fmt: skip
    request = GatedRequest(message, app=app, task=app.tasks["known"], headers=headers)
    seen = request.context.delivery_info
    assert (seen["exchange"], seen["routing_key"]) == ("orders", "order.new")


def test_the_worker_that_has_reported_a_deferral_has_the_name_on_the_wire_that_former_releases_read() -> None:
    headers = {HEADER: {"breaker": "payments", "teller": "celery@one"}}
    assert Envelope.read(headers).reported_by == "celery@one"
    assert Envelope.read(headers).write({}) == headers


def test_an_envelope_is_small() -> None:
    assert Envelope(breaker="payments", origin="celery").write({}) == {
        HEADER: {"breaker": "payments", "origin": "celery"}
    }


def test_resuming_marks_the_epoch_and_keeps_the_rest() -> None:
    envelope = Envelope(breaker="payments", origin="celery", attempts=2, since=1.0)
    assert envelope.resume(7, at=2.0) == Envelope(
        breaker="payments", origin="celery", attempts=2, since=1.0, resumed=7, history=(Step(2.0, "resumed"),)
    )


def test_a_task_that_is_refused_inside_its_body_waits_longer_each_time() -> None:
    envelope, waits = Envelope(), []
    for at in range(9):
        waits.append(envelope.back_off())
        envelope = envelope.defer(at).resume(1, at)
    assert waits[:4] == [0.5, 1.0, 2.0, 4.0]
    assert waits[6:] == [30.0, 30.0, 30.0]
