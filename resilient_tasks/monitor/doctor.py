"""The doctor: what is wrong with a deployment, why it matters, and what to do.

One small function per check, entered in :data:`CHECKS` by its title. Each looks at a :class:`Deployment` and
yields what it finds; nothing, if all is well. What it needs to know for that is said beside its title.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from resilient_tasks.monitor.deployment import Deployment, ServerFacts
from resilient_tasks.monitor.report import counted, duration

OLDEST_SERVER = (6, 2)
#: A tick is missed when none has completed for so many seconds, however little there is to do.
LONGEST_SILENCE = 60.0
#: Seconds by which clocks may differ.
CLOCK_TOLERANCE = 5.0


class Level(str, Enum):
    """How bad it is."""

    OK = "ok"
    UNKNOWN = "unknown"
    WARNING = "warning"
    ERROR = "error"

    __str__ = str.__str__


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that the doctor has found.

    Args:
        level: how bad it is.
        what: is the case.
        why: it matters.
        advice: what to do.
        check: the title of the check that found it.
    """

    level: Level
    what: str
    why: str = ""
    advice: str = ""
    check: str = ""


_Check = Callable[[Deployment], Iterator[Finding]]

#: All checks by their titles.
CHECKS: dict[str, _Check] = {}


def examine(deployment: Deployment) -> list[Finding]:
    """Return what all checks find, in their order; at least one finding for each."""
    findings: list[Finding] = []
    for title, check in CHECKS.items():
        found = list(check(deployment)) or [Finding(Level.OK, "all is well")]
        findings += [Finding(each.level, each.what, each.why, each.advice, title) for each in found]
    return findings


def _check(title: str, needs: Callable[[Deployment], bool] = lambda _: True) -> Callable[[_Check], _Check]:
    """Enter a check under its title; where ``needs`` is not met, something could not be found out."""

    def enter(check: _Check) -> _Check:
        def complete(deployment: Deployment) -> Iterator[Finding]:
            yield from check(deployment)
            if not needs(deployment):
                yield Finding(Level.UNKNOWN, "could not be found out")

        CHECKS[title] = complete
        return check

    return enter


def _known(fact: str) -> Callable[[Deployment], bool]:
    return lambda deployment: getattr(deployment, fact) is not None


def _broker_answers(deployment: Deployment) -> bool:
    return not deployment.broker_trouble


def _workers_answer(deployment: Deployment) -> bool:
    return bool(deployment.workers)


def _well(what: str) -> Finding:
    return Finding(Level.OK, what)


def _error(what: str, why: str, advice: str) -> Finding:
    return Finding(Level.ERROR, what, why, advice)


def _warning(what: str, why: str, advice: str) -> Finding:
    return Finding(Level.WARNING, what, why, advice)


# --- servers ----------------------------------------------------------------------------------------


@_check("store")
def _store(deployment: Deployment) -> Iterator[Finding]:
    if deployment.store is None:
        yield _error(
            f"the store cannot be asked: {deployment.store_trouble}",
            "each process decides for itself, and nothing is resumed",
            "start it, or correct RESILIENT_TASKS_STORE_URL and the network between",
        )
    elif deployment.store.product == "redis" and deployment.store.version < OLDEST_SERVER:
        yield _error(
            f"the store is {deployment.store.title}",
            "its scripts need commands that came with Redis 6.2",
            "upgrade to Redis 6.2 or newer, or Valkey",
        )
    else:
        yield _well(deployment.store.title)


@_check("broker")
def _broker(deployment: Deployment) -> Iterator[Finding]:
    if deployment.broker_trouble:
        yield _error(
            f"the broker cannot be asked: {deployment.broker_trouble}",
            "no task reaches a worker, and what waits there goes on waiting",
            "start it, or correct broker_url and the network between",
        )
    elif deployment.broker is not None:
        yield _well(deployment.broker.title)


def _servers(deployment: Deployment) -> Iterator[ServerFacts]:
    yield from (server for server in (deployment.store, deployment.broker) if server is not None)


