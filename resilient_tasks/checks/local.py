"""Checks that need no network: ``command_check``, which asks a program, and ``heartbeat``, which waits to be told."""

from __future__ import annotations

from collections.abc import Sequence

from resilient_tasks.checks.base import (
    LONGEST_SILENCE,
    Check,
    HealthCheckError,
    is_seconds,
    is_text,
    last_heartbeat,
    refuse,
    time_left,
)
from resilient_tasks.checks.programs import run_program


def command_check(argv: Sequence[str]) -> Check:
    """Run a program, without a shell; the dependency is well if it ends with exit code 0.

    Its output is thrown away. If it takes too long, it is killed with all that it has started. Arguments
    are never shown, since they may hold secrets.

    Args:
        argv: the program and its arguments, as a list.

    Raises:
        ConfigurationError: ``argv`` is no list of strings, or empty.
    """
    is_list = isinstance(argv, (list, tuple)) and all(isinstance(argument, str) for argument in argv)
    if not is_list or not argv or not is_text(argv[0]) or any("\0" in argument for argument in argv):
        shown = argv if isinstance(argv, str) else type(argv).__name__
        refuse("command_check", "argv", shown, "a list of strings, the program first; there is no shell")
    command = list(argv)

    def look() -> None:
        code, _ = run_program(command, time_left())
        if code != 0:
            raise HealthCheckError(f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}")

    return Check(f"command_check([{command[0]!r}{', ...' if command[1:] else ''}])", look)


def heartbeat(ttl: float) -> Check:
    """Wait to be told: the dependency is well if somebody called ``breaker.heartbeat()`` in the last ``ttl`` seconds.

    Silence is failure, also from the beginning, and after the store has lost its data.

    Args:
        ttl: longest silence in seconds, up to seven days.

    Raises:
        ConfigurationError: ``ttl`` is not allowed.
    """
    if not is_seconds(ttl, LONGEST_SILENCE):
        refuse("heartbeat", "ttl", ttl, f"a positive number of seconds up to {LONGEST_SILENCE:g}")

    def look() -> None:
        age = last_heartbeat()
        if age is None:
            raise HealthCheckError("nobody has reported in")
        if age > ttl:
            raise HealthCheckError(f"the last report is {age:.1f} s old")

    return Check(f"heartbeat(ttl={ttl:g})", look)
