"""``Deployment``: the facts about a deployment that the doctor checks. No I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One Redis or Valkey server, store or broker, as it reports itself. None: unknown.

    Args:
        role: ``"store"`` or ``"broker"``.
        version: e.g. ``(7, 0, 15)``.
        product: ``"redis"`` or ``"valkey"``.
        policy: its ``maxmemory-policy``.
        maxmemory: bytes; 0: no limit.
        persistent: whether anything of it survives a restart.
    """

    role: str
    version: tuple[int, ...] = ()
    product: str = "redis"
    policy: str | None = None
    maxmemory: int | None = None
    persistent: bool | None = None

    @property
    def title(self) -> str:
        """What it is: ``Valkey 9.1.0``."""
        return f"{self.product.capitalize()} {'.'.join(map(str, self.version))}"

    @classmethod
    def of(cls, role: str, info: Mapping[str, Any], saves: object) -> ServerFacts:
        """Return what a server reports.

        Args:
            role: ``"store"`` or ``"broker"``.
            info: its answer to INFO.
            saves: its setting ``save``, when snapshots are written; None: unknown.
        """
        product = "valkey" if "valkey_version" in info else "redis"
        version = str(info.get(f"{product}_version", ""))
        appends = info.get("aof_enabled")
        return cls(
            role=role,
            version=tuple(int(part) for part in version.split(".") if part.isdigit()),
            product=product,
            policy=info.get("maxmemory_policy"),
            maxmemory=info.get("maxmemory"),
            persistent=True if appends else None if saves is None or appends is None else bool(saves),
        )


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    """One worker as it answers.

    Args:
        name: its host name.
        version: of its library; None: it has none, or an older one that does not answer.
        control_queue: the queue from which it takes ticks; None: it takes none.
        refused: the library's queues that the broker refuses, and why.
        clock_ahead: seconds by which its clock is ahead of the store's; None: it has not read the store.
        policies: by breaker, the rules that it declares.
        can_grow: its pool can add a slot while calls hang.
        tick_scope: distinguishes its ticks from those of workers that define other breakers.
    """

    name: str
    version: str | None = None
    control_queue: str | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    clock_ahead: float | None = None
    policies: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    can_grow: bool = True
    tick_scope: str = ""


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task that names a breaker, as this process defines it. Durations in seconds."""

    name: str
    breakers: tuple[str, ...]
    defers: bool
    acks_late: bool
    time_limit: float | None = None


@dataclass(frozen=True, slots=True)
class BreakerFacts:
    """One breaker as this process declares it, and what waits for it or its children. Durations in seconds."""

    name: str
    trial_timeout: float
    rules: Mapping[str, object]
    oldest_wait: float | None = None
    slow_call_duration: float | None = None


@dataclass(frozen=True, slots=True)
class Deployment:
    """Everything that the doctor checks. None: unknown.

    Args:
        version: of the library in this process.
        control_queue: on which this app's ticks travel.
        tasks: that name a breaker.
        mistakes: why workers do not start.
        doubts: what may be a mistake in the definition of tasks, why it matters, and what to do.
        breakers: of this app.
        keeps_results: it has a result backend.
        undecided: exceptions of the last hours that no rule knows, by breaker.
        result_expires: seconds for which results, and what is known of chords, are kept; 0: for ever.
        prefetch_multiplier: Celery's setting.
        store: the store's server.
        store_trouble: why the store does not answer.
        broker: the broker's server; None also for a broker that is no Redis.
        broker_trouble: why the broker does not answer.
        visibility_timeout: of a Redis broker, seconds; None: the broker has none.
        clock_ahead: seconds by which the clock of this process is ahead of the store's.
        tick_age: seconds since a tick of this app's breakers ran to its end; infinite if none ever did.
        tick_sender_age: seconds since beat, or what else sends ticks, was last seen alive; infinite if never.
        tick_interval: seconds between two ticks.
        orphans: tasks that wait for breakers that no process defines, by breaker.
        workers: that answer.
    """

    version: str
    control_queue: str
    tasks: tuple[TaskFacts, ...] = ()
    mistakes: tuple[str, ...] = ()
    doubts: tuple[tuple[str, str, str], ...] = ()
    breakers: tuple[BreakerFacts, ...] = ()
    keeps_results: bool = True
    undecided: Mapping[str, Sequence[str]] | None = None
    result_expires: float = 86400.0
    prefetch_multiplier: int = 4
    store: ServerFacts | None = None
    store_trouble: str = ""
    broker: ServerFacts | None = None
    broker_trouble: str = ""
    visibility_timeout: float | None = None
    clock_ahead: float | None = None
    tick_age: float | None = None
    tick_sender_age: float | None = None
    tick_interval: float = 1.0
    orphans: Mapping[str, int] | None = None
    workers: tuple[WorkerFacts, ...] | None = None

    @property
    def answering(self) -> tuple[WorkerFacts, ...] | None:
        """The workers that answer; None if there are none."""
        return self.workers or None

    @property
    def answering_broker(self) -> bool | None:
        """None if the broker does not answer."""
        return None if self.broker_trouble else True