@_check("maxmemory-policy", needs=_known("store"))
def _eviction(deployment: Deployment) -> Iterator[Finding]:
    for server in _servers(deployment):
        if server.policy and server.policy != "noeviction":
            find = _error if server.maxmemory else _warning
            yield find(
                f"the {server.role} has maxmemory-policy {server.policy}",
                "when its memory is full it throws away tasks, results and the breakers' states",
                "set maxmemory-policy noeviction",
            )


@_check("persistence", needs=_known("store"))
def _persistence(deployment: Deployment) -> Iterator[Finding]:
    for server in _servers(deployment):
        if server.persistent is False:
            holds = "tasks, also those that wait" if server.role == "broker" else "the breakers' states and history"
            yield _warning(f"the {server.role} keeps nothing on disk", f"a restart loses {holds}", "set appendonly yes")


# --- ticks and workers ------------------------------------------------------------------------------


@_check("ticks", needs=_known("tick_age"))
def _ticks(deployment: Deployment) -> Iterator[Finding]:
    completed, sender = deployment.tick_age, deployment.tick_sender_age
    patience = max(LONGEST_SILENCE, 10 * deployment.tick_interval)
    if completed is not None and completed > patience:
        yield _error(
            f"ticks do not complete, the last: {_ago(completed)}",
            "without ticks no breaker heals and no task is resumed",
            "start a worker, and celery beat",
        )
    elif sender is not None and sender > patience:
        yield _warning(
            f"beat sends no ticks, last seen: {_ago(sender)}; workers run them of their own accord",
            "breakers heal some seconds later than they could",
            "start celery beat",
        )
    elif completed is not None and sender is not None:
        yield _well(f"the last has completed {_ago(completed)}, beat was seen {_ago(sender)}")


def _ago(age: float) -> str:
    return "never" if age == math.inf else f"{duration(age)} ago"


@_check("workers", needs=_known("workers"))
def _workers(deployment: Deployment) -> Iterator[Finding]:
    if deployment.workers:
        yield _well(f"{counted(len(deployment.workers), 'worker')} answered")
    elif deployment.workers is not None:
        yield _error(
            "no worker answers", "tasks run nowhere", "start workers; one with a solo pool answers between tasks only"
        )


@_check("control queue", needs=_workers_answer)
def _control_queue(deployment: Deployment) -> Iterator[Finding]:
    for worker in deployment.workers or ():
        if worker.version is not None and worker.control_queue != deployment.control_queue:
            takes = f"takes them from {worker.control_queue}" if worker.control_queue else "takes none"
            yield _error(
                f"worker {worker.name} does not consume {deployment.control_queue}: it {takes}",
                "ticks that are sent do not reach it",
                "give all processes one RESILIENT_TASKS_NAMESPACE",
            )


@_check("pools", needs=_workers_answer)
def _pools(deployment: Deployment) -> Iterator[Finding]:
    for worker in deployment.workers or ():
        if not worker.can_grow:
            yield _warning(
                f"the pool of worker {worker.name} cannot add a slot",
                "a guarded call that hangs there holds up all other tasks of that worker",
                "use -P prefork, with -c 1 for one process, or threads",
            )


@_check("versions", needs=_workers_answer)
def _versions(deployment: Deployment) -> Iterator[Finding]:
    for worker in deployment.workers or ():
        if worker.version is None:
            yield _error(
                f"worker {worker.name} runs without the library, or with one too old to answer",
                "it calls dependencies that are down, and fails tasks instead of deferring them",
                "deploy the same code to all workers",
            )
        elif worker.version != deployment.version:
            yield _warning(
                f"worker {worker.name} has version {worker.version}, here it is {deployment.version}",
                "versions may decide differently",
                "finish the deploy",
            )


@_check("policies", needs=_workers_answer)
def _policies(deployment: Deployment) -> Iterator[Finding]:
    for worker in deployment.workers or ():
        for breaker in deployment.breakers:
            theirs = worker.policies.get(breaker.name)
            if theirs is not None and dict(theirs) != dict(breaker.rules):
                differ = sorted(name for name in breaker.rules if breaker.rules[name] != theirs.get(name))
                yield _warning(
                    f"worker {worker.name} declares breaker {breaker.name} otherwise: {', '.join(differ)}",
                    "the newest declaration holds for all, whichever that is",
                    "finish the deploy, and give all processes the same RESILIENT_TASKS_BREAKERS__ variables",
                )


