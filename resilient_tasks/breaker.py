"""``Breaker``: the object that users work with. It guards calls, registers a probe, and has the operator commands."""

from __future__ import annotations

import functools
import getpass
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypedDict, TypeVar, overload
from weakref import WeakValueDictionary

from resilient_tasks.checks import HEARTBEATS, LONGEST_SILENCE, Probe
from resilient_tasks.core.model import Snapshot, State, Verb, check_name
from resilient_tasks.dependency import Dependency
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.guard import Guard, call, decorated
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Spec

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in typing

    from resilient_tasks.dependency import Fleet

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


class Breaker:
    """The circuit breaker of one dependency, shared by all processes that use its name.

    ``Resilience.breaker()`` makes it. Use it as a decorator, by :meth:`guard` or by :meth:`call`.

    Args:
        name: letters, digits, ``_``, ``.`` and ``-``; it becomes part of keys and queue names.
        policy: when it opens, for how long, and how it heals.
        fleet: returns this process's ``Fleet``; called on first use.
        revision: orders declarations of one name across a rolling deploy; the highest one counts.

    Raises:
        ConfigurationError: the name is not allowed.
    """

    def __init__(
        self, name: str, policy: BreakerPolicy | None = None, *, fleet: Callable[[], Fleet], revision: int = 0
    ) -> None:
        self._dependency = Dependency(Spec(check_name("breaker", name), policy or BreakerPolicy(), revision), fleet)
        _breakers[self._dependency] = self

    def __repr__(self) -> str:
        return f"<Breaker {self.name!r}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse to be copied or pickled.

        Raises:
            ConfigurationError: always; it says what to do instead.
        """
        raise ConfigurationError(
            f"breaker {self.name!r} cannot be copied or pickled: its state is shared by its name; use the same object,"
            f" or pass the name and ask for it by resilience.breaker({self.name!r}) there"
        )

    @property
    def name(self) -> str:
        """Name of the breaker."""
        return self._dependency.name

    @property
    def policy(self) -> BreakerPolicy:
        """The policy as this process declares it."""
        return self._dependency.policy

    @property
    def state(self) -> State:
        """State of the breaker as this process sees it."""
        return self._dependency.state

    @property
    def accepting(self) -> bool:
        """Whether a task sent now may run, by the cached state, without I/O.

        False while the breaker refuses everything; True again as soon as the next task may be a trial, which with a
        probe the workers decide.
        """
        return self._dependency.accepting

    def snapshot(self) -> Snapshot:
        """Read the breaker with its figures from the store."""
        fleet = self._dependency.fleet
        asked = fleet.view.asking()
        snapshot = fleet.store.read([self._dependency.spec])[0]
        fleet.view.update(snapshot, asked)
        return snapshot

    def child(self, key: object) -> Breaker:
        """Return the breaker of one tenant, host or credential, with a state of its own under this one's policy.

        A call that it guards must be admitted by both, and counts for the child. If there are ``max_keys`` children
        already, none of which is idle, this is the breaker itself.

        Args:
            key: text or an integer.

        Raises:
            ConfigurationError: the key is neither, empty, or longer than 99 characters as percent-encoded UTF-8.
        """
        child = self._dependency.child(key)
        return self if child is self._dependency else breaker_of(child)

    # --- guarded calls ----------------------------------------------------------------------------

    def guard(self) -> Guard:
        """Return a context manager for one guarded call, for ``with`` and ``async with``.

        Entering it raises :class:`BreakerOpenError` when the breaker refuses; the body does not run then. A time-out
        belongs inside, so that it ends the call as a failure: one around the guard only cancels it.
        """
        return Guard(self._dependency)

    def call(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """Call ``fn`` under guard and return what it returns.

        If that is awaitable, the call lasts until it has been awaited, or until the end of its ``async with`` block.

        Raises:
            BreakerOpenError: the breaker refuses; ``fn`` does not run. For a coroutine function, when it is awaited.
            ConfigurationError: ``fn`` is a generator function; its body would run outside the guard.
        """
        return call(self._dependency, fn, args, kwargs)  # type: ignore[no-any-return]  # a cast() is a call, too

    def __call__(self, fn: _F) -> _F:
        """Decorate a function or a coroutine function: each call of it is a guarded call.

        Raises:
            ConfigurationError: ``fn`` is no such function; the message says what to write instead.
        """
        return decorated(self._dependency, fn)

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
        dependency = self._dependency
        probe = Probe(breaker=self.name, function=fn or (lambda: None), **options)  # checks the options

        def register(fn: _F) -> _F:
            known = dependency.probe
            if known is not None and known.function is not fn:
                what = f"has the probe {known.function!r} already; {fn!r} is one too many"
                raise ConfigurationError(f"breaker {self.name!r} {what}")
            dependency.probe = replace(probe, function=fn)
            dependency.declare(replace(dependency.spec, in_a_row=probe.successes_before_close))
            return fn

        return register if fn is None else register(fn)

    def heartbeat(self) -> None:
        """Report that the dependency is well, for a ``heartbeat(ttl)`` probe.

        Raises:
            StoreError: the store is unavailable; the heartbeat is lost.
        """
        self._dependency.fleet.store.put(HEARTBEATS, self.name, b"", ttl=LONGEST_SILENCE)

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
        dependency = self._dependency
        return dependency.fleet.command(dependency.spec, verb, reason, this_user() if actor is None else actor)


_breakers: WeakValueDictionary[Dependency, Breaker] = WeakValueDictionary()


def breaker_of(dependency: Dependency) -> Breaker:
    """Return the breaker that users see of a dependency: the same one each time."""
    breaker = _breakers.get(dependency)
    if breaker is None:
        breaker = _breakers[dependency] = Breaker.__new__(Breaker)
        breaker._dependency = dependency  # noqa: SLF001 - as __init__ does
    return breaker


@functools.lru_cache(maxsize=1)
def this_user() -> str:
    """Return who runs an operator command here, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
