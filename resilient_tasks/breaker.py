"""``Breaker``: the object that users work with. It guards calls, registers a probe, and has the operator commands."""

from __future__ import annotations

import functools
import getpass
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypedDict, TypeVar, overload

from resilient_tasks.checks import HEARTBEATS, LONGEST_SILENCE, Probe
from resilient_tasks.core.model import Snapshot, Verb
from resilient_tasks.dependency import Dependency
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.guard import Guard, call, decorated

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in typing

_P = ParamSpec("_P")
_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


class ProbeOptions(TypedDict, total=False):
    """The options of :meth:`Breaker.probe`, for type checkers."""

    timeout: float | None
    interval: float | None
    active: bool
    failures_before_open: int | None
    successes_before_close: int | None


class Breaker(Dependency):
    """The circuit breaker of one dependency, shared by all processes that use its name.

    ``Resilience.breaker()`` makes it. Use it as a decorator, by :meth:`guard` or by :meth:`call`.

    Attributes:
        name: of the breaker.
        policy: as this process declares it.
    """

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            ConfigurationError: always; it says what to do instead.
        """
        raise ConfigurationError(
            f"breaker {self.name!r} cannot be copied or pickled: its state is shared by its name; use the same object,"
            f" or pass the name and ask for it by resilience.breaker({self.name!r}) there"
        )

    def snapshot(self) -> Snapshot:
        """Read the breaker with its figures from the store."""
        fleet = self.fleet
        asked = fleet.view.asking()
        snapshot = fleet.store.read([self.spec])[0]
        fleet.view.update(snapshot, asked)
        return snapshot

    # --- guarded calls ----------------------------------------------------------------------------

    def guard(self) -> Guard:
        """Return a context manager for one guarded call, for ``with`` and ``async with``.

        Entering it raises :class:`BreakerOpenError` when the breaker refuses; the body does not run then. A time-out
        belongs inside, so that it ends the call as a failure: one around the guard only cancels it.
        """
        return Guard(self)

    def call(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``fn`` under guard and return what it returns.

        If that is awaitable, the call lasts until it has been awaited, or until the end of its ``async with`` block.

        Raises:
            BreakerOpenError: the breaker refuses; ``fn`` does not run. For a coroutine function, when it is awaited.
            ConfigurationError: ``fn`` is a generator function; its body would run outside the guard.
        """
        return call(self, fn, args, kwargs)  # type: ignore[no-any-return]  # a cast() is a call, too

    def __call__(self, fn: _F) -> _F:
        """Decorate a function or a coroutine function: each call of it is a guarded call.

        Raises:
            ConfigurationError: ``fn`` is no such function; the message says what to write instead.
        """
        return decorated(self, fn)

    # --- probe ------------------------------------------------------------------------------------

    @overload
    def probe(self, fn: _F, /, **options: Unpack[ProbeOptions]) -> _F: ...

    @overload
    def probe(self, /, **options: Unpack[ProbeOptions]) -> Callable[[_F], _F]: ...

    def probe(self, fn: Any = None, /, **options: Unpack[ProbeOptions]) -> Any:
        """Register the health check that replaces trials: ``@payments.probe``, ``@payments.probe(timeout=5)``.

        It succeeds if it returns in time, whatever ``slow_call_duration`` is, and fails if it raises any
        exception. ``resilient_tasks.checks`` has some to choose from: ``payments.probe(http_check(url), timeout=5)``.

        Args:
            fn: a function or coroutine function without arguments.
            options: ``timeout``: longest time in seconds that it may take; ``None``: 10, or the interval if that is
                shorter. ``interval``: seconds between two runs in the whole fleet; ``None``: in HALF_OPEN one run
                follows the other, and an active probe runs every 10 seconds. ``active=True``: run it also while CLOSED
                or SHADOW, and open the breaker before any task has to fail. ``failures_before_open``: failed runs in a
                row that open the breaker, with ``active=True``; ``None``: 3. ``successes_before_close``: successful
                runs in a row that close it, one failure opens it again; ``None``: as the policy says of trials.

        Raises:
            ConfigurationError: the breaker has another probe already, or a value is not allowed.
        """
        probe = Probe(breaker=self.name, function=fn or (lambda: None), **options)  # checks the options

        def register(fn: _F) -> _F:
            known = self.health_check
            if known is not None and known.function is not fn:
                what = f"has the probe {known.function!r} already; {fn!r} is one too many"
                raise ConfigurationError(f"breaker {self.name!r} {what}")
            self.health_check = replace(probe, function=fn)
            self.declare(replace(self.spec, in_a_row=probe.successes_before_close))
            return fn

        return register if fn is None else register(fn)

    def heartbeat(self) -> None:
        """Report that the dependency is well, for a ``heartbeat(ttl)`` probe.

        Raises:
            StoreError: the store is unavailable; the heartbeat is lost.
        """
        self.fleet.store.put(HEARTBEATS, self.name, b"", ttl=LONGEST_SILENCE)

    # --- operator commands ------------------------------------------------------------------------

    def trip(self, reason: str = "", *, actor: str | None = None) -> Snapshot:
        """Open the breaker as if it had tripped. Like all commands it raises ``StoreError`` without a store."""
        return self._command(Verb.TRIP, reason, actor)

    def isolate(self, reason: str = "", *, actor: str | None = None) -> Snapshot:
        """Refuse all calls, probes too, until :meth:`reset`."""
        return self._command(Verb.ISOLATE, reason, actor)

    def disable(self, reason: str = "", *, actor: str | None = None) -> Snapshot:
        """Admit all calls and count nothing, until :meth:`reset`."""
        return self._command(Verb.DISABLE, reason, actor)

    def shadow(self, reason: str = "", *, actor: str | None = None) -> Snapshot:
        """Admit all calls, count, and report when the breaker would have opened, until :meth:`reset`.

        ``snapshot().would_have_opened`` counts how often.
        """
        return self._command(Verb.SHADOW, reason, actor)

    def reset(self, reason: str = "", *, actor: str | None = None) -> Snapshot:
        """Close the breaker, without evidence."""
        return self._command(Verb.RESET, reason, actor)

    def _command(self, verb: Verb, reason: str, actor: str | None) -> Snapshot:
        return self.fleet.command(self.spec, verb, reason, this_user() if actor is None else actor)


@functools.lru_cache(maxsize=1)
def this_user() -> str:
    """Return who runs an operator command here, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
