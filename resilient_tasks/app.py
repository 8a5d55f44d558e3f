"""``Resilience``: the composition root. It imports all layers; no layer below imports it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from celery import Celery, Task
from celery.signals import beat_init

from resilient_tasks.breaker import Breaker, breaker_of
from resilient_tasks.core.model import Transition, check_name, did_you_mean
from resilient_tasks.core.outage import Estimate, Outage
from resilient_tasks.dependency import Dependency, Fleet
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.fallback import Provenance, read_provenance
from resilient_tasks.monitor import events
from resilient_tasks.operations.waiting import DeadLetters, Deferred
from resilient_tasks.policy import BreakerPolicy, PolicyFields
from resilient_tasks.settings import Settings, SettingsFields
from resilient_tasks.signals import notify_of_transition
from resilient_tasks.store.address import find_store
from resilient_tasks.store.background import BackgroundQueue
from resilient_tasks.store.base import Store
from resilient_tasks.store.redis import RedisStore
from resilient_tasks.worker import beat
from resilient_tasks.worker.bootsteps import ControlQueue, Membership
from resilient_tasks.worker.context import TICK_TASK, Runtime, find_breaker, find_runtime, runtime_of
from resilient_tasks.worker.definitions import check_sent
from resilient_tasks.worker.queues import own_queue
from resilient_tasks.worker.task import ProducersGate, resilient

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.11 has it in typing

logger = logging.getLogger("resilient_tasks")


class Resilience:
    """Shared circuit breakers for one Celery app.

    Args:
        app: the Celery app; or call :meth:`init_app` later. Without any app breakers still guard calls,
            if ``RESILIENT_TASKS_STORE_URL`` says where the store is.
        settings: fields of :class:`~resilient_tasks.settings.Settings` that override the environment,
            e.g. ``namespace="shop"``.

    Raises:
        ConfigurationError: a setting is unknown or out of range.
    """

    def __init__(self, app: Celery[Any] | None = None, **settings: Unpack[SettingsFields]) -> None:
        self.settings = Settings.load(**settings)
        self._background = BackgroundQueue("events")
        self._app: Celery | None = None
        self._breakers: dict[str, Breaker] = {}
        self._dependencies: dict[str, Dependency] = {}
        self._revision = time.time_ns() // 1_000_000
        self._fleet: Fleet | None = None
        self._connecting = threading.Lock()
        if app is not None:
            self.init_app(app)

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """All breakers by name."""
        return MappingProxyType(self._breakers)

    def init_app(self, app: Celery[Any]) -> None:
        """Make the tasks of ``app`` resilient and its workers members of the fleet."""
        self._app = app
        runtime = Runtime(app, self._dependencies, self.settings, lambda: self.fleet)
        runtime.producers_gate = ProducersGate(runtime)
        _make_tasks_resilient(app)
        app.steps["worker"].add(Membership)
        app.steps["consumer"].add(ControlQueue)
        _register_tick(runtime)

        def add_tick_entry(**_: Any) -> None:
            if app.configured:
                beat.add_tick_entry(runtime)

        for signal in (app.on_after_configure, app.on_after_finalize):
            signal.connect(add_tick_entry, weak=False)

    def breaker(self, name: str, policy: BreakerPolicy | None = None, **fields: Unpack[PolicyFields]) -> Breaker:
        """Define the breaker of one dependency.

        Args:
            name: letters, digits, ``_``, ``-`` and ``.``; it becomes part of keys and queue names.
            policy: its policy, or give the policy's fields by name; ``description`` and ``runbook`` also beside one.
            fields: fields of :class:`~resilient_tasks.policy.BreakerPolicy`.

        Returns:
            The breaker; the same one when it is asked for by name alone, or defined twice in the same way.

        Raises:
            ConfigurationError: name, field or value is not allowed, or the name is defined otherwise already.
        """
        check_name("breaker", name)
        if policy is None and not fields and name in self._breakers:
            return self._breakers[name]
        final = self.settings.policy_for(name, _policy_in_code(name, policy, dict(fields)))
        new = Breaker(name, final, fleet=lambda: self.fleet, revision=self._revision)
        known = self._breakers.setdefault(name, new)
        if known.policy != new.policy:
            differences = ", ".join(
                f"{field}={one!r} and {field}={other!r}" for field, one, other in known.policy.differences(new.policy)
            )
            raise ConfigurationError(f"breaker {name!r} is defined twice with different policies: {differences}")
        if known is new:
            dependency = self._dependencies[name] = new._dependency  # noqa: SLF001 - the breaker's own part
            if self._fleet is not None:
                self._fleet.view.declare(dependency.spec)
        return known

    def __getitem__(self, name: str) -> Breaker:
        """Look up a breaker that is defined elsewhere, or a child of one: ``resilience["payments"]``; defines nothing.

        Raises:
            UnknownBreakerError: a ``ConfigurationError`` and a ``KeyError``; no breaker of this name is defined.
        """
        return breaker_of(find_breaker(self._dependencies, name))

    @property
    def fleet(self) -> Fleet:
        """This process's membership in the fleet; connects on first use."""
        if self._fleet is None:
            with self._connecting:
                if self._fleet is None:
                    self._fleet = self._join(self._shared_store())
        return self._fleet

    def use_store(self, store: Store) -> None:
        """Use another store from now on, e.g. one in memory for tests."""
        with self._connecting:
            former, self._fleet = self._fleet, self._join(store)
        self._detach()
        if former is not None:
            former.close()

    def _detach(self) -> None:
        for dependency in self._dependencies.values():
            dependency.detach()

    def provenance(self, task_id: str) -> Provenance | None:
        """Return where the result of a task came from; None if no fallback served it.

        Raises:
            StoreError: the store is unavailable.
        """
        return read_provenance(self.fleet.store, task_id)

    def outages(self, name: str | None = None, *, since: float | None = None) -> list[Outage]:
        """Return the stored outages, those under way included, the newest first.

        Args:
            name: of this breaker and its children; ``None``: of all breakers.
            since: only those that were not over this many seconds ago.

        Raises:
            ConfigurationError: that breaker is not defined, or ``since`` is no span of time.
            StoreError: the store is unavailable, or keeps no history.
        """
        if since is not None and (isinstance(since, bool) or not isinstance(since, (int, float)) or not since >= 0):
            raise ConfigurationError(f"since={since!r}: allowed is a number of seconds, 0 or more, or None")
        names = self._breakers if name is None else [self[name].name]
        fleet = self.fleet
        earliest = 0.0 if since is None else fleet.view.server_now() - since
        return fleet.history.outages(fleet.with_children(names), since=earliest)

    def estimate(self, name: str) -> Estimate | None:
        """Estimate when the tasks that wait for a breaker will be done; None if none waits.

        Raises:
            ConfigurationError: that breaker is not defined.
            StoreError: the store is unavailable, or keeps no history.
        """
        snapshots = self.fleet.store.read_shared([find_breaker(self._dependencies, name).spec])
        return self.fleet.history.estimates(snapshots).get(name)

    @property
    def dead_letters(self) -> DeadLetters:
        """The tasks that have failed for good or expired while they waited for a breaker: list, replay or drop them.

        Raises:
            ConfigurationError: there is no app, and so no broker.
        """
        return DeadLetters(self._runtime("dead letters"))

    @property
    def deferred(self) -> Deferred:
        """The tasks that wait for a breaker: list, resume or drop them by hand.

        Raises:
            ConfigurationError: there is no app, and so no broker.
        """
        return Deferred(self._runtime("deferred tasks"))

    def _runtime(self, wanted: str) -> Runtime:
        if self._app is None:
            raise ConfigurationError(f"{wanted} are on the app's broker: call init_app(app) first")
        return runtime_of(self._app)

    def _join(self, store: Store) -> Fleet:
        shared = (store.ledger, store.history) if isinstance(store, RedisStore) else ()
        fleet = Fleet(store, *shared, announce=self._announce, task_id=self._running_task)
        for dependency in self._dependencies.values():
            fleet.view.declare(dependency.spec)
        return fleet

    def _running_task(self) -> str | None:
        task = self._app.current_worker_task if self._app else None
        return task and task.request.id

    def _shared_store(self) -> Store:
        url, options = find_store(self.settings.store_url, self._app.conf if self._app else None)
        return RedisStore(url, namespace=self.settings.namespace, timeout=self.settings.store_timeout, **options)

    def _announce(self, transition: Transition) -> None:
        """Log a transition, call the receivers of its signal and send its Celery event; wait for no broker."""
        transition, app = events.log(transition), self._app
        notify_of_transition(app, transition)
        if app is not None:

            def send() -> None:
                with app.events.default_dispatcher() as dispatcher:
                    dispatcher.send(events.event_type(transition), **events.event_fields(transition))

            self._background.submit(send)


