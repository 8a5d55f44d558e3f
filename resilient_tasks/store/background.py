"""What runs beside the callers: threads that cross no fork, queues and calls that are watched for being late.

``PeriodicThread`` calls one function again and again: the view's refresh here, maintenance in a worker.
``BackgroundQueue`` runs actions of callers that must not wait: events, signals.
``TimedWriter`` runs writes of callers that wait a moment only: to a result backend, to an index.
``Overdue`` reports calls that have passed their time while they still run, again each time that they pass it.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

from resilient_tasks.errors import StoreError

logger = logging.getLogger("resilient_tasks")

MOST_WAITING = 1_000
MOST_WRITES = 100_000
IDLE_TIMEOUT = 5.0  # seconds without work after which a thread ends that is needed during an outage only
EXIT_TIMEOUT = 2.0  # seconds that the end of the process may wait for what is left
_SHORTEST_SLEEP = 0.02  # seconds; many calls that begin one after the other are looked at together


_owners: weakref.WeakSet[Any] = weakref.WeakSet()


def renew_after_fork(owner: Any) -> None:
    """Have ``owner.after_fork()`` replace its locks, threads and connections in a forked process, before it is used."""
    _owners.add(owner)


def _after_fork() -> None:
    for owner in list(_owners):
        owner.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def start_thread(name: str, target: Callable[[], object]) -> threading.Thread | None:
    """Start a daemon thread; None if the interpreter is shutting down."""
    thread = threading.Thread(target=target, name=f"resilient-tasks-{name}", daemon=True)
    try:
        thread.start()
    except RuntimeError:
        logger.debug("no thread for %s any more: the process ends", name)
        return None
    return thread


class PeriodicThread:
    """Calls ``run`` every ``interval`` seconds, or sooner if woken, in a daemon thread until it is stopped.

    ``run`` may return after how many seconds it is to be called again, if sooner. It gets the event that is set when
    the thread is to end. A ``StoreError`` is logged for debugging only, because the store's absence has been logged
    once; anything else with its traceback. Either way it goes on. A fork leaves the thread behind: the child may start
    its own.
    """

    def __init__(self, name: str, run: Callable[[threading.Event], float | None], interval: float) -> None:
        self._name, self._run, self._interval = name, run, interval
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start without a thread."""
        self._lock = threading.Lock()
        self._woken, self._stopped = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not stopped since."""
        return self._thread is not None and self._thread.is_alive() and not self._stopped.is_set()

    def start(self) -> None:
        """Start, unless it runs."""
        with self._lock:
            if not self.is_running:
                self._woken, self._stopped = threading.Event(), threading.Event()
                self._thread = start_thread(self._name, partial(self._loop, self._woken, self._stopped))

    def wake(self) -> None:
        """Have the function called as soon as possible."""
        self._woken.set()

    def stop(self, timeout: float) -> None:
        """Let it end, and wait for that at most ``timeout`` seconds."""
        self._stopped.set()
        self._woken.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _loop(self, woken: threading.Event, stopped: threading.Event) -> None:
        while not stopped.is_set():
            woken.clear()
            again = None
            try:
                again = self._run(stopped)
            except StoreError as error:
                logger.debug("%s: %s", self._name, error)
            except Exception:  # top of the thread
                if not stopped.is_set():  # else something was closed while it was in use
                    logger.exception("%s failed and is tried again", self._name)
            woken.wait(0 if stopped.is_set() else min(self._interval, math.inf if again is None else again))


class BackgroundQueue:
    """Runs actions one after the other in a daemon thread; actions beyond ``most_waiting`` are dropped.

    ``what`` it sends is a plural noun, for the log.
    """

    def __init__(self, what: str, most_waiting: int = MOST_WAITING) -> None:
        self._what = what
        self._most_waiting = most_waiting
        self.after_fork()
        renew_after_fork(self)
        _queues.add(self)

    def after_fork(self) -> None:
        """Start empty: what waited at a fork is the parent's to send."""
        self._actions: queue.Queue[Callable[[], object]] = queue.Queue(self._most_waiting)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._dropped = 0  # since the queue was last empty

    def submit(self, action: Callable[[], object]) -> None:
        """Run ``action`` soon; never blocks, never raises."""
        with self._lock:
            try:
                self._actions.put_nowait(action)
            except queue.Full:
                self._dropped += 1
                if self._dropped == 1:
                    logger.warning("%s are dropped: %d others wait to be sent", self._what, self._most_waiting)
                return
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread(self._what, self._run)

    def _run(self) -> None:
        actions = self._actions
        while True:
            try:
                action = actions.get(timeout=IDLE_TIMEOUT)
            except queue.Empty:
                with self._lock:
                    if actions.empty():
                        self._thread = None
                        return
                continue
            try:
                action()
            except Exception as exc:  # noqa: BLE001 - whatever a broker or a receiver raises
                logger.warning("one of the %s was not sent: %s", self._what, type(exc).__name__)
            finally:
                actions.task_done()
            if self._dropped and actions.empty():
                with self._lock:
                    dropped, self._dropped = self._dropped, 0
                logger.warning("%d %s were dropped", dropped, self._what)

    def finish(self, give_up_at: float) -> None:
        """Wait until everything is sent, at most until ``give_up_at`` on the monotonic clock; log what is not."""
        while self._actions.unfinished_tasks and time.monotonic() < give_up_at:
            time.sleep(0.01)
        if self._actions.unfinished_tasks:
            logger.warning("%s not sent at the end of the process: %d", self._what, self._actions.unfinished_tasks)


