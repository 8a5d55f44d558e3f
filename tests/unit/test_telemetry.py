"""OpenTelemetry: the metrics of the catalogue, and what spans are told."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from resilient_tasks import ConfigurationError, Resilience, telemetry
from resilient_tasks.core.counts import Counts
from resilient_tasks.core.model import Snapshot, State
from resilient_tasks.monitor import tracing
from resilient_tasks.monitor.metrics import HEALTH, METRICS, Subject

OPEN = Subject(
    Snapshot("payments", State.OPEN, 17, 17, now=100.0, since=40.0, calls=10, failures=4, deferred=3),
    Counts.of({"SUCCESS": 100, "FAILURE": 20, "refused": 7}),
    "resilient.deferred.payments",
)
PAYMENTS = SimpleNamespace(name="payments", state=State.OPEN)
MAIL = SimpleNamespace(name="mail", state=State.CLOSED)

# --- metrics ----------------------------------------------------------------------------------------


def collected(app: Celery) -> dict[str, Any]:
    """Return what a collection yields, by name of the metric."""
    reader = InMemoryMetricReader()
    telemetry.observe(app, MeterProvider([reader]).get_meter("test"), patience=10.0)
    data: Any = reader.get_metrics_data()
    return {each.name: each.data for each in data.resource_metrics[0].scope_metrics[0].metrics}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> Celery:
    monkeypatch.setattr(telemetry, "read_subjects", lambda runtime: [OPEN])
    app = Celery("shop", set_as_current=False)
    Resilience(app)
    return app


def test_a_collection_has_the_metrics_of_the_catalogue(app: Celery) -> None:
    metrics = collected(app)
    assert set(metrics) <= {*HEALTH, *(metric.name for metric in METRICS)}
    assert [point.value for point in metrics["celery_breaker_up"].data_points] == [1]
    states = {point.attributes["state"]: point.value for point in metrics["celery_breaker_state"].data_points}
    assert states == {state.value: state is State.OPEN for state in State}
    [refused] = metrics["celery_breaker_refused_total"].data_points
    assert (refused.value, dict(refused.attributes)) == (7, {"breaker": "payments"})


def test_totals_are_sums_that_only_grow_and_nothing_else_is(app: Celery) -> None:
    for name, data in collected(app).items():
        assert (isinstance(data, Sum) and data.is_monotonic) == name.endswith("_total")


def test_observing_needs_a_resilience() -> None:
    with pytest.raises(ConfigurationError, match="has no Resilience"):
        telemetry.observe(Celery("bare", set_as_current=False))


# --- traces -----------------------------------------------------------------------------------------


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What is traced during a test."""
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def span_id(traceparent: str) -> str:
    return traceparent.split("-")[2]


def only(spans: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in spans.get_finished_spans() if span.name == name]
    return span


def test_a_deferred_task_and_its_resumed_run_are_linked_in_the_trace_of_the_sender(spans: InMemorySpanExporter) -> None:
    tracer = trace.get_tracer("shop")
    with tracer.start_as_current_span("send") as sent:
        sender = tracing._traceparent(sent)
    first = tracing.tell_refusal("charge", {"traceparent": sender, "id": 3}, PAYMENTS, "it is OPEN")
    with tracer.start_as_current_span("run"):
        tracing.tell_run([MAIL], first)
    refused, run = only(spans, "defer/charge"), only(spans, "run")
    assert refused.context.trace_id == only(spans, "send").context.trace_id
    assert dict(refused.attributes or {}) == {"circuitbreaker.name": "payments", "circuitbreaker.state": "OPEN"}
    [deferred] = refused.events
    assert (deferred.name, dict(deferred.attributes or {})["circuitbreaker.reason"]) == ("task deferred", "it is OPEN")
    [link] = run.links
    assert (link.context.span_id, f"{link.context.span_id:016x}") == (refused.context.span_id, span_id(first))
    assert [event.name for event in run.events] == ["task resumed"]
    assert dict(run.attributes or {}) == {"circuitbreaker.name": "mail", "circuitbreaker.state": "CLOSED"}


def test_a_run_that_is_put_aside_is_told_so(spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("shop").start_as_current_span("run"):
        tracing.tell_run([PAYMENTS, MAIL], "")
        traceparent = tracing.tell_deferral("payments", "the task failed: ReadTimeout")
    run = only(spans, "run")
    assert dict(run.attributes or {}) == {
        "circuitbreaker.name": ("payments", "mail"),
        "circuitbreaker.state": ("OPEN", "CLOSED"),
    }
    assert [event.name for event in run.events] == ["task deferred"]
    assert span_id(traceparent) == f"{run.context.span_id:016x}"
    assert run.links == ()


def test_a_forged_way_back_leads_nowhere(spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("shop").start_as_current_span("run"):
        tracing.tell_run([MAIL], "00-forged")
    assert only(spans, "run").links == ()


def test_where_nobody_traces_nothing_is_told() -> None:
    tracing.tell_run([PAYMENTS], "")
    assert tracing.tell_deferral("payments", "it is OPEN") == ""
    assert tracing.tell_refusal("charge", {}, PAYMENTS, "it is OPEN") == ""


def test_without_opentelemetry_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_IS_INSTALLED", False)
    monkeypatch.delattr(tracing, "trace")
    tracing.tell_run([PAYMENTS], "")
    assert tracing.tell_deferral("payments", "it is OPEN") == ""
    assert tracing.tell_refusal("charge", {}, PAYMENTS, "it is OPEN") == ""
