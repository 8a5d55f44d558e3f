"""OpenTelemetry traces, where opentelemetry-api is installed (extra ``otel``): spans know their breakers and deferrals.

A deferred message keeps its headers, so its resumed run is in the trace of its sender. Added here is a link from the
resumed run to the first run, or to the first refusal. A W3C ``traceparent`` in the message's header keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from resilient_tasks.core.model import State

with suppress(ImportError):  # without it the functions below do nothing
    from opentelemetry import propagate, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    _W3C = TraceContextTextMapPropagator()

_NAME, _STATE, _REASON = "circuitbreaker.name", "circuitbreaker.state", "circuitbreaker.reason"
_TRACEPARENT = "traceparent"
_IS_INSTALLED = "trace" in globals()


def record_run(cached: Callable[[], Mapping[str, State]], first: str) -> None:
    """Describe the current span as a run of a task that breakers guard, by name and ``cached`` state.

    ``first`` is the ``traceparent`` of what the task did before it was deferred; "" if it never was.
    """
    span = _current_span()
    if span is None:
        return
    states = cached()
    names, texts = list(states), list(map(str, states.values()))
    one = len(states) == 1
    span.set_attributes({_NAME: names[0] if one else names, _STATE: texts[0] if one else texts})
    if first:
        link = trace.get_current_span(_W3C.extract({_TRACEPARENT: first})).get_span_context()
        if link.is_valid:
            span.add_link(link)
        span.add_event("task resumed")


def record_deferral(breaker: str, reason: str) -> str:
    """Add to the current span, a run's, that its task is deferred; return its ``traceparent``, "" without a span."""
    return _deferred(_current_span(), breaker, reason)


def record_refusal(task: str, headers: Mapping[str, Any], breaker: str, state: State, reason: str) -> str:
    """Make a span of a task that is deferred without a run, in the trace of its sender, which the headers name.

    Return the span's ``traceparent``; "" if it is not recorded.
    """
    if not _IS_INSTALLED:
        return ""
    parent = propagate.extract({name: value for name, value in headers.items() if isinstance(value, str)})
    span = trace.get_tracer("resilient_tasks").start_span(f"defer/{task}", parent, trace.SpanKind.CONSUMER)
    if not span.is_recording():
        return ""
    span.set_attributes({_NAME: breaker, _STATE: str(state)})
    traceparent = _deferred(span, breaker, reason)
    span.end()
    return traceparent


def _current_span() -> Any:
    """Return the span of this run; None if it is not traced."""
    span = trace.get_current_span() if _IS_INSTALLED else None
    return span if span is not None and span.is_recording() else None


def _deferred(span: Any, breaker: str, reason: str) -> str:
    if span is None:
        return ""
    span.add_event("task deferred", {_NAME: breaker, _REASON: reason})
    return _traceparent(span)


def _traceparent(span: Any) -> str:
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, trace.set_span_in_context(span))
    return carrier.get(_TRACEPARENT, "")