def _make_tasks_resilient(app: Celery) -> None:
    """Derive our class from the app's own whenever Celery makes it: ``task_cls`` may be set later.

    The options that any task is sent with are checked, those of other classes than ours included.
    """
    create, send = app.create_task_cls, app.send_task
    app.create_task_cls = lambda: resilient(create())
    if "Task" in app.__dict__:  # made already, or set by the user
        app.Task = resilient(app.Task)

    @wraps(send)
    def send_task(name: str, *args: Any, **options: Any) -> Any:
        check_sent(options.get("task_type"), name, app, options)
        return send(name, *args, **options)

    app.send_task = send_task


def _policy_in_code(name: str, policy: BreakerPolicy | None, fields: dict[str, Any]) -> BreakerPolicy:
    if policy is not None and not isinstance(policy, BreakerPolicy):
        raise ConfigurationError(f"breaker {name!r}: policy={policy!r}: allowed is a BreakerPolicy")
    if policy is not None and fields.keys() - {"description", "runbook"}:
        given = ", ".join(sorted(fields))
        raise ConfigurationError(f"breaker {name!r}: give a policy or its fields ({given}), not both")
    known = BreakerPolicy.__dataclass_fields__.keys()
    unknown = sorted(fields.keys() - known)
    if unknown:
        what = f"unknown policy field {', '.join(unknown)}; allowed are {', '.join(known)}"
        raise ConfigurationError(f"breaker {name!r}: {what}{did_you_mean(unknown[0], known)}")
    try:
        return replace(policy or BreakerPolicy(), **fields) if fields else policy or BreakerPolicy()
    except ConfigurationError as exc:
        raise ConfigurationError(f"breaker {name!r}: {exc}") from None


class _TickTask(Task):  # type: ignore[misc]  # Celery is untyped
    """Goes straight to the control queue, past the app's routes and defaults; only workers declare that queue."""

    abstract = True
    control_queue: Any = None

    def apply_async(self, *args: Any, **options: Any) -> Any:
        direct = {"queue": self.control_queue, "exchange": "", "routing_key": "", "declare": []}
        return super().apply_async(*args, **{**options, **direct})


def _register_tick(runtime: Runtime) -> None:
    """Register the periodic task; it runs in the main process, the body is for calls by hand."""
    options = {"base": _TickTask, "shared": False, "ignore_result": True}

    @runtime.app.task(name=TICK_TASK, control_queue=own_queue(runtime.control_queue), **options)  # type: ignore[untyped-decorator]  # Celery is untyped
    def tick() -> None:
        runtime.pipeline.maintenance.want_tick()


@beat_init.connect  # type: ignore[untyped-decorator]  # Celery is untyped
def _complete_schedule(sender: Any, **_: Any) -> None:
    runtime = find_runtime(sender.app)
    if runtime is not None:
        beat.add_tick_to_scheduler(runtime, sender.scheduler)
