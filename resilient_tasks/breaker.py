"""``Breaker``: the object that users work with. It guards calls, registers a probe, and has the operator commands."""

from __future__ import annotations

import functools
import getpass
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from resilient_tasks.checks import HEARTBEATS, LONGEST_SILENCE
from resilient_tasks.core.model import Snapshot, State, Verb
from resilient_tasks.core.names import check_name, child_name
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.guard import Guarded
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.probing import Probe
from resilient_tasks.store.base import Spec
from resilient_tasks.store.standing import Standing

if TYPE_CHECKING:
    from resilient_tasks.fleet import Fleet

#: Seconds for which a process goes by its cached state of a CLOSED child, which nothing refreshes.
REMEMBERED_FOR = 60.0
#: Seconds between two searches for children that are no longer used; made when a new one is used.
SWEEP_INTERVAL = 60.0
#: Seconds for which a parent without room for more children is not asked again.
FULL_FOR = 10.0

_F = TypeVar("_F", bound=Callable[..., Any])


class Breaker(Guarded):
    """The circuit breaker of one dependency, shared by all processes that use its name.

    ``Resilience.breaker()`` makes it. Use it as a decorator, by :meth:`guard` or by :meth:`call`.

    Args:
        name: letters, digits, ``_``, ``.`` and ``-``; it becomes part of keys and queue names.
        policy: when it opens, for how long, and how it heals.
        fleet: returns this process's ``Fleet``; called on first use.
        revision: orders declarations of one name across a rolling deploy; the highest one counts.

    Attributes:
        registered_probe: what :meth:`probe` registered; None if nothing.

    Raises:
        ConfigurationError: the name is not allowed.
    """

    def __init__(
        self, name: str, policy: BreakerPolicy | None = None, *, fleet: Callable[[], Fleet], revision: int = 0
    ) -> None:
        super().__init__(Spec(check_name("breaker", name), policy or BreakerPolicy(), revision), fleet)
        self.registered_probe: Probe | None = None
        self._children: dict[str, Child] = {}  # without a lock: each step leaves it right, and forks inherit it
        self._full_until = self._swept_at = float("-inf")

    @property
    def probe_to_run(self) -> Probe | None:
        """The registered probe, unless it is one of the children alone: a function that takes their key."""
        probe = self.registered_probe
        return None if probe is None or probe.takes_key else probe

    @property
    def guards(self) -> tuple[Breaker, ...]:
        """The breakers that a call must pass: a child's parent, and the breaker itself."""
        return (self,)

    def child(self, key: object) -> Breaker:
        """Return the breaker of one tenant, host or credential, with a state of its own under this one's policy.

        A call that it guards must be admitted by both, and counts for the child. If there are ``max_keys`` children
        already, none of which is idle, this is the breaker itself.

        Args:
            key: text or an integer.

        Raises:
            ConfigurationError: the key is neither, empty, or longer than 99 characters as percent-encoded UTF-8.
        """
        name = child_name(self.name, key)
        known = self._children.get(name)
        if known is not None:
            return known
        fleet = self.fleet
        if fleet.view.clock() < self._full_until:
            return self
        if not fleet.store.enroll(Child(self, name).spec):
            self._full_until = fleet.view.clock() + FULL_FOR
            return self
        return self.child_named(name)

    def child_named(self, name: str) -> Breaker:
        """Return the child of a name that a process of the fleet has used."""
        known = self._children.get(name)
        if known is None:
            now = self.fleet.view.clock()
            if now >= self._swept_at + SWEEP_INTERVAL:
                self._swept_at = now
                self._forget_idle_children()
            known = self._children.setdefault(name, Child(self, name))
        return known

    def _forget_idle_children(self) -> None:
        for name, child in list(self._children.items()):
            if child.is_idle:
                del self._children[name]
                self.fleet.view.forget(name)
                child.detach()

    def detach(self) -> None:
        """Forget the fleet and all children; the next use finds them anew."""
        super().detach()
        self._children = {}

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
    def accepting(self) -> bool:
        """Whether a task sent now may run, by the cached state, without I/O.

        False while the breaker refuses everything; True again as soon as the next task may be a trial, which with a
        probe the workers decide.
        """
        standing = self.standing
        probes = self.probe_to_run is not None and not self.fleet.store.away
        return standing.admits or not (standing.refuses or probes)

    def snapshot(self) -> Snapshot:
        """Read the breaker with its figures from the store."""
        fleet = self.fleet
        asked = fleet.view.asking()
        snapshot = fleet.store.read([self.spec])[0]
        fleet.view.update(snapshot, asked)
        return snapshot

    # --- probe ------------------------------------------------------------------------------------

    @overload
    def probe(
        self,
        fn: _F,
        /,
        *,
        timeout: float | None = None,
        interval: float | None = None,
        active: bool = False,
        failures_before_open: int | None = None,
        successes_before_close: int | None = None,
    ) -> _F: ...

    @overload
    def probe(
        self,
        /,
        *,
        timeout: float | None = None,
        interval: float | None = None,
        active: bool = False,
        failures_before_open: int | None = None,
        successes_before_close: int | None = None,
    ) -> Callable[[_F], _F]: ...

    def probe(
        self,
        fn: Any = None,
        /,
        *,
        timeout: float | None = None,
        interval: float | None = None,
        active: bool = False,
        failures_before_open: int | None = None,
        successes_before_close: int | None = None,
    ) -> Any:
        """Register the health check that replaces trials: ``@payments.probe``, ``@payments.probe(timeout=5)``.

        It succeeds if it returns in time, whatever ``slow_call_duration`` is, and fails if it raises any
        exception. ``resilient_tasks.checks`` has some to choose from: ``payments.probe(http_check(url), timeout=5)``.

        Args:
            fn: a function or coroutine function without arguments.
            timeout: longest time in seconds that it may take; ``None``: 10, or the interval if that is shorter.
            interval: seconds between two runs in the whole fleet; ``None``: in HALF_OPEN one run follows the
                other, and an active probe runs every 10 seconds.
            active: run it also while CLOSED or SHADOW, and open the breaker before any task has to fail.
            failures_before_open: failed runs in a row that open the breaker, with ``active=True``;
                ``None``: 3.
            successes_before_close: successful runs in a row that close it; one failure opens it again.
                ``None``: as the policy says of trials.

        Raises:
            ConfigurationError: the breaker has another probe already, or a value is not allowed.
        """
        probe = Probe(
            breaker=self.name,
            function=_nothing if fn is None else fn,
            timeout=timeout,
            interval=interval,
            active=active,
            failures_before_open=failures_before_open,
            successes_before_close=successes_before_close,
        )
        return partial(self._register_probe, probe) if fn is None else self._register_probe(probe, fn)

    def _register_probe(self, probe: Probe, fn: _F) -> _F:
        known = self.registered_probe
        if known is not None and known.function is not fn:
            taken = f"breaker {self.name!r} has the probe {known.function!r} already"
            raise ConfigurationError(f"{taken}; {fn!r} is one too many")
        self.registered_probe = replace(probe, function=fn)
        self.spec = replace(self.spec, in_a_row=probe.successes_before_close)
        if self._joined is not None:
            self._joined.declare(self.spec)
        return fn

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


