"""The doctor: what is wrong with a deployment, why it matters, and what to do.

:func:`look_at` asks store, broker, workers and settings, whatever of them answers; ``_RULES`` are what the checks may
find in such a :class:`Deployment`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import chain
from typing import Any, TypeVar

from celery.backends.base import DisabledBackend

from resilient_tasks.core.memory import ServerFacts
from resilient_tasks.core.model import parent_of
from resilient_tasks.errors import ResilienceError
from resilient_tasks.monitor.report import counted, duration
from resilient_tasks.store.base import Spec
from resilient_tasks.store.history import History
from resilient_tasks.worker.bootsteps import library_version, resilience, rules_of
from resilient_tasks.worker.context import TICK_TASK, Runtime
from resilient_tasks.worker.definitions import DEFER, doubts, options_of

T = TypeVar("T")

OLDEST_SERVER = (6, 2)
#: A tick is missed when none has completed for so many seconds, however little there is to do.
LONGEST_SILENCE = 60.0
#: Seconds by which clocks may differ.
CLOCK_TOLERANCE = 5.0
_VISIBILITY_TIMEOUT = 3600.0  # kombu's own

#: A breaker that no worker has declared for so many seconds is defined by none that runs.
UNSEEN = 60.0


# --- the facts -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class WorkerFacts:
    name: str
    version: str | None = None  # of its library; None: it has none, or an older one that does not answer
    control_queue: str | None = None  # from which it takes ticks; None: it takes none
    refused: Mapping[str, str] = field(default_factory=dict)  # the library's queues that the broker refuses, and why
    clock_ahead: float | None = None  # seconds, of the store's clock; None: it has not read the store
    policies: Mapping[str, Mapping[str, object]] = field(default_factory=dict)  # by breaker, the rules that it declares
    can_grow: bool = True  # its pool can add a slot while calls hang
    tick_scope: str = ""  # distinguishes its ticks from those of workers that define other breakers


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task that names a breaker, as this process defines it. Durations in seconds."""

    name: str
    breakers: tuple[str, ...]
    defers: bool
    acks_late: bool
    time_limit: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """Everything that the doctor checks. None: unknown. Durations in seconds."""

    version: str  # of the library in this process
    control_queue: str  # on which this app's ticks travel
    tasks: tuple[TaskFacts, ...] = ()  # that name a breaker
    mistakes: tuple[str, ...] = ()  # why workers do not start
    doubts: tuple[tuple[str, str, str], ...] = ()  # what may be a mistake in a definition, why it matters, what to do
    breakers: tuple[Spec, ...] = ()  # as this process declares them
    oldest_waits: Mapping[str, float] = field(default_factory=dict)  # of tasks that wait for a breaker or its children
    keeps_results: bool = True
    undecided: Mapping[str, Sequence[str]] | None = None  # exceptions of the last hours that no rule knows, by breaker
    result_expires: float = 86400.0  # how long results, and what is known of chords, are kept; 0: for ever
    prefetch_multiplier: int = 4
    store: ServerFacts | None = None
    store_trouble: str = ""  # why the store does not answer
    broker: ServerFacts | None = None  # None also for a broker that is no Redis
    broker_trouble: str = ""  # why the broker does not answer
    visibility_timeout: float | None = None  # of a Redis broker; None: the broker has none
    clock_ahead: float | None = None  # by which the clock of this process is ahead of the store's
    tick_age: float | None = None  # since a tick of this app's breakers has completed; infinite if none ever did
    tick_sender_age: float | None = None  # since beat, or what else sends ticks, was last seen; infinite if never
    tick_interval: float = 1.0
    lasting_ticks: tuple[str, ...] = ()  # entries of a scheduler in a database that send ticks without an expiry
    orphans: Mapping[str, int] | None = None  # tasks that wait for breakers that no process defines, by breaker
    workers: tuple[WorkerFacts, ...] | None = None  # that answer


