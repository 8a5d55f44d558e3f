"""Each line below is a type error: mypy complains of an ignore that is not needed."""

from __future__ import annotations

from tests.typing.shop import payments, refund, resilience


def mistakes() -> None:
    resilience.breaker("x", failure_rate_treshold=0.5)  # type: ignore[call-arg]
    resilience.breaker("x", window="thirty")  # type: ignore[arg-type]
    resilience.breaker("x", concurrency="auto")  # type: ignore[arg-type]
    payments.call(len, 3)  # type: ignore[arg-type]
    payments.probe(timeot=5)  # type: ignore[call-overload]
    refund.delay("x")  # type: ignore[arg-type]
    refund.apply_async((1,), on_open="defer")  # type: ignore[arg-type]