class Child(Breaker):
    """The breaker of one key. What it admits must be admitted by its parent, too, and counts for the child alone.

    Args:
        parent: whose child; its policy holds.
        name: the parent's name, a colon and the key, percent-encoded.
    """

    def __init__(self, parent: Breaker, name: str) -> None:
        Guarded.__init__(self, replace(parent.spec, name=name), parent._find_fleet)  # noqa: SLF001 - a breaker too
        self.parent = parent
        self._examines = True  # every call is examined: the parent must admit it, too

    @property
    def registered_probe(self) -> Probe | None:  # type: ignore[override]  # the parent registers it
        """The parent's probe for this key, if it is a function that takes one."""
        probe = self.parent.registered_probe
        return probe.of_child(self.name) if probe is not None and probe.takes_key else None

    @property
    def probe_to_run(self) -> Probe | None:
        """The registered probe: it is made for this child."""
        return self.registered_probe

    @property
    def guards(self) -> tuple[Breaker, ...]:
        """The breakers that a call must pass: the parent, and the child itself."""
        return (self.parent, self)

    def child(self, key: object) -> Breaker:
        """Refuse: a child has no children of its own.

        Raises:
            ConfigurationError: always.
        """
        raise ConfigurationError(
            f"breaker {self.name!r} is a child: allowed is a child of {self.parent.name!r}, not {key!r}"
        )

    def detach(self) -> None:
        """Forget the fleet; the next use finds it anew."""
        Guarded.detach(self)

    @property
    def standing(self) -> Standing:
        """The cached state; read anew from time to time, because changes of a CLOSED child are not followed."""
        standing = super().standing
        if (standing.age or 0.0) > REMEMBERED_FOR:
            self.fleet.view.look(self.spec)
        return standing

    @property
    def is_idle(self) -> bool:
        """Whether it was not used here for a while, and is known as nothing but CLOSED."""
        standing = self._standing
        is_plain = standing.snapshot.state is State.CLOSED and not standing.pending
        return self._joined is None or (is_plain and (standing.age or 0.0) > REMEMBERED_FOR)

    def _is_current(self) -> bool:
        return super()._is_current() and (self._standing.age or 0.0) <= REMEMBERED_FOR


def _nothing() -> None:
    """Stand for the function that a decorator has not been given yet."""


@functools.lru_cache(maxsize=1)
def this_user() -> str:
    """Return who runs an operator command here, as ``user@host``."""
    try:
        user = getpass.getuser()
    except (KeyError, ImportError, OSError):  # a container's user may have no name
        user = "unknown"
    return f"{user}@{socket.gethostname()}"