def look_at(runtime: Runtime, *, timeout: float) -> Deployment:
    """Find out all that the doctor needs; what does not answer, workers within ``timeout`` seconds, is left out."""
    broker = _look_at_broker(runtime)
    workers = None if broker["broker_trouble"] else _ask_workers(runtime, timeout)
    conf = runtime.app.conf
    return Deployment(
        version=library_version(),
        control_queue=runtime.control_queue,
        tasks=_tasks(runtime),
        mistakes=tuple(map(str, runtime.mistakes())),
        doubts=tuple(doubts(runtime.app, runtime.settings.unknown_overrides(runtime.breakers))),
        breakers=tuple(runtime.specs()),
        keeps_results=not isinstance(runtime.app.backend, DisabledBackend),
        result_expires=runtime.result_ttl,
        prefetch_multiplier=conf.worker_prefetch_multiplier,
        tick_interval=runtime.settings.tick_interval,
        lasting_ticks=_lasting_ticks(str(conf.beat_scheduler)),
        workers=workers,
        **broker,
        **_look_at_store(runtime, workers),
    )


def _look_at_store(runtime: Runtime, workers: tuple[WorkerFacts, ...] | None) -> dict[str, Any]:
    waits: dict[str, float] = {}
    found: dict[str, Any] = {"oldest_waits": waits}
    ledger = runtime.fleet.ledger
    try:
        found["store"] = ServerFacts.of("store", *ledger.server_info())
        for snapshot in runtime.read():
            found["clock_ahead"] = time.time() - snapshot.now
            if snapshot.oldest_deferred_at is not None:
                name = parent_of(snapshot.name) or snapshot.name
                waits[name] = max(snapshot.now - snapshot.oldest_deferred_at, waits.get(name, 0.0))
        # Code that defines other breakers than the workers do, as in a deploy, has another scope, and theirs counts.
        theirs = {worker.tick_scope for worker in workers or () if worker.policies.keys() & runtime.breakers.keys()}
        scopes = {runtime.tick_scope, *theirs}
        ages = {"tick_age": ledger.last_tick_age, "tick_sender_age": ledger.tick_sender_age}
        for name, age_of in ages.items():
            found[name] = min(math.inf if age is None else age for age in map(age_of, scopes))
        found["undecided"] = _undecided(runtime.fleet.history, runtime.breakers)
        found["orphans"] = None if workers is None else _orphans(runtime, workers)
    except ResilienceError as error:
        return {"store_trouble": str(error)}
    return found


def _undecided(history: History, breakers: Iterable[str]) -> dict[str, list[str]]:
    """Return the exceptions that no rule has known of late, by breaker."""
    ever = [name for name, counts in history.totals(breakers).items() if counts.undecided]
    lately = {name: {each for minute in history.minutes(name) for each in minute.counts.undecided} for name in ever}
    return {name: sorted(types) for name, types in lately.items() if types}


def _orphans(runtime: Runtime, workers: tuple[WorkerFacts, ...]) -> dict[str, int]:
    """Return how many tasks wait for breakers that workers used to define, and neither they nor this process do."""
    defined = set(runtime.breakers).union(*(worker.policies for worker in workers))
    declared = runtime.fleet.ledger.abandoned(unseen_for=UNSEEN)
    gone = [name for name in declared if (parent_of(name) or name) not in defined]
    sizes = {name: runtime.queues.size(runtime.queues.deferred(name)) for name in gone}
    return {name: size for name, size in sizes.items() if size}


def _look_at_broker(runtime: Runtime) -> dict[str, Any]:
    try:
        runtime.queues.size(runtime.control_queue)
        facts = runtime.queues.server_facts()
    except runtime.queues.errors as error:
        return {"broker_trouble": f"{type(error).__name__}: {error}"}
    options = runtime.app.conf.broker_transport_options or {}
    timeout = float(options.get("visibility_timeout", _VISIBILITY_TIMEOUT)) if facts else None
    return {"broker": facts, "broker_trouble": "", "visibility_timeout": timeout}