@_check("clocks", needs=_known("clock_ahead"))
def _clocks(deployment: Deployment) -> Iterator[Finding]:
    clocks = {"this machine": deployment.clock_ahead}
    clocks |= {f"worker {worker.name}": worker.clock_ahead for worker in deployment.workers or ()}
    for whose, ahead in clocks.items():
        if ahead is not None and abs(ahead) > CLOCK_TOLERANCE:
            yield _warning(
                f"the clock of {whose} is {duration(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} the store's",
                "eta and expires mean another time there; breakers go by the store's clock and agree",
                "run NTP or chrony on all machines",
            )


# --- tasks ------------------------------------------------------------------------------------------


@_check("undefined breakers", needs=_known("orphans"))
def _orphans(deployment: Deployment) -> Iterator[Finding]:
    for breaker, count in (deployment.orphans or {}).items():
        yield _warning(
            f"{counted(count, 'task')} wait for breaker {breaker}, which nobody defines",
            "workers resume them by themselves once nobody has defined it for ten minutes",
            f"define the breaker again, or wait; 'inspect breakers' shows who knows {breaker}",
        )


@_check("definitions")
def _definitions(deployment: Deployment) -> Iterator[Finding]:
    for mistake in deployment.mistakes:
        yield _error(mistake, "no worker starts with it", "correct the definition")
    for doubt in deployment.doubts:
        yield _warning(*doubt)


@_check("acks_late")
def _acks_late(deployment: Deployment) -> Iterator[Finding]:
    early = sorted(task.name for task in deployment.tasks if task.defers and not task.acks_late)
    if early:
        yield _warning(
            f"{', '.join(early)} may be deferred and have no acks_late",
            "a task that has failed through its dependency is lost if its worker dies before it is put aside",
            "set acks_late=True on tasks that may run twice, or task_acks_late=True",
        )


@_check("result_expires", needs=_known("store"))
def _result_expires(deployment: Deployment) -> Iterator[Finding]:
    for breaker in deployment.breakers:
        if breaker.oldest_wait and 0 < deployment.result_expires <= breaker.oldest_wait:
            yield _error(
                f"tasks have waited {duration(breaker.oldest_wait)} for {breaker.name},"
                f" longer than results are kept: {duration(deployment.result_expires)}",
                "a chord whose first members are done never fires once its data has expired",
                "set result_expires longer than the longest outage that you expect",
            )


@_check("trial_timeout")
def _trial_timeout(deployment: Deployment) -> Iterator[Finding]:
    timeouts = {breaker.name: breaker.trial_timeout for breaker in deployment.breakers}
    for task in deployment.tasks:
        for name in task.breakers:
            if task.time_limit and timeouts.get(name, task.time_limit) < task.time_limit:
                yield _warning(
                    f"{task.name} may run {duration(task.time_limit)}, trial_timeout of {name} is"
                    f" {duration(timeouts[name])}",
                    "guarded calls inside it, and trials of tasks without a limit, count as failed before it is over",
                    f"set trial_timeout of {name} to {task.time_limit:g} or more, or lower the task's time limit",
                )


@_check("visibility_timeout", needs=_broker_answers)
def _visibility(deployment: Deployment) -> Iterator[Finding]:
    timeout = deployment.visibility_timeout
    for task in deployment.tasks:
        if timeout is not None and task.acks_late and task.time_limit and timeout <= task.time_limit:
            yield _warning(
                f"{task.name} may run {duration(task.time_limit)}, visibility_timeout is {duration(timeout)}",
                "the broker delivers it a second time while it still runs",
                "set visibility_timeout in broker_transport_options longer than any task runs",
            )


@_check("prefetch")
def _prefetch(deployment: Deployment) -> Iterator[Finding]:
    if deployment.tasks and deployment.prefetch_multiplier == 0:
        yield _warning(
            "worker_prefetch_multiplier is 0: one worker takes all that is queued",
            "tasks wait in the memory of one worker while others are idle, and come back only when it dies",
            "set worker_prefetch_multiplier to 1 for long tasks, or to 4",
        )
