"""What all health checks share: how they fail, how long they may take, how a probe runs one."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn

from resilient_tasks.errors import ConfigurationError

LONGEST_WITHOUT_PROBE = 10.0  # seconds that a check may take which the user calls by hand
HEARTBEATS = "heartbeat"
"""Kind of the values in the store that tell when somebody has last reported in for a breaker."""
LONGEST_SILENCE = 7 * 24 * 3600.0  # seconds for which a heartbeat is kept


class HealthCheckError(ConnectionError):
    """A health check has failed: the dependency is to blame, as for any other connection error.

    Args:
        message: names the check, its target and what was found; it holds no secrets.
        status_code: of an HTTP answer.
        headers: of an HTTP answer; a ``Retry-After`` among them sets the open time.
    """

    def __init__(self, message: str, status_code: int | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.headers = headers


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a probe, as the checks inside see it.

    Args:
        ends_at: on the monotonic clock.
        last_heartbeat: returns the seconds since somebody last reported in for the breaker; None: nobody has.
    """

    ends_at: float
    last_heartbeat: Callable[[], float | None]


_run: ContextVar[Run | None] = ContextVar("resilient_tasks_health_check", default=None)


def run_probe(function: Callable[[], Any], run: Run) -> None:
    """Run a health check as part of ``run``; it raises what the check raises."""
    token = _run.set(run)
    try:
        run_check(function)
    finally:
        _run.reset(token)


def run_check(function: Callable[[], Any]) -> None:
    """Run a health check to its end, also one that is a coroutine function; it raises what the check raises."""
    result = function()
    if inspect.isawaitable(result):

        async def wait() -> None:
            await result

        asyncio.run(wait())


def time_left() -> float:
    """Return the seconds that the check may still take, always more than none."""
    run = _run.get()
    return LONGEST_WITHOUT_PROBE if run is None else max(0.001, run.ends_at - time.monotonic())


def last_heartbeat() -> float | None:
    """Return the seconds since somebody last reported in for the breaker that is probed; None: nobody has.

    Raises:
        ConfigurationError: no breaker is being probed.
    """
    run = _run.get()
    if run is None:
        raise ConfigurationError("a heartbeat is known of a breaker only: give it to the breaker's probe()")
    return run.last_heartbeat()


class Check:
    """A health check of the library's own.

    Args:
        description: the call that made it, without secrets; it begins every message.
        look: finds out; raises if the dependency is not well.
    """

    def __init__(self, description: str, look: Callable[[], None]) -> None:
        self._description = description
        self._look = look

    def __repr__(self) -> str:
        return self._description

    def __call__(self) -> None:
        """Return if the dependency is well.

        Raises:
            HealthCheckError: it is not.
        """
        try:
            self._look()
        except HealthCheckError as error:
            raise HealthCheckError(f"{self}: {error}", error.status_code, error.headers) from error
        except TimeoutError as error:
            raise HealthCheckError(f"{self}: no answer in time") from error
        except OSError as error:
            raise HealthCheckError(f"{self}: {error.strerror or type(error).__name__}") from error


def refuse(check: str, argument: str, value: object, allowed: str) -> NoReturn:
    """Raise the ``ConfigurationError`` for an argument of a check."""
    raise ConfigurationError(f"{check}: {argument}={value!r}: allowed is {allowed}")


def is_text(value: object) -> bool:
    """Whether ``value`` is a string with something in it."""
    return isinstance(value, str) and bool(value.strip())


def is_seconds(value: Any, longest: float) -> bool:
    """Whether ``value`` is a positive number of seconds, up to ``longest``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= longest
