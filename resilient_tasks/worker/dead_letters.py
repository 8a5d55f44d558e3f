"""Dead letters: tasks that failed for good, or expired, while they waited; kept until somebody decides.

``Resilience.dead_letters`` is the one way to them, from any process: a shell, a script, a web process.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from celery import states

from resilient_tasks.core.model import parent_of
from resilient_tasks.errors import DeadLetterError
from resilient_tasks.worker import seams
from resilient_tasks.worker.envelope import UNDECODABLE, Step, without_ticket
from resilient_tasks.worker.queues import Entry, Move
from resilient_tasks.worker.request import ResultNotWrittenError, write_result

if TYPE_CHECKING:
    from resilient_tasks.worker.runtime import Runtime

logger = logging.getLogger("resilient_tasks")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One task that has ended in a dead-letter queue. Times are seconds since the epoch on the store's clock.

    Args:
        task_id: id of the task; ``"undecodable-..."`` for a message that names none.
        task: name of the task; "" if the message names none.
        breaker: the breaker that it waited for.
        origin: name of the queue that it came from and is replayed to; "" if nobody knows.
        reason: why it is dead.
        since: when it was first deferred; None if it never was.
        died_at: when it was dead-lettered; None if nobody knows.
        attempts: dependency failures of its own that have counted.
        history: its latest steps, oldest first.
        args: its positional arguments as its sender has abbreviated them for people.
        kwargs: its keyword arguments in the same way.
        headers: the message's headers as they were published.
        body: the message's body as it was published; for what cannot be decoded, all that there is.
    """

    task_id: str
    task: str
    breaker: str
    origin: str
    reason: str
    since: float | None
    died_at: float | None
    attempts: int
    history: tuple[Step, ...]
    args: str
    kwargs: str
    headers: Mapping[str, Any]
    body: bytes


class DeadLetters:
    """The dead letters of one app's breakers.

    ``breaker=None`` means those of all breakers that the app defines and of their children, and ``"undecodable"``,
    messages that never came as far as a breaker; any name may be given, also of a breaker that is defined no
    more. A breaker's are those of its children, too. Whatever the broker raises comes through.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._queues = runtime.queues

    def count(self, breaker: str | None = None) -> dict[str, int]:
        """Return the number of dead letters by breaker."""
        sizes = {name: self._count(name) for name in self._names(breaker)}
        if breaker is None and not sizes[UNDECODABLE]:
            del sizes[UNDECODABLE]  # no breaker's, and rarely there
        return sizes

    def list(self, breaker: str | None = None, *, limit: int = 100) -> tuple[DeadLetter, ...]:
        """Return the oldest dead letters, at most ``limit`` of each breaker."""
        return tuple(letter for name in self._names(breaker) for letter in self._oldest(name, limit))

    def show(self, task_id: str, *, breaker: str | None = None) -> DeadLetter:
        """Return one dead letter.

        Raises:
            DeadLetterError: there is none of that id.
        """
        shown: list[DeadLetter] = []
        self._each((task_id,), breaker, lambda letter: shown.append(_describe(letter)))
        return shown[0]

    def replay(self, *task_ids: str, breaker: str | None = None) -> dict[str, int]:
        """Send tasks again as they were first published, straight to the queues that they came from.

        They start afresh: no attempts, a whole ``defer_for``, and PENDING as their state. On Redis each is in
        exactly one place all the time; on other brokers a crash may leave a second copy, never none.

        Returns:
            How many, by the breaker that they had waited for.

        Raises:
            DeadLetterError: there is none of that id, it is no task, its ``expires`` is over, or its queue is gone;
                all the others are replayed.
        """
        return self._each(task_ids, breaker, self._replay)

    def drop(self, *task_ids: str, breaker: str | None = None) -> dict[str, int]:
        """Delete dead letters; several copies of one message are as many letters of one id.

        Returns:
            How many, by the breaker that they had waited for.

        Raises:
            DeadLetterError: there is none of that id; all the others are dropped.
        """
        return self._each(task_ids, breaker, self._drop)

    def _names(self, breaker: str | None) -> tuple[str, ...]:
        return (*self._runtime.breakers, UNDECODABLE) if breaker is None else (breaker,)

    def _count(self, breaker: str) -> int:
        if parent_of(breaker) is None:
            return self._queues.size(self._queues.dead(breaker))
        with self._letters(breaker) as letters:
            return sum(1 for _ in letters)

    @contextmanager
    def _letters(self, breaker: str) -> Iterator[Iterator[Entry]]:
        """Open the dead letters of a breaker; those of a child lie among its parent's."""
        with self._queues.peek(self._queues.dead(breaker), parent_of(breaker) or breaker) as letters:
            is_parent = parent_of(breaker) is None
            yield (letter for letter in letters if is_parent or letter.ticket.breaker == breaker)

    def _oldest(self, breaker: str, limit: int) -> tuple[DeadLetter, ...]:
        with self._letters(breaker) as letters:
            return tuple(map(_describe, itertools.islice(letters, limit)))

    def _each(self, task_ids: tuple[str, ...], breaker: str | None, act: Callable[[Entry], object]) -> dict[str, int]:
        """Do something to the letter of each id; complain only after all the others are served."""
        names, wanted, done = self._names(breaker), Counter(task_ids), Counter[str]()
        complaints: list[str] = []
        for name in names:
            with self._letters(name) as letters:
                for letter in _take(letters, wanted):
                    try:
                        act(letter)
                        done[letter.ticket.breaker] += 1
                    except DeadLetterError as error:  # noqa: PERF203 - the others are served
                        complaints.append(str(error))
        asked = ", ".join(repr(name) for name in names) or "none"
        complaints += [f"no dead letter has the id {each!r}; breakers asked: {asked}" for each in wanted.elements()]
        if complaints:
            raise DeadLetterError("; ".join(complaints), dict(done))
        return dict(done)

    def _replay(self, letter: Entry) -> None:
        if letter.flaw or letter.unreadable():
            raise DeadLetterError(f"dead letter {_id_of(letter)!r} cannot be replayed: it is {UNDECODABLE}")
        if _is_over(letter):
            raise DeadLetterError(f"dead letter {letter.task_id!r} cannot be replayed: its expires is over")
        self._set_result(letter, None, states.PENDING)
        origin = self._runtime.origin(letter.ticket)
        if not self._move(Move(letter, origin)):
            gone = f"dead letter {letter.task_id!r} is not replayed: it, or its queue {origin!r}, is there no more"
            error = DeadLetterError(gone)
            self._set_result(letter, error, states.FAILURE)
            raise error
        what = "Task %s[%s] is replayed to %s"
        logger.info(what, letter.task_name, letter.task_id, origin, extra=letter.log_fields)

    def _drop(self, letter: Entry) -> None:
        if not self._move(Move(letter, None)):
            raise DeadLetterError(f"dead letter {_id_of(letter)!r} is there no more")
        logger.info("dead letter %s of breaker %r is dropped", _id_of(letter), letter.ticket.breaker)

    def _move(self, move: Move) -> bool:
        """Move a letter, while its queue is open; False if it is no longer there, or there is no such queue."""
        dead = self._queues.dead(move.entry.ticket.breaker)
        return [made.queue for made in self._queues.move(dead, [move])] == [move.queue]

    def _set_result(self, letter: Entry, result: Any, state: str) -> None:
        """Let callers wait again, or no longer; a backend never replaces the SUCCESS of a copy replayed elsewhere."""
        if letter.message.headers.get("ignore_result"):
            return
        try:
            write_result(self._runtime.app.backend.store_result, letter.task_id, result, state)
        except ResultNotWrittenError as exc:  # the task comes first
            what = "the result of task %s could not be reset: %s"
            logger.warning(what, letter.task_id, exc, extra=letter.log_fields)


