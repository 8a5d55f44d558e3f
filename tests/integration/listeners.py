"""What a user's project may add to the shop: signals, Sentry and OpenTelemetry. Tests look at what they receive.

``celery -A tests.integration.shop worker --include tests.integration.listeners``
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

import sentry_sdk
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from sentry_sdk.integrations.celery import CeleryIntegration
from sentry_sdk.integrations.logging import LoggingIntegration, ignore_logger
from sentry_sdk.transport import Transport

from resilient_tasks import signals
from tests.integration.shop import SIDE, app


class SideTransport(Transport):
    """Sends Sentry's events to the side channel."""

    def capture_envelope(self, envelope: Any) -> None:
        event = envelope.get_event()
        if event is not None:
            SIDE.rpush("sentry", json.dumps(event, default=str))


ignore_logger("celery.utils.dispatch.signal")  # which reports the receiver that is broken
sentry_sdk.init(
    dsn="http://key@localhost/1",
    transport=SideTransport,
    integrations=[CeleryIntegration(), LoggingIntegration()],  # what a task raises, and what is logged as an error
)


class SideHandler(logging.Handler):
    """Writes our log records to the side channel as JSON, as people do who have machines read them."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: getattr(record, name, None) for name in ("event", "breaker", "state", "task_id", "task")}
        SIDE.rpush("log", json.dumps({"level": record.levelname, "text": record.getMessage(), **fields}))


logging.getLogger("resilient_tasks").addHandler(SideHandler())


def record(signal: Any, sender: Any, breaker: str, **fields: Any) -> None:
    transition = fields.get("transition")
    about = transition.epoch if transition else fields["task_id"]
    SIDE.rpush("signals", json.dumps([signal.name, sender is app, breaker, about]))


class SideExporter(SpanExporter):
    """Sends spans to the side channel."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        SIDE.rpush("spans", *(span.to_json(indent=None) for span in spans))
        return SpanExportResult.SUCCESS


traces = TracerProvider()
traces.add_span_processor(SimpleSpanProcessor(SideExporter()))
trace.set_tracer_provider(traces)
CeleryInstrumentor().instrument()

for name in signals.__all__:
    getattr(signals, name).connect(record, sender=app)


@signals.task_deferred.connect
def broken(task: str, **_: Any) -> None:
    raise RuntimeError(f"a receiver does not like {task}")


@app.task
def mistaken() -> None:
    raise RuntimeError("a real mistake")