def _ask_workers(runtime: Runtime, timeout: float) -> tuple[WorkerFacts, ...]:
    """Return what each worker answers; one without the library answers that it knows no such command."""
    replies = runtime.app.control.broadcast(resilience.__name__, reply=True, timeout=timeout) or []
    answers = {name: reply for each in replies for name, reply in each.items()}
    understood = {field.name for field in fields(WorkerFacts)} - {"name"}  # its version may be another
    return tuple(
        WorkerFacts(name, **{fact: value for fact, value in answers[name].items() if fact in understood})
        for name in sorted(answers)
    )


def _tasks(runtime: Runtime) -> tuple[TaskFacts, ...]:
    longest = runtime.app.conf.task_time_limit or runtime.app.conf.task_soft_time_limit
    return tuple(
        TaskFacts(
            name=task.name,
            breakers=task.options.breakers,
            defers=DEFER in (task.options.on_open, task.options.on_failure),
            acks_late=bool(task.acks_late),
            time_limit=task.time_limit or task.soft_time_limit or longest,
        )
        for task in runtime.app.tasks.values()
        if options_of(task)
    )


def _lasting_ticks(scheduler: str) -> tuple[str, ...]:
    """Return the tick's entries without an expiry in the database of django-celery-beat, if beat uses that."""
    models = sys.modules.get("django_celery_beat.models")  # imported by Django, if it is one of its apps
    if models is None or not (scheduler == "django" or "django_celery_beat" in scheduler):
        return ()
    database, exceptions = sys.modules["django.db"], sys.modules["django.core.exceptions"]
    lasting = models.PeriodicTask.objects.filter(task=TICK_TASK, enabled=True, expires=None, expire_seconds=None)
    try:
        return tuple(lasting.order_by("name").values_list("name", flat=True))
    except (database.Error, exceptions.ImproperlyConfigured):  # there is no such database, or no table in it
        return ()


# --- the checks ----------------------------------------------------------------------------------------


class Level(str, Enum):
    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    ERROR = "error"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Finding:
    """What is the case, why it matters and what to do, as one check has found."""

    level: Level
    what: str
    why: str = ""
    advice: str = ""
    check: str = ""


def examine(deployment: Deployment) -> list[Finding]:
    found: dict[str, list[Finding]] = {check: [] for check in CHECKS}
    unknown = set()
    for check, level, find, what, why, advice in _RULES:
        try:
            for item in find(deployment):
                found[check].append(Finding(level, what.format(*item), why.format(*item), advice.format(*item), check))
        except _UnknownError:  # noqa: PERF203 - the other rules go on
            unknown.add(check)
    for check, findings in found.items():
        if check in unknown:
            findings.append(Finding(Level.UNKNOWN, "could not be found out", check=check))
        elif not findings:
            findings.append(Finding(Level.OK, _all_is_well(check, deployment), check=check))
    return [finding for findings in found.values() for finding in findings]


def _all_is_well(check: str, deployment: Deployment) -> str:
    server = {"store": deployment.store, "broker": deployment.broker}.get(check)
    if server is not None:
        return server.title
    if check == "ticks":
        seen = f"beat was seen {_ago(deployment.tick_sender_age)}"
        return f"the last has completed {_ago(deployment.tick_age)}, {seen}"
    return f"{counted(len(deployment.workers or ()), 'worker')} answered" if check == "workers" else "all is well"


# --- what the rules look at: generators of what fills the texts of each finding ---------------------------


class _UnknownError(Exception):
    """A fact that a rule needs could not be found out."""


def _known(fact: T | None) -> T:
    if fact is None:
        raise _UnknownError
    return fact


_Items = Iterable[tuple[object, ...]]


def _servers(deployment: Deployment) -> Iterator[ServerFacts]:
    if deployment.broker is not None:
        yield deployment.broker
    yield _known(deployment.store)


def _answering(deployment: Deployment) -> Iterator[WorkerFacts]:
    yield from _known(deployment.workers or None)


def _with_library(deployment: Deployment) -> Iterator[WorkerFacts]:
    return (worker for worker in _answering(deployment) if worker.version is not None)


