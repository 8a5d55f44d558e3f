"""Steady load on the tasks, and what becomes of it: submissions, results, events."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery import Celery, Task
from celery.states import PENDING, READY_STATES, SUCCESS


@dataclass(frozen=True)
class Stream:
    """Calls of one task at a fixed rate.

    Attributes:
        name: of the dependency it needs.
        task: called with one number.
        rate: calls per second.
        keys: how many different numbers, which then repeat; None: each call has its own.
    """

    name: str
    task: Task
    rate: float
    keys: int | None = None

    def key(self, number: int) -> int:
        """Return the argument of the ``number``-th call."""
        return number if self.keys is None else number % self.keys


@dataclass(frozen=True)
class Submission:
    """One task that was sent; ``at`` is seconds since 1970."""

    task_id: str
    stream: str
    key: int
    at: float


@dataclass(frozen=True)
class Result:
    """How one task ended; ``at`` is seconds since 1970, as the worker reports it."""

    task_id: str
    state: str
    value: Any
    at: float


class Load(threading.Thread):
    """Sends every stream's tasks when they are due, by a clock that never runs backwards.

    ``submissions`` grows while it runs. A send that fails ends it; :meth:`finish` raises the error.
    """

    def __init__(self, streams: Sequence[Stream]) -> None:
        super().__init__(name="load", daemon=True)
        self.submissions: list[Submission] = []
        self._streams = streams
        self._finished = threading.Event()
        self._error: Exception | None = None

    def run(self) -> None:
        """Send until :meth:`finish`."""
        try:
            for due, stream, number in schedule(self._streams, start=time.monotonic()):
                if self._finished.wait(max(0.0, due - time.monotonic())):
                    return
                self._send(stream, stream.key(number))
        except Exception as error:  # noqa: BLE001 - raised again by check() in the thread that can act on it
            self._error = error

    def _send(self, stream: Stream, key: int) -> None:
        at = time.time()
        self.submissions.append(Submission(stream.task.delay(key).id, stream.name, key, at))

    def check(self) -> None:
        """Raise the error that ended the load, if one did."""
        if self._error is not None:
            raise self._error

    def finish(self) -> None:
        """Send nothing more."""
        self._finished.set()
        self.join()
        self.check()


def schedule(streams: Iterable[Stream], *, start: float) -> Iterator[tuple[float, Stream, int]]:
    """Yield ``(due time, stream, number of the call)`` for ever, in order of time."""

    def calls(stream: Stream) -> Iterator[tuple[float, Stream, int]]:
        number = 0
        while True:
            yield start + number / stream.rate, stream, number
            number += 1

    return heapq.merge(*map(calls, streams), key=lambda call: call[0])


class Results:
    """What the result backend knows, read with one MGET per refresh."""

    def __init__(self, app: Celery) -> None:
        self.finished: dict[str, Result] = {}
        self.waiting: dict[str, Counter[str]] = {}  # by stream: how many are in which state
        self.peak_deferred = 0
        self._backend = app.backend

    def refresh(self, submissions: Sequence[Submission]) -> None:
        """Read every task that had not finished yet."""
        pending = [submission for submission in submissions if submission.task_id not in self.finished]
        waiting: dict[str, Counter[str]] = {}
        for submission, meta in zip(pending, self._read(pending), strict=True):
            if meta.get("status") in READY_STATES:
                self.finished[submission.task_id] = result_of(meta)
            else:
                waiting.setdefault(submission.stream, Counter())[meta.get("status", PENDING)] += 1
        self.waiting = waiting
        self.peak_deferred = max(self.peak_deferred, sum(states["DEFERRED"] for states in waiting.values()))

    def _read(self, submissions: Sequence[Submission]) -> Iterator[Mapping[str, Any]]:
        keys = [self._backend.get_key_for_task(submission.task_id) for submission in submissions]
        for payload in self._backend.mget(keys) if keys else ():
            yield self._backend.decode_result(payload) if payload else {}

    def ended(self, submissions: Sequence[Submission]) -> tuple[Counter[str], Counter[str]]:
        """Return how many have finished and how many of those have failed, by stream."""
        ended = [(submission, self.finished.get(submission.task_id)) for submission in submissions]
        finished = Counter(submission.stream for submission, result in ended if result)
        failed = Counter(submission.stream for submission, result in ended if result and result.state != SUCCESS)
        return finished, failed

    def rates(self, submissions: Sequence[Submission], *, seconds: float) -> dict[str, float]:
        """Return how many tasks per second have finished in the last ``seconds``, by stream."""
        since = time.time() - seconds
        ended = [(submission.stream, self.finished.get(submission.task_id)) for submission in submissions]
        counts = Counter(stream for stream, result in ended if result and result.at >= since)
        return defaultdict(float, {stream: count / seconds for stream, count in counts.items()})

    def strays(self, submissions: Sequence[Submission], names: Iterable[str]) -> list[str]:
        """Return ids of results of the named tasks that were not submitted."""
        ours, wanted = {submission.task_id for submission in submissions}, set(names)
        pattern = self._backend.get_key_for_task("*")
        payloads = [self._backend.get(key) for key in self._backend.client.scan_iter(match=pattern, count=1000)]
        metas = [self._backend.decode_result(payload) for payload in payloads if payload]
        return [meta["task_id"] for meta in metas if meta.get("name") in wanted and meta["task_id"] not in ours]


def result_of(meta: Mapping[str, Any]) -> Result:
    """Turn the backend's record of a finished task into a :class:`Result`."""
    return Result(
        meta["task_id"], meta["status"], meta["result"], datetime.fromisoformat(meta["date_done"]).timestamp()
    )


@dataclass(frozen=True)
class BreakerEvent:
    """One transition, as its event reports it."""

    at: float
    type: str
    breaker: str
    reason: str = ""


class EventLog(threading.Thread):
    """Celery's event stream, as far as breakers and deferrals go.

    Args:
        app: the application whose events to listen to.
        on_transition: called with every transition, on this thread.
    """

    def __init__(self, app: Celery, *, on_transition: Callable[[BreakerEvent], object]) -> None:
        super().__init__(name="events", daemon=True)
        self.transitions: list[BreakerEvent] = []
        self.deferred: set[str] = set()  # task ids
        self._on_transition = on_transition
        self._receiver = app.events.Receiver(app.connection_for_read(), handlers={"*": self._note})

    def run(self) -> None:
        """Listen until :meth:`finish`."""
        with self._receiver.connection:
            self._receiver.capture(wakeup=False)

    def finish(self) -> None:
        """Stop listening; takes up to a second."""
        self._receiver.should_stop = True
        self.join()

    def state_of(self, breaker: str) -> str:
        """Return a breaker's state after its latest event."""
        states = [_STATE_AFTER.get(event.type) for event in self.transitions if event.breaker == breaker]
        return next((state for state in reversed(states) if state), "CLOSED")

    def _note(self, event: Mapping[str, Any]) -> None:
        kind = event["type"]
        if kind == "task-deferred":
            self.deferred.add(event["uuid"])
        elif kind.startswith("breaker-"):
            transition = BreakerEvent(event["timestamp"], kind, event["breaker"], event.get("reason", ""))
            self.transitions.append(transition)
            self._on_transition(transition)


_STATE_AFTER = {"breaker-opened": "OPEN", "breaker-half-opened": "HALF_OPEN", "breaker-closed": "CLOSED"}