class TimedWriter:
    """Runs writes one after the other in a thread and waits for each, but only so long.

    A result backend that is unavailable blocks for seconds (its own retries). While a write hangs, others are
    skipped, not queued, unless ``even_late``: a state written late could overtake the task's real result.

    Args:
        name: of what is written to, for the log.
        timeout: longest time in seconds to wait for one write.
        even_late: better late than never.
        expected: errors that are logged without their traceback.
    """

    def __init__(
        self, name: str, timeout: float, *, even_late: bool = False, expected: type[Exception] = Exception
    ) -> None:
        self._name, self._timeout, self._even_late, self._expected = name, timeout, even_late, expected
        self._queue = BackgroundQueue(f"writes to the {name}", MOST_WRITES)
        self._hanging: Future[None] | None = None

    def write(self, action: Callable[[], Any]) -> bool:
        """Run ``action``; True if it was done in time, False if it was skipped, still runs or comes late."""
        return self.begin(action)()

    def begin(self, action: Callable[[], Any]) -> Callable[[], bool]:
        """Begin to run ``action``, unless it is skipped; return what waits for it, and answers as :meth:`write`."""
        hangs = self._hanging is not None and not self._hanging.done()
        if hangs and not self._even_late:
            return lambda: False
        done: Future[None] = Future()
        self._queue.submit(partial(self._run, action, done))
        return partial(self._wait, done, 0 if hangs else self._timeout)

    def _wait(self, done: Future[None], timeout: float) -> bool:
        if wait([done], timeout).done:
            return True
        if self._even_late or not done.cancel():
            self._hanging = done
        return False

    def _run(self, action: Callable[[], Any], done: Future[None]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            action()
        except Exception as exc:
            is_bug, what = not isinstance(exc, self._expected), "a task goes on without the %s: %s"
            logger.warning(what, self._name, type(exc).__name__, exc_info=is_bug)
        finally:
            done.set_result(None)


_queues: weakref.WeakSet[BackgroundQueue] = weakref.WeakSet()


def finish_all() -> None:
    """Wait a moment for what is left in all queues, before a process ends."""
    give_up_at = time.monotonic() + EXIT_TIMEOUT
    for each in list(_queues):
        each.finish(give_up_at)


atexit.register(finish_all)


class Watch:
    """One call that is watched until it ends; it has been reported ``reports`` times."""

    __slots__ = ("at", "report", "reports", "seconds")

    def __init__(self, at: float, seconds: float, report: Callable[[], object]) -> None:
        self.at, self.seconds, self.report = at, seconds, report
        self.reports = 0


class Overdue:
    """Reports calls of this process that are late, while they run.

    One thread sleeps until the first call may be overdue. It is woken for a call only when it would otherwise sleep too
    long, so that watching a quick call costs next to nothing.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.after_fork()
        renew_after_fork(self)

    def after_fork(self) -> None:
        """Start empty: the calls that the parent watches are not ours."""
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._watches: dict[Watch, None] = {}
        self._wakes_at = math.inf

    def begin(self, seconds: float, report: Callable[[], object], *, once: bool = False) -> Watch:
        """Watch a call that begins now; ``report`` each time that ``seconds`` have passed, or the first time only.

        The watching thread calls ``report``, which does no I/O.
        """
        watch = Watch(self._clock() + seconds, math.inf if once else seconds, report)
        self._watches[watch] = None
        if watch.at < self._wakes_at:  # read without the lock: the thread sets it before it looks at what is watched
            self._wake(watch.at)
        return watch

    def end(self, watch: Watch) -> bool:
        """Watch a call no longer; return whether it has been reported."""
        self._watches.pop(watch, None)
        if watch.reports or self._clock() < watch.at:
            return watch.reports > 0
        with self._condition:  # the thread may be at it
            return watch.reports > 0

    def _wake(self, at: float) -> None:
        with self._condition:
            self._wakes_at = min(self._wakes_at, at)
            if self._thread is None or not self._thread.is_alive():
                self._thread = start_thread("overdue", self._run)
            self._condition.notify_all()

    def _run(self) -> None:
        condition = self._condition
        while True:
            with condition:
                while self._clock() < self._wakes_at:
                    condition.wait(None if self._wakes_at == math.inf else self._wakes_at - self._clock())
                overdue = self._take_overdue()
            for watch in overdue:
                try:
                    watch.report()
                except Exception:  # noqa: PERF203 - one that fails hinders no other
                    logger.exception("an overdue call could not be reported")

    def _take_overdue(self) -> list[Watch]:
        self._wakes_at = math.inf
        now = self._clock()
        watches = list(self._watches)
        overdue = [watch for watch in watches if watch.at <= now and watch in self._watches]
        for watch in overdue:
            watch.reports += 1
            watch.at = max(watch.at, now - watch.seconds) + watch.seconds  # a process that was frozen does not make up
        if watches:
            self._wakes_at = max(min(watch.at for watch in watches), now + _SHORTEST_SLEEP)
        return overdue


#: Of this process.
overdue = Overdue()
