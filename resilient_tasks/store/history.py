"""``History``: the past of the fleet's breakers, for people, pages and metrics.

It lies in the shared store beside the breakers and decides nothing. The process that made a transition logs it; counts
arrive from every process about once a second. Everything is bounded.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, starmap
from typing import Any, NamedTuple

from resilient_tasks.core.model import ADMITTING, Snapshot, State, Transition, parent_of
from resilient_tasks.core.outage import (
    CAUSE,
    DEFERRED,
    DEFERRED_AGAIN,
    ENTERED,
    LONGEST_WAIT,
    OLDEST_ANSWER,
    RESUMED,
    Counts,
    Deadlines,
    Estimate,
    Outage,
    Tally,
    estimate,
    learned_rate,
)
from resilient_tasks.core.rules import brief, to_ms
from resilient_tasks.store.keys import Keys
from resilient_tasks.store.server import Command, Server

_MINUTE, _DAY = 60, 24 * 3600
_DEFERRED_WHEN_EMPTY = "deferred_when_empty"  # how many tasks had been deferred when none waited for the last time
_SAMPLE = 64  # deadlines that represent all of a breaker's
_LEARNED_FROM = 10  # outages
_LATE = 5000  # ms; what is counted so late still belongs to an outage that has ended


@dataclass(frozen=True, slots=True)
class Minute:
    """What was counted in the minute that began ``at``, seconds since the epoch on the store's clock."""

    at: float
    counts: Counts


class _Bounds(NamedTuple):
    """How much is kept of one breaker: entries of the log, outages, minutes, and seconds after the last change."""

    logged: int
    outages: int
    minutes: int
    seconds: int


def _bounds(name: str) -> _Bounds:
    return _Bounds(50, 21, 60, _DAY) if parent_of(name) else _Bounds(200, 101, 120, 90 * _DAY)


