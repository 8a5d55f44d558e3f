"""OpenTelemetry: what spans record."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from resilient_tasks.core.model import State
from resilient_tasks.monitor import tracing

PAYMENTS, MAIL = {"payments": State.OPEN}, {"mail": State.CLOSED}


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
    first = tracing.record_refusal("charge", {"traceparent": sender, "id": 3}, "payments", State.OPEN, "it is OPEN")
    with tracer.start_as_current_span("run"):
        tracing.record_run(lambda: MAIL, first)
    refused, run = only(spans, "defer/charge"), only(spans, "run")
    assert refused.context.trace_id == only(spans, "send").context.trace_id
    assert dict(refused.attributes or {}) == {"circuitbreaker.name": "payments", "circuitbreaker.state": "OPEN"}
    [deferred] = refused.events
    assert (deferred.name, dict(deferred.attributes or {})["circuitbreaker.reason"]) == ("task deferred", "it is OPEN")
    [link] = run.links
    assert (link.context.span_id, f"{link.context.span_id:016x}") == (refused.context.span_id, span_id(first))
    assert [event.name for event in run.events] == ["task resumed"]
    assert dict(run.attributes or {}) == {"circuitbreaker.name": "mail", "circuitbreaker.state": "CLOSED"}


def test_a_run_that_is_deferred_is_recorded_so(spans: InMemorySpanExporter) -> None:
    with trace.get_tracer("shop").start_as_current_span("run"):
        tracing.record_run(lambda: PAYMENTS | MAIL, "")
        traceparent = tracing.record_deferral("payments", "the task failed: ReadTimeout")
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
        tracing.record_run(lambda: MAIL, "00-forged")
    assert only(spans, "run").links == ()


def test_without_a_tracer_nothing_is_recorded() -> None:
    tracing.record_run(lambda: PAYMENTS, "")
    assert tracing.record_deferral("payments", "it is OPEN") == ""
    assert tracing.record_refusal("charge", {}, "payments", State.OPEN, "it is OPEN") == ""


def test_without_opentelemetry_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_IS_INSTALLED", False)
    monkeypatch.delattr(tracing, "trace")
    tracing.record_run(lambda: PAYMENTS, "")
    assert tracing.record_deferral("payments", "it is OPEN") == ""
    assert tracing.record_refusal("charge", {}, "payments", State.OPEN, "it is OPEN") == ""
