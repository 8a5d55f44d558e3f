"""``Runtime``: everything of one app that its workers, pool processes and producers share.

The composition root ``Resilience`` makes one per Celery app; the rest of ``worker/`` finds it by
:func:`runtime_of`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from celery import Celery, Task

from resilient_tasks.core.model import did_you_mean, is_child, parent_of
from resilient_tasks.core.outage import CACHED_AGE, FALLBACK, OLDEST_ANSWER
from resilient_tasks.dependency import Dependency, Fleet
from resilient_tasks.errors import ConfigurationError, UnknownBreakerError
from resilient_tasks.fallback import Call, Served, found_by
from resilient_tasks.settings import Settings
from resilient_tasks.worker.broker_queues import open_queues
from resilient_tasks.worker.definitions import check_guarded, doubts, options_of
from resilient_tasks.worker.envelope import Envelope
from resilient_tasks.worker.queues import Queues

if TYPE_CHECKING:
    from resilient_tasks.core.model import Snapshot
    from resilient_tasks.store.base import Spec

logger = logging.getLogger("resilient_tasks")

TICK_TASK = "resilient_tasks.tick"
TICK_ENTRY = "resilient-tasks-tick"

_runtimes: WeakKeyDictionary[Celery, Runtime] = WeakKeyDictionary()


def runtime_of(app: Celery) -> Runtime:
    """Return the runtime of an app; ConfigurationError if no ``Resilience`` was initialised with it."""
    runtime = _runtimes.get(app)
    if runtime is None:
        raise ConfigurationError(f"app {app.main!r} has no Resilience: call Resilience(app) or init_app(app)")
    return runtime


def find_runtime(app: Celery) -> Runtime | None:
    return _runtimes.get(app)


def find_breaker(breakers: Mapping[str, Dependency], name: str) -> Dependency:
    """Return a breaker, or a child of one, by name, and define nothing; UnknownBreakerError if it is not there."""
    if isinstance(name, str):
        if name in breakers:
            return breakers[name]
        parent = breakers.get(parent_of(name) or "")
        if parent is not None and is_child(name):
            return parent.child_named(name)
    known = ", ".join(sorted(breakers)) or "none"
    raise UnknownBreakerError(f"breaker {name!r} is defined nowhere; defined: {known}{did_you_mean(name, breakers)}")


class Runtime:
    """One app's breakers, which may still be added to, its settings, and its fleet, which ``connect`` returns."""

    producers_gate: Any  # a ``ProducersGate``, set by the composition root
    pipeline: Any  # a ``Pipeline``, set by the worker's bootstep; only the main process of a worker has one

    def __init__(
        self, app: Celery, breakers: Mapping[str, Dependency], settings: Settings, connect: Callable[[], Fleet]
    ) -> None:
        self.app, self.breakers, self.settings, self._connect = app, breakers, settings, connect
        self._found: dict[tuple[str, ...], list[Dependency]] = {}
        _runtimes[app] = self

    @property
    def fleet(self) -> Fleet:
        return self._connect()

    def breaker(self, name: str) -> Dependency:
        return find_breaker(self.breakers, name)

    def defines(self, name: str) -> bool:
        """Whether this app defines a breaker, or the parent of a child."""
        return name in self.breakers or (is_child(name) and parent_of(name) in self.breakers)

    def present(self) -> list[Dependency]:
        """Return all breakers, and those of their children that are not plainly CLOSED, or that tasks wait for."""
        return [*self.breakers.values(), *self.active_children()]

    def active_children(self) -> list[Dependency]:
        return list(map(self.breaker, filter(self.defines, self.fleet.view.active_children())))

    def breakers_of(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Dependency]:
        """Return the breakers that answer for one call of a task; ConfigurationError if it has no key of a child."""
        names = task.options.breakers
        breakers = self._found.get(names)  # found once: this is asked for every run
        if breakers is None:
            breakers = self._found[names] = [self.breaker(name) for name in names]
        if task.options.breaker_key is None:
            return breakers
        return [breakers[0].child(_key_of(task, args, kwargs)), *breakers[1:]]

    def guarding(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Dependency]:
        """Like :meth:`breakers_of`, but return none if the call has no valid key, as its run will say."""
        try:
            return self.breakers_of(task, args, kwargs)
        except ConfigurationError:
            return []

    @property
    def control_queue(self) -> str:
        return f"{self.settings.namespace}.control"

    @property
    def result_ttl(self) -> float:
        """Seconds for which what belongs to a result is kept."""
        expires = self.app.conf.result_expires or timedelta(days=1)
        return expires.total_seconds() if isinstance(expires, timedelta) else float(expires)

    def count_answer(self, served: Served, breaker: str) -> None:
        """Count what a fallback has served for a breaker, and how stale it was."""
        tally = self.fleet.reporter.tally
        if served.age is None:
            tally(breaker, FALLBACK + served.source)
        else:
            tally(breaker, FALLBACK + served.source, peak=(OLDEST_ANSWER, served.age))
            tally(breaker, CACHED_AGE, round(served.age * 1000))

    @cached_property
    def queues(self) -> Queues:
        """The broker's queues, for a process that is no worker."""
        return open_queues(self.app, self.settings.namespace)

    def origin(self, envelope: Envelope) -> str:
        """Return the name of the queue that a task came from."""
        return envelope.origin or str(self.app.conf.task_default_queue)

    @property
    def tick_scope(self) -> str:
        """What distinguishes the ticks of workers that share a namespace but define other breakers."""
        return hashlib.sha256("\n".join(sorted(self.breakers)).encode()).hexdigest()[:16]

    def tasks_by_breaker(self) -> Mapping[str, list[str]]:
        """Return the names of the tasks that each breaker guards; of a child's parent alone."""
        tasks: defaultdict[str, list[str]] = defaultdict(list)
        for name, task in sorted(self.app.tasks.items()):
            options = options_of(task)
            for breaker in options.breakers if options is not None else ():
                tasks[breaker].append(name)
        return tasks

    def specs(self) -> list[Spec]:
        """Return all breakers as this process declares them, without their children."""
        return [breaker.spec for breaker in self.breakers.values()]

    def read(self, most_children: int | None = None) -> list[Snapshot]:
        """Read all breakers from the store, and so many at most of each one's children that are not plainly CLOSED."""
        specs, store = self.specs(), self.fleet.store
        snapshots = store.read_shared(specs)
        active = [
            replace(spec, name=name)
            for spec, snapshot in zip(specs, snapshots, strict=True)
            if snapshot.active_children
            for name in store.active_children(spec.name, count=most_children or snapshot.active_children)
        ]
        return [*snapshots, *(store.read_shared(sorted(active, key=lambda spec: spec.name)) if active else ())]

    def validate(self) -> None:
        """Raise what cannot be checked before the start, and warn of what may be a mistake."""
        for mistake in self.mistakes():
            raise mistake
        for doubt in doubts(self.app, self.settings.unknown_overrides(self.breakers)):
            logger.warning("%s: %s; %s", *doubt)

    def mistakes(self) -> Iterator[ConfigurationError]:
        """Yield why each task that names a breaker and is not guarded by it is not."""
        for task in self.app.tasks.values():
            if getattr(task, "breaker", None) is not None:
                try:
                    self._validate(task)
                except ConfigurationError as mistake:
                    yield mistake

    def _validate(self, task: Any) -> None:
        check_guarded(task, self.app)
        unknown = [name for name in task.options.breakers if name not in self.breakers]
        if not unknown:
            return
        if not self._is_another_apps(task):
            known = ", ".join(sorted(self.breakers)) or "none"
            raise ConfigurationError(
                f"task {task.name!r} names breaker {unknown[0]!r}, which is not defined; defined: {known}"
                f"{did_you_mean(unknown[0], self.breakers)}"
            )
        type(task).Strategy, type(task).Request = Task.Strategy, Task.Request

    def _is_another_apps(self, task: Any) -> bool:
        """Whether a task is a copy of one of another app in this process: Celery shares tasks among all apps."""
        for other in list(_runtimes.values()):
            if other is not self and other.breakers.keys() >= set(task.options.breakers):
                with suppress(ConfigurationError):  # over a mistake in that app
                    if _function(other.app.tasks.get(task.name)) is _function(task):
                        return True
        return False


def _key_of(task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    try:
        return found_by(task.options.breaker_key, Call(task.name, task.run, args, kwargs))
    except Exception as exc:  # its text may hold a secret among the arguments
        trouble = f"breaker_key={task.breaker_key!r}: {type(exc).__name__} over the arguments of this call"
        raise ConfigurationError(f"task {task.name!r}: {trouble}") from exc


def _function(task: Any) -> Any:
    """Return the function that a task was made of."""
    function = getattr(task, "__wrapped__", task)
    return getattr(function, "__func__", function)
