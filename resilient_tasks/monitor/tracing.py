"""OpenTelemetry traces, where opentelemetry-api is installed (extra ``otel``): spans know their breakers and deferrals.

A deferred message keeps its headers, so its resumed run is in the trace of its sender. Added here is a link from the
resumed run to the first run, or to the first refusal. A W3C ``traceparent`` in the message's header keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from resilient_tasks.core.model import State

with suppress(ImportError):  # without it the functions below do nothing
    from opentelemetry import propagate, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    _W3C = TraceContextTextMapPropagator()

NAME = "circuitbreaker.name"
STATE = "circuitbreaker.state"
REASON = "circuitbreaker.reason"
DEFERRED = "task deferred"
RESUMED = "task resumed"
NOWHERE = ""

_TRACEPARENT = "traceparent"
_IS_INSTALLED = "trace" in globals()


def record_run(states: Mapping[str, State], first: str) -> None:
    """Describe the current span as a run of a task that breakers guard, by name and cached state.

    Args:
        states: of the task's breakers.
        first: ``traceparent`` of what the task did before it was deferred; "" if it never was.
    """
    span = _current_span()
    if span is None:
        return
    span.set_attributes({NAME: _one_or_all(list(states)), STATE: _one_or_all([str(each) for each in states.values()])})
    if first:
        link = trace.get_current_span(_W3C.extract({_TRACEPARENT: first})).get_span_context()
        if link.is_valid:
            span.add_link(link)
        span.add_event(RESUMED)


def record_deferral(breaker: str, reason: str) -> str:
    """Add to the current span, a run's, that its task is deferred; return its ``traceparent``, "" without a span."""
    span = _current_span()
    if span is None:
        return NOWHERE
    span.add_event(DEFERRED, {NAME: breaker, REASON: reason})
    return _traceparent(span)


def record_refusal(task: str, headers: Mapping[str, Any], breaker: str, state: State, reason: str) -> str:
    """Make a span of a task that is deferred without a run, in the trace of its sender, which the headers name.

    Returns:
        The span's ``traceparent``; "" if it is not recorded.
    """
    if not _IS_INSTALLED:
        return NOWHERE
    parent = propagate.extract({name: value for name, value in headers.items() if isinstance(value, str)})
    span = trace.get_tracer("resilient_tasks").start_span(f"defer/{task}", parent, trace.SpanKind.CONSUMER)
    if not span.is_recording():
        return NOWHERE
    span.set_attributes({NAME: breaker, STATE: str(state)})
    span.add_event(DEFERRED, {NAME: breaker, REASON: reason})
    span.end()
    return _traceparent(span)


def _current_span() -> Any:
    """Return the span of this run; None if it is not traced."""
    if not _IS_INSTALLED:
        return None
    span = trace.get_current_span()
    return span if span.is_recording() else None


def _traceparent(span: Any) -> str:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(_TRACEPARENT, NOWHERE)


def _one_or_all(texts: Sequence[str]) -> str | Sequence[str]:
    return texts[0] if len(texts) == 1 else texts
