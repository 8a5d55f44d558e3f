"""Every error crosses process boundaries: pickled by the pool, as JSON by the result backend."""

from __future__ import annotations

import pickle

import pytest
from celery import Celery
from celery.backends.base import Backend

from resilient_tasks import errors
from resilient_tasks.errors import (
    BreakerOpenError,
    ConfigurationError,
    DeadLetterError,
    DeferralExpiredError,
    DeferredQueueFullError,
    ResilienceError,
    StoreError,
    UnknownBreakerError,
)

ERRORS = [
    (ResilienceError("odd"), "odd"),
    (ConfigurationError("window=0: allowed is ..."), "window=0: allowed is ..."),
    (UnknownBreakerError("breaker 'x' is defined nowhere"), "breaker 'x' is defined nowhere"),
    (StoreError("redis://store is unavailable"), "redis://store is unavailable"),
    (DeadLetterError("no dead letter has the id 'x'"), "no dead letter has the id 'x'"),
    (DeadLetterError("no dead letter has the id 'x'", {"mail": 2}), "no dead letter has the id 'x'"),
    (BreakerOpenError("payments", "OPEN", 2.5), "breaker 'payments' is OPEN, retry after 2.5 s"),
    (BreakerOpenError("payments", "FORCED_OPEN"), "breaker 'payments' is FORCED_OPEN"),
    (DeferralExpiredError("mail", 61.0, 60.0), "waited 61.0 s for breaker 'mail', longer than defer_for=60 s"),
    (DeferredQueueFullError("mail", 500), "the deferred queue of breaker 'mail' is full (max_deferred=500)"),
    (
        DeferredQueueFullError("mail", memory_limit=800),
        "no room to defer for breaker 'mail': memory is at its limit of 800 bytes",
    ),
]


@pytest.fixture(scope="module")
def backend() -> Backend:
    app = Celery("errors", set_as_current=False)
    return Backend(app, serializer="json")


def assert_same(restored: BaseException, error: ResilienceError, text: str) -> None:
    assert type(restored) is type(error)
    assert restored.args == error.args
    assert vars(restored) == vars(error)
    assert str(restored) == text


@pytest.mark.parametrize(("error", "text"), ERRORS)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickle(error: ResilienceError, text: str, protocol: int) -> None:
    assert_same(pickle.loads(pickle.dumps(error, protocol)), error, text)


@pytest.mark.parametrize(("error", "text"), ERRORS)
def test_errors_survive_a_json_result_backend(backend: Backend, error: ResilienceError, text: str) -> None:
    stored = backend.encode(backend.prepare_exception(error))
    assert_same(backend.exception_to_python(backend.decode(stored)), error, text)


def test_no_error_is_forgotten_here() -> None:
    defined = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)}
    assert defined == {type(error) for error, _ in ERRORS}


def test_one_root() -> None:
    assert all(isinstance(error, ResilienceError) for error, _ in ERRORS)
    assert issubclass(ConfigurationError, ValueError)