def _evicting(deployment: Deployment, *, with_limit: bool) -> _Items:
    for server in _servers(deployment):
        if server.policy not in {None, "", "noeviction"} and bool(server.maxmemory) is with_limit:
            yield server.role, server.policy


def _is_late(age: float | None, deployment: Deployment) -> bool:
    return _known(age) > max(LONGEST_SILENCE, 10 * deployment.tick_interval)


def _no_beat(deployment: Deployment) -> _Items:
    if not _is_late(deployment.tick_age, deployment) and _is_late(deployment.tick_sender_age, deployment):
        yield (_ago(deployment.tick_sender_age),)


def _ago(age: float | None) -> str:
    return "never" if age is None or age == math.inf else f"{duration(age)} ago"


def _elsewhere(deployment: Deployment) -> _Items:
    for worker in _with_library(deployment):
        if worker.control_queue != deployment.control_queue:
            takes = f"takes them from {worker.control_queue}" if worker.control_queue else "takes none"
            yield worker.name, deployment.control_queue, takes


def _other_policies(deployment: Deployment) -> _Items:
    for worker in _answering(deployment):
        for breaker in deployment.breakers:
            ours = rules_of(breaker)
            theirs = worker.policies.get(breaker.name, ours)
            differ = sorted(name for name in ours if ours[name] != theirs.get(name))
            if dict(theirs) != ours:
                yield worker.name, breaker.name, ", ".join(differ)


def _wrong_clocks(deployment: Deployment) -> _Items:
    workers = ((f"worker {worker.name}", worker.clock_ahead) for worker in _answering(deployment))
    for whose, ahead in chain([("this machine", _known(deployment.clock_ahead))], workers):
        if ahead is not None and abs(ahead) > CLOCK_TOLERANCE:
            yield whose, duration(abs(ahead)), "ahead of" if ahead > 0 else "behind"


def _not_deployed(deployment: Deployment) -> _Items:
    workers = list(_with_library(deployment))
    defined = {name for worker in workers for name in worker.policies}
    for name in sorted({name for task in deployment.tasks for name in task.breakers} - defined if workers else ()):
        yield name, ", ".join(sorted(task.name for task in deployment.tasks if name in task.breakers))


def _may_hang(deployment: Deployment) -> _Items:
    unbounded = {breaker.name for breaker in deployment.breakers if breaker.policy.slow_call_duration is None}
    tasks = [task for task in deployment.tasks if not task.time_limit and unbounded.issuperset(task.breakers)]
    for name in sorted({name for task in tasks for name in task.breakers}):
        yield ", ".join(sorted(task.name for task in tasks if name in task.breakers)), name


def _long_waits(deployment: Deployment) -> _Items:
    _known(deployment.store)
    for breaker, wait in deployment.oldest_waits.items():
        if 0 < deployment.result_expires <= wait:
            yield duration(wait), breaker, duration(deployment.result_expires)


def _short_trials(deployment: Deployment) -> _Items:
    timeouts = {breaker.name: breaker.policy.trial_timeout for breaker in deployment.breakers}
    for task in deployment.tasks:
        for name in task.breakers:
            if task.time_limit and timeouts.get(name, task.time_limit) < task.time_limit:
                yield task.name, duration(task.time_limit), name, duration(timeouts[name]), f"{task.time_limit:g}"


def _redelivered(deployment: Deployment) -> _Items:
    timeout = _known(None if deployment.broker_trouble else deployment.visibility_timeout or math.inf)
    for task in deployment.tasks:
        if task.acks_late and task.time_limit and timeout <= task.time_limit:
            yield task.name, duration(task.time_limit), duration(timeout)


def _early(deployment: Deployment) -> _Items:
    early = sorted(task.name for task in deployment.tasks if task.defers and not task.acks_late)
    return [(", ".join(early),)] if early else []


def _outdated(deployment: Deployment) -> _Items:
    store = deployment.store
    return [(store.title,)] if store and store.product == "redis" and store.version < OLDEST_SERVER else []