def _take(letters: Iterator[Entry], wanted: Counter[str]) -> list[Entry]:
    """Return the oldest letters with the wanted ids, looking no further than needed; they are wanted no more."""
    found: list[Entry] = []
    while wanted.total() and (letter := next(letters, None)) is not None:
        task_id = _id_of(letter)
        if wanted[task_id]:
            wanted[task_id] -= 1
            found.append(letter)
    return found


def _id_of(letter: Entry) -> str:
    return f"{UNDECODABLE}-{hashlib.sha256(letter.raw).hexdigest()[:16]}" if letter.flaw else letter.task_id


def _is_over(entry: Entry) -> bool:
    """Whether a worker would discard the task unrun, because its ``expires`` has passed."""
    expires = entry.message.headers.get("expires")
    try:
        moment = seams.read_moment(expires)
    except (AttributeError, TypeError, ValueError):
        return False
    return moment is not None and moment < datetime.now(timezone.utc if moment.tzinfo else None)


def _describe(letter: Entry) -> DeadLetter:
    ticket = letter.ticket
    headers = {} if letter.flaw else without_ticket(letter.message.headers)
    return DeadLetter(
        task_id=_id_of(letter),
        task="" if letter.flaw else letter.task_name,
        breaker=ticket.breaker,
        origin=ticket.origin,
        reason=UNDECODABLE if letter.flaw else ticket.reason,
        since=ticket.since or None,
        died_at=ticket.died_at or None,
        attempts=ticket.attempts,
        history=ticket.history,
        args=str(headers.get("argsrepr", "")),
        kwargs=str(headers.get("kwargsrepr", "")),
        headers=headers,
        body=letter.raw if letter.flaw else _body(letter.message.body),
    )


def _body(body: str | bytes) -> bytes:
    return body.encode() if isinstance(body, str) else bytes(body)