class History:
    """The past of all breakers of one namespace.

    Every method may raise :class:`~resilient_tasks.errors.StoreError`, within the server's time limit.
    """

    def __init__(self, server: Server, keys: Keys) -> None:
        self._server = server
        self._keys = keys

    # --- reading ------------------------------------------------------------------------------------

    def transitions(self, name: str, *, limit: int = 200, since: float = 0.0) -> list[Transition]:
        """Return the log of a breaker, the newest entry first.

        An entry whose ``state`` is its ``previous`` one is no change of state: what SHADOW would have opened,
        and what an operator did to waiting tasks. 200 are kept for 90 days after the last, of a child 50 for a day;
        ``since``, on the store's clock in seconds, leaves out those before.
        """
        logged = self._server.command("LRANGE", self._keys.log(name), 0, limit - 1, read=_logged)
        return [replace(each, name=name) for each in logged or () if each.at > since]

    def minutes(self, name: str, *, since: float = 0.0) -> list[Minute]:
        """Return what was counted in each minute of the last two hours, of a child the last hour, the oldest first.

        A minute in which nothing was counted is missing, and one that began before ``since``.
        """
        now = int(self.now() // _MINUTE)
        numbers = range(max(math.ceil(since / _MINUTE), now - _bounds(name).minutes + 1), now + 1)
        found = self._counts(self._keys.minute(name, number) for number in numbers)
        return [Minute(number * _MINUTE, Counts.of(each)) for number, each in zip(numbers, found, strict=True) if each]

    def totals(self, names: Iterable[str]) -> dict[str, Counts]:
        """Return what was counted since ever, by breaker; in one round trip for up to 500 of them."""
        known = list(names)
        return dict(zip(known, map(Counts.of, self._counts(map(self._keys.counts, known))), strict=True))

    def outages(self, names: Iterable[str], *, since: float = 0.0, limit: int = 1000) -> list[Outage]:
        """Return outages that were not over by ``since``, also those that last, the newest first.

        The latest 101 of each breaker are kept for 90 days after the last, of a child 21 for a day.
        """
        known = list(names)
        found = self._server.commands([("LRANGE", self._keys.outages(name), 0, limit - 1) for name in known], _texts)
        epochs = [(name, epoch) for name, some in zip(known, found, strict=True) for epoch in some or ()]
        kept = self._server.commands([("HGETALL", self._keys.outage(*each)) for each in epochs], _outage)
        outages = [replace(each, breaker=name) for (name, _), each in zip(epochs, kept, strict=True) if each]
        lately = [outage for outage in outages if outage.drained is None or outage.drained > since]
        return sorted(lately, key=lambda outage: -outage.opened)

    def lasting(self, names: Iterable[str]) -> dict[str, Outage]:
        """Return the outages that are not over, by breaker."""
        return {outage.breaker: outage for outage in self.outages(names, limit=1) if outage.drained is None}

    def estimates(self, snapshots: Sequence[Snapshot]) -> dict[str, Estimate]:
        """Estimate when the waiting tasks of breakers will be done, by breaker; of those that have any."""
        waiting = {snapshot.name: snapshot for snapshot in snapshots if snapshot.deferred}
        outages: dict[str, list[Outage]] = {name: [] for name in waiting}
        for outage in self.outages(waiting, limit=_LEARNED_FROM):
            outages[outage.breaker].append(outage)
        minutes = [(name, int(each.now // _MINUTE) - ago) for name, each in waiting.items() for ago in (0, 1)]
        resumed: Counter[str] = Counter()
        for (name, _), counts in zip(minutes, self._counts(starmap(self._keys.minute, minutes)), strict=True):
            resumed[name] += counts.get(RESUMED, 0) - counts.get(DEFERRED_AGAIN, 0)
        deadlines = self.deadlines(waiting)
        rates = {name: learned_rate(waiting[name], outages[name], resumed[name]) for name in waiting}
        return {name: estimate(waiting[name], rates[name], deadlines[name]) for name in waiting}

    def deadlines(self, names: Iterable[str]) -> dict[str, Deadlines]:
        """Return when the waits of tasks end, by breaker, each with a sample at equal distances."""
        keys = {name: self._keys.breaker(name).deadlines for name in names}
        sizes = self._server.commands([("ZCARD", key) for key in keys.values()])
        counts = {name: size or 0 for name, size in zip(keys, sizes, strict=True)}
        ranks = [(name, rank) for name, count in counts.items() for rank in _sampled(count)]
        found = self._server.commands([("ZRANGE", keys[name], rank, rank, "WITHSCORES") for name, rank in ranks])
        samples: dict[str, list[float]] = {name: [] for name in keys}
        for (name, _), scores in zip(ranks, found, strict=True):
            samples[name] += [float(score) / 1000 for score in scores[1::2]]
        return {name: Deadlines(counts[name], tuple(sample)) for name, sample in samples.items()}

    # --- writing ------------------------------------------------------------------------------------

    def note(self, name: str, text: str, actor: str) -> None:
        """Log what an operator has done to the tasks of a breaker."""
        latest = next(iter(self.transitions(name, limit=1)), None)
        state, epoch = (latest.state, latest.epoch) if latest else (State.CLOSED, 0)
        self._server.commands(
            self._logging(Transition(name, state, state, epoch, self.now(), brief(text), brief(actor), 0, 0, 0))
        )

    def follow(self, transition: Transition, window: float) -> None:
        """Log a transition, and begin or end the breaker's outage; called by the process that made it."""
        name, was_admitting, admits = transition.name, transition.previous in ADMITTING, transition.state in ADMITTING
        commands, opens = self._logging(transition), was_admitting and not admits
        if transition.state is not transition.previous:
            commands += _adding(self._keys.counts(name), {ENTERED + transition.state: 1}, _bounds(name).seconds)
        reads: list[Command] = [self._first_outage(name), *(self._before(transition, window) if opens else ())]
        epoch, *before = self._server.commands(
            reads, lambda reply: _numbers(reply) if isinstance(reply, dict) else reply
        )
        latest = self._of_epochs({name: _text(epoch)}).get(name)
        is_lasting = latest is not None and latest.drained is None
        if opens and not is_lasting:
            commands += self._beginning(transition, *before)
        elif latest is not None and is_lasting and transition.state is not transition.previous:
            if opens:  # its tasks still wait
                commands.append(("HDEL", latest.key, "closed"))
            if opens or transition.state is State.OPEN:
                commands.append(("HINCRBY", latest.key, "openings", 1))
        self._server.commands(commands)
        if admits and not was_admitting:
            self.close(name, transition.at)

    def _before(self, transition: Transition, window: float) -> list[Command]:
        """Return what reads what came before an outage, and belongs to it: all in the same window."""
        name, bounds, minute = transition.name, _bounds(transition.name), int(transition.at // _MINUTE)
        of_window = min(math.ceil(window / _MINUTE), bounds.minutes) + 1
        return [
            ("ZCARD", self._keys.breaker(name).deferred),
            ("HMGET", self._keys.counts(name), DEFERRED, _DEFERRED_WHEN_EMPTY),
            ("LRANGE", self._keys.outages(name), bounds.outages - 1, -1),
            *(("HGETALL", self._keys.minute(name, minute - ago)) for ago in range(of_window)),
        ]

    def _beginning(
        self, transition: Transition, waiting: Any, deferred: Any, too_old: Any, *minutes: Any
    ) -> list[Command]:
        """Return what begins an outage, by what was there before."""
        name, bounds = transition.name, _bounds(transition.name)
        outages, key = self._keys.outages(name), self._keys.outage(name, str(transition.epoch))
        total, when_empty = (int(count or 0) for count in deferred or (0, 0))
        began = {
            "opened": to_ms(transition.at), "reason": transition.reason, "actor": transition.actor, "openings": 1,
            "FAILURE": transition.failures, "SLOW": transition.slow, **_causes_of(transition.failures, minutes),
            DEFERRED: max(0, min(waiting or 0, total - when_empty)),
        }  # fmt: skip
        return [
            ("HSET", key, *chain.from_iterable(began.items())),
            ("EXPIRE", key, bounds.seconds),
            ("LPUSH", outages, transition.epoch),
            ("LTRIM", outages, 0, bounds.outages - 1),
            ("EXPIRE", outages, bounds.seconds),
            *(("DEL", self._keys.outage(name, epoch.decode())) for epoch in too_old or ()),
        ]

    def close(self, name: str, at: float | None = None) -> None:
        """Note that a breaker admits calls since ``at``, or now, if its outage has not closed yet."""
        latest = self._latest([name]).get(name)
        if latest is not None and latest.closed is None:
            at = self.now() if at is None else at
            self._server.command("HSET", latest.key, "closed", to_ms(at))
            self.drain(name)

    def drain(self, name: str) -> None:
        """Note that no task waits for a breaker, if that is so: its outage is over if it has closed."""
        counts = self._keys.counts(name)
        deferred = ("ZCARD", self._keys.breaker(name).deferred), ("HGET", counts, DEFERRED)
        [waiting, total] = self._server.commands(deferred)
        if waiting:
            return
        commands: list[Command] = [("HSET", counts, _DEFERRED_WHEN_EMPTY, total)] if total else []
        latest = self._latest([name]).get(name)
        if latest is not None and latest.closed is not None and latest.drained is None:
            commands.append(("HSETNX", latest.key, "drained", to_ms(self.now())))
        self._server.commands(commands)

    def tally(self, tallies: Mapping[str, Tally], now: float) -> None:
        """Add what a process has counted, by breaker; ``now``: the store's time as the process knows it, in seconds."""
        minute, commands = int(now // _MINUTE), [self._first_outage(name) for name in tallies]
        for name, tally in tallies.items():
            bounds = _bounds(name)
            kept = {kind: count for kind, count in tally.counts.items() if not kind.startswith(CAUSE)}
            commands += _adding(self._keys.counts(name), kept, bounds.seconds)
            commands += _adding(self._keys.minute(name, minute), tally.counts, bounds.minutes * _MINUTE)
        epochs = self._server.commands(commands, lambda reply: reply.decode() if isinstance(reply, bytes) else None)
        commands = []
        for name, outage in self._of_epochs(dict(zip(tallies, epochs, strict=False))).items():
            tally, bounds = tallies[name], _bounds(name)
            if outage.drained is None or to_ms(now) - outage.drained < _LATE:
                commands += _adding(outage.key, tally.counts, bounds.seconds)
                peaks = {LONGEST_WAIT: outage.longest_wait, OLDEST_ANSWER: outage.oldest_answer}
                higher = [(kind, each) for kind, each in tally.peaks.items() if each > (peaks[kind] or 0)]
                commands += [("HSET", outage.key, *peak) for peak in higher]
        self._server.commands(commands)

    # --- inside -------------------------------------------------------------------------------------

    def now(self) -> float:
        """Return the store's time in seconds."""
        return self._server.now() / 1000

    def _counts(self, keys: Iterable[str]) -> list[dict[str, int]]:
        return [each or {} for each in self._server.commands([("HGETALL", key) for key in keys], _numbers)]

    def _latest(self, names: Iterable[str]) -> dict[str, _Latest]:
        """Return the latest outage of each breaker that has had one."""
        known = list(names)
        epochs = self._server.commands([self._first_outage(name) for name in known], _text)
        return self._of_epochs(dict(zip(known, epochs, strict=True)))

    def _first_outage(self, name: str) -> Command:
        return "LINDEX", self._keys.outages(name), 0

    def _of_epochs(self, epochs: Mapping[str, str | None]) -> dict[str, _Latest]:
        keys = {name: self._keys.outage(name, epoch) for name, epoch in epochs.items() if epoch}
        found = self._server.commands([("HMGET", key, "opened", *_Latest._fields[1:]) for key in keys.values()], _times)
        return {
            name: _Latest(key, *times)
            for (name, key), (opened, *times) in zip(keys.items(), (each or [None] * 5 for each in found), strict=True)
            if opened is not None  # else it has been forgotten meanwhile
        }

    def _logging(self, transition: Transition) -> list[Command]:
        bounds, key = _bounds(transition.name), self._keys.log(transition.name)
        kept = {name: value for name, value in asdict(transition).items() if name not in {"name", "previous", "state"}}
        entry = {**kept, "at": to_ms(transition.at), "from": transition.previous, "to": transition.state}
        return [
            ("LPUSH", key, json.dumps(entry)),
            ("LTRIM", key, 0, bounds.logged - 1),
            ("EXPIRE", key, bounds.seconds),
            *self._keys.note_change(transition.name, to_ms(transition.at)),
        ]


class _Latest(NamedTuple):
    """The latest outage of a breaker; times and peaks in ms."""

    key: str
    closed: int | None
    drained: int | None
    longest_wait: int | None
    oldest_answer: int | None


def _adding(key: str, counts: Mapping[str, int], seconds: int) -> list[Command]:
    added: list[Command] = [("HINCRBY", key, kind, count) for kind, count in counts.items() if count]
    return [*added, ("EXPIRE", key, seconds)] if added else []


def _causes_of(failures: int, minutes: Iterable[Mapping[str, int] | None]) -> dict[str, int]:
    """Return what the failures were that opened a breaker, in all as many; minutes are as exact as it gets."""
    counts: Counter[str] = Counter()
    for minute in minutes:
        if counts.total() < failures:
            counts.update({kind: count for kind, count in (minute or {}).items() if kind.startswith(CAUSE)})
    share, seen, causes = min(1.0, failures / max(counts.total(), 1)), 0, {}
    for kind, count in counts.items():
        causes[kind] = round((seen + count) * share) - round(seen * share)
        seen += count
    return causes


# --- reading what is kept; what raises an error is deleted by ``Server.commands`` -----------------------


def _sampled(count: int) -> list[int]:
    """Return the ranks at equal distances that represent so many deadlines; the last one is among them."""
    size = min(count, _SAMPLE)
    return [count * number // size - 1 for number in range(1, size + 1)]


def _text(value: bytes | None) -> str | None:
    return value.decode() if value is not None else None


def _texts(values: Iterable[bytes]) -> list[str]:
    return [value.decode() for value in values]


def _times(values: Iterable[bytes | None]) -> list[int | None]:
    return [None if value is None else int(value) for value in values]


def _numbers(fields: Mapping[bytes, bytes]) -> dict[str, int]:
    counts = {kind.decode(): int(count) for kind, count in fields.items()}
    Counts.of(counts)
    return counts


def _outage(fields: Mapping[bytes, bytes]) -> Outage | None:
    return Outage.of("", {field.decode(): value.decode() for field, value in fields.items()}) if fields else None


def _logged(entries: Iterable[bytes]) -> list[Transition]:
    return [_transition(**json.loads(entry)) for entry in entries]


def _transition(at: int, to: str, counts: object = None, **fields: Any) -> Transition:  # noqa: ARG001 - not of interest
    return Transition(name="", previous=State(fields.pop("from")), state=State(to), at=at / 1000, **fields)