_HOLDS = {"broker": "tasks, also those that wait", "store": "the breakers' states and history"}


# check, level, what to look for; then what is the case, why it matters, and what to do, filled in by each thing found.
_ERROR, _WARNING = Level.ERROR, Level.WARNING
_RULES: tuple[tuple[str, Level, Callable[[Deployment], _Items], str, str, str], ...] = (
    ("store", _ERROR, lambda d: [(d.store_trouble,)] if d.store is None else [], "the store is unavailable: {0}",
     "each process decides for itself, and nothing is resumed",
     "start it, or correct RESILIENT_TASKS_STORE_URL and the network between"),
    ("store", _ERROR, _outdated, "the store is {0}",
     "the scripts need commands of Redis 6.2", "upgrade to Redis 6.2 or newer, or Valkey"),
    ("broker", _ERROR, lambda d: [(d.broker_trouble,)] if d.broker_trouble else [],
     "the broker is unavailable: {0}",
     "no task reaches a worker, and waiting tasks go on waiting",
     "start it, or correct broker_url and the network between"),
    ("maxmemory-policy", _ERROR, lambda d: _evicting(d, with_limit=True), "the {0} has maxmemory-policy {1}",
     "when its memory is full it evicts tasks, results and the breakers' states",
     "set maxmemory-policy noeviction"),
    ("maxmemory-policy", _WARNING, lambda d: _evicting(d, with_limit=False), "the {0} has maxmemory-policy {1}",
     "when its memory is full it evicts tasks, results and the breakers' states",
     "set maxmemory-policy noeviction"),
    ("maxmemory", _WARNING, lambda d: ((server.role,) for server in _servers(d) if server.maxmemory == 0),
     "the {0} has no maxmemory",
     "waiting tasks may fill the machine until the system kills the server; with a limit, deferring stops before it",
     "set maxmemory to less than the machine has"),
    ("persistence", _WARNING,
     lambda d: ((server.role, _HOLDS[server.role]) for server in _servers(d) if server.persistent is False),
     "the {0} keeps nothing on disk",
     "a restart loses {1}", "set appendonly yes"),
    ("ticks", _ERROR, lambda d: [(_ago(d.tick_age),)] if _is_late(d.tick_age, d) else [],
     "ticks do not complete, the last: {0}",
     "without ticks no breaker heals and no task is resumed", "start a worker, and celery beat"),
    ("ticks", _WARNING, _no_beat,
     "beat sends no ticks, last seen: {0}; workers run them by themselves",
     "breakers heal some seconds later than they could", "start celery beat"),
    ("ticks", _WARNING, lambda d: [(name,) for name in d.lasting_ticks],
     "the periodic task {0} sends ticks that do not expire",
     "they pile up in the control queue while no worker runs", "set its expire seconds to a few tick intervals"),
    ("workers", _ERROR, lambda d: [] if _known(d.workers) else [()], "no worker answers",
     "tasks run nowhere", "start workers; one with a solo pool answers between tasks only"),
    ("control queue", _ERROR, _elsewhere, "worker {0} does not consume {1}: it {2}",
     "ticks that are sent do not reach it", "give all processes one RESILIENT_TASKS_NAMESPACE"),
    ("rights", _ERROR,
     lambda d: ((each.name, *item) for each in _with_library(d) for item in sorted(each.refused.items())),
     "the broker refuses worker {0} the queue {1}: {2}",
     "its tasks cannot be deferred: in an outage they stay in the memory of workers",
     "grant the rights in docs/permissions.md"),
    ("pools", _WARNING, lambda d: ((worker.name,) for worker in _answering(d) if not worker.can_grow),
     "the pool of worker {0} cannot add a slot",
     "a guarded call that hangs there holds up all other tasks of that worker",
     "use -P prefork, with -c 1 for one process, or threads"),
    ("versions", _ERROR, lambda d: ((worker.name,) for worker in _answering(d) if worker.version is None),
     "worker {0} runs without the library, or with one too old to answer",
     "it calls dependencies that are down, and fails tasks instead of deferring them",
     "deploy the same code to all workers"),
    ("versions", _WARNING,
     lambda d: ((each.name, each.version, d.version) for each in _with_library(d) if each.version != d.version),
     "worker {0} has version {1}, here it is {2}",
     "versions may decide differently", "finish the deploy"),
    ("policies", _WARNING, _other_policies, "worker {0} declares breaker {1} otherwise: {2}",
     "the newest declaration applies to all workers",
     "finish the deploy, and give all processes the same RESILIENT_TASKS_BREAKERS__ variables"),
    ("clocks", _WARNING, _wrong_clocks, "the clock of {0} is {1} {2} the store's",
     "eta and expires mean another time there; breakers use the store's clock and are not affected",
     "run NTP or chrony on all machines"),
    ("undefined breakers", _WARNING,
     lambda d: [(counted(count, "task"), breaker) for breaker, count in _known(d.orphans).items()],
     "{0} wait for breaker {1}, which no process defines",
     "workers resume them once no process has defined it for ten minutes",
     "define the breaker again, or wait; 'inspect breakers' shows which workers define {1}"),
    ("undefined breakers", _WARNING, _not_deployed,
     "tasks name breaker {0}, which no worker defines that answers: {1}",
     "the workers run other code: in it these tasks have no breaker, or do not exist", "finish the deploy"),
    ("definitions", _ERROR, lambda d: [(mistake,) for mistake in d.mistakes], "{0}",
     "no worker starts with it", "correct the definition"),
    ("definitions", _WARNING, lambda d: d.doubts, "{0}", "{1}", "{2}"),
    ("undecided exceptions", _WARNING,
     lambda d: [(breaker, ", ".join(types)) for breaker, types in _known(d.undecided).items()],
     "calls of {0} end with exceptions that no rule knows: {1}",
     "they are not counted; if they mean that the dependency is down, its breaker stays CLOSED",
     "give the breaker failures=({1},) for those that mean an outage, ignore=(...) for the others"),
    ("hanging calls", _WARNING, _may_hang, "{0}: no time limit, and breaker {1} has no slow_call_duration",
     "a call that hangs holds its slot and is not counted until it returns, if it ever does",
     "set slow_call_duration on {1}, for example 2, time_limit on the tasks, and a time-out in the client"),
    ("acks_late", _WARNING, _early, "{0} may be deferred and have no acks_late",
     "a task that fails because of its dependency is lost if its worker dies before it is deferred",
     "set acks_late=True on tasks that may run twice, or task_acks_late=True"),
    ("results", _WARNING, lambda d: [()] if d.tasks and not d.keeps_results else [], "there is no result backend",
     "callers cannot see that a task is DEFERRED, or why, and chords do not work",
     "set result_backend, if callers look at their tasks"),
    ("result_expires", _ERROR, _long_waits, "tasks have waited {0} for {1}, longer than results are kept: {2}",
     "a chord whose first members are done never fires once its data has expired",
     "set result_expires longer than the longest outage that you expect"),
    ("trial_timeout", _WARNING, _short_trials, "{0} may run {1}, trial_timeout of {2} is {3}",
     "guarded calls inside it, and trials of tasks without a limit, count as failed before it is over",
     "set trial_timeout of {2} to {4} or more, or lower the task's time limit"),
    ("visibility_timeout", _WARNING, _redelivered, "{0} may run {1}, visibility_timeout is {2}",
     "the broker delivers it a second time while it still runs",
     "set visibility_timeout in broker_transport_options longer than any task runs"),
    ("prefetch", _WARNING, lambda d: [()] if d.tasks and d.prefetch_multiplier == 0 else [],
     "worker_prefetch_multiplier is 0: one worker takes all that is queued",
     "tasks wait in the memory of one worker while others are idle, and come back only when it dies",
     "set worker_prefetch_multiplier to 1 for long tasks, or to 4"),
)  # fmt: skip

#: All checks in their order.
CHECKS = tuple(dict.fromkeys(check for check, *_ in _RULES))
