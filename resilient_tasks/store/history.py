"""``History``: what has become of the fleet's breakers so far, for people, pages and metrics.

It lies in the shared store beside the breakers. Transitions and outcomes are written by the very scripts that
decide, so nothing is there twice and nothing is missing; what workers count for themselves (refused, deferred,
resumed, ...) arrives about a second later. Everything is bounded: see ``lua/lib/history.lua``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import redis

from resilient_tasks.core.counts import Counts
from resilient_tasks.core.model import Snapshot, State, Transition
from resilient_tasks.core.outage import Deadlines, Estimate, Outage, Speed, estimate, learned_rate
from resilient_tasks.core.record import brief
from resilient_tasks.store.keys import BreakerKeys, Keys
from resilient_tasks.store.scripts import Call, Scripts
from resilient_tasks.store.server import Server, portions

if TYPE_CHECKING:
    from resilient_tasks.store.mending import Mender
    from resilient_tasks.store.tallies import Tally

T = TypeVar("T")

_MINUTE = 60
_MINUTES_KEPT = 120
_SAMPLE = 64  # deadlines that stand for all of a breaker's


@dataclass(frozen=True, slots=True)
class Minute:
    """One minute of a breaker.

    Args:
        at: when it began, seconds since the epoch on the store's clock.
        counts: what was counted in it.
    """

    at: float
    counts: Counts

    @classmethod
    def read(cls, text: str | bytes) -> Minute:
        """Return what the store keeps as JSON."""
        kept = json.loads(text)
        return cls(kept["minute"] * _MINUTE, Counts.of(kept["counts"]))


class History:
    """The past of all breakers of one namespace.

    Every method may raise :class:`~resilient_tasks.errors.StoreError`, within the server's time limit.

    Args:
        server: connection to the shared store.
        keys: names of the namespace's keys.
        mender: takes away what makes no sense.
        scripts: those that run there.
    """

    def __init__(self, server: Server, keys: Keys, mender: Mender, scripts: Scripts) -> None:
        self._server = server
        self._keys = keys
        self._mender = mender
        self._scripts = scripts

    # --- reading ------------------------------------------------------------------------------------

    def transitions(self, name: str, *, limit: int = 200, since: float = 0.0) -> list[Transition]:
        """Return the log of a breaker, the newest entry first.

        An entry whose ``state`` is its ``previous`` one is no change of state: SHADOW tells what would have
        opened, and an actor what was done by hand to waiting tasks.

        Args:
            name: of the breaker.
            limit: most entries; 200 are kept for 90 days after the last, of a child 50 for a day.
            since: only later ones, seconds since the epoch on the store's clock.
        """
        found = self._ask(
            [name],
            lambda pipeline, keys: pipeline.lrange(keys.log, 0, limit - 1),
            lambda _, entries: [transition_of(json.loads(entry)) for entry in entries],
        )
        return [transition for transition in found[name] if transition.at > since]

    def minutes(self, name: str, *, since: float = 0.0) -> list[Minute]:
        """Return what was counted in each minute of the last two hours, of a child the last hour, the oldest first.

        A minute in which nothing was counted is missing.

        Args:
            name: of the breaker.
            since: only minutes that began then or later, seconds since the epoch on the store's clock.
        """
        found = self._ask(
            [name],
            lambda pipeline, keys: pipeline.hvals(keys.minutes),
            lambda _, slots: _in_order(map(Minute.read, slots)),
        )
        return [minute for minute in found[name] if minute.at >= since]

    def totals(self, names: Iterable[str]) -> dict[str, Counts]:
        """Return what was counted since ever, by breaker; in one round trip for up to 500 of them."""
        return self._ask(
            names,
            lambda pipeline, keys: pipeline.hgetall(keys.totals),
            lambda _, totals: Counts.of({kind: int(count) for kind, count in texts(totals).items()}),
        )

    def outages(self, names: Iterable[str], *, since: float = 0.0) -> list[Outage]:
        """Return outages, also those that last, the newest first; in one round trip for up to 500 breakers.

        Args:
            names: of the breakers; the latest 101 outages of each are kept for 90 days after the last, of a child 21
                for a day.
            since: only those that were not over by then, seconds since the epoch on the store's clock.
        """
        latest = self._latest(names)
        former = self._ask(
            latest,
            lambda pipeline, keys: pipeline.lrange(keys.outages, 0, -1),
            lambda name, filed: [Outage.of(name, json.loads(each)) for each in filed],
        )
        outages = chain.from_iterable([*latest.values(), *former.values()])
        lately = [outage for outage in outages if outage.drained is None or outage.drained > since]
        return sorted(lately, key=lambda outage: -outage.opened)

    def _latest(self, names: Iterable[str]) -> dict[str, list[Outage]]:
        """Return the one outage of each breaker that has not been filed, if there is one."""
        return self._ask(
            names,
            lambda pipeline, keys: pipeline.hgetall(keys.outage),
            lambda name, fields: [Outage.of(name, texts(fields))] if fields else [],
        )

    def lasting(self, names: Iterable[str]) -> dict[str, Outage]:
        """Return the outages that are not over, by breaker; in one round trip for up to 500 breakers."""
        return {name: outage[0] for name, outage in self._latest(names).items() if outage and outage[0].drained is None}

    def speeds(self, names: Iterable[str]) -> dict[str, Speed | None]:
        """Return how fast tasks were resumed of late, by breaker; None where none were. In one round trip."""
        return self._ask(
            names,
            lambda pipeline, keys: pipeline.hmget(keys.totals, "speed", "speed_at", "speed_since"),
            lambda _, kept: Speed(*(int(number) / 1000 for number in kept)) if all(kept) else None,
        )

    def deadlines(self, names: Iterable[str]) -> dict[str, Deadlines]:
        """Return when the waits of tasks end, by breaker, each with a sample; in two round trips for up to 500."""
        counts = self._ask(names, lambda pipeline, keys: pipeline.zcard(keys.deadlines), lambda _, count: int(count))
        bounded = {name: count for name, count in counts.items() if count}
        found = dict.fromkeys(counts, Deadlines())
        for some in portions(bounded):
            samples = self._server.run(partial(self._sample, counts={name: bounded[name] for name in some}))
            found |= {name: Deadlines(bounded[name], sample) for name, sample in samples.items()}
        return found

    def _sample(self, client: redis.Redis, counts: Mapping[str, int]) -> dict[str, list[float]]:
        """Return some of the deadlines of each breaker, of which there are so many, at equal distances."""
        places = [(name, rank) for name, count in counts.items() for rank in _sampled(count)]
        with client.pipeline(transaction=False) as pipeline:
            for name, rank in places:
                pipeline.zrange(self._keys.breaker(name).deadlines, rank, rank, withscores=True)
            replies = pipeline.execute()
        samples: dict[str, list[float]] = {name: [] for name in counts}
        for (name, _), reply in zip(places, replies, strict=True):
            samples[name] += [score / 1000 for _, score in reply]
        return samples

    def estimates(self, snapshots: Sequence[Snapshot]) -> dict[str, Estimate]:
        """Estimate when the waiting tasks of breakers will be done, by breaker; of those that have any."""
        waiting = {snapshot.name: snapshot for snapshot in snapshots if snapshot.deferred}
        if not waiting:
            return {}
        speeds, deadlines = self.speeds(waiting), self.deadlines(waiting)
        outages: dict[str, list[Outage]] = {name: [] for name in waiting}
        for outage in self.outages(waiting):
            outages[outage.breaker].append(outage)
        rates = {name: learned_rate(waiting[name], outages[name], speeds[name]) for name in waiting}
        return {name: estimate(waiting[name], rates[name], deadlines[name]) for name in waiting}

    # --- writing ------------------------------------------------------------------------------------

    def note(self, name: str, text: str, actor: str) -> None:
        """Log what somebody has done by hand to the tasks of a breaker."""
        self._scripts.run("note", self._keys.breaker(name), name, brief(text), brief(actor))

    def tally(self, teller: str, number: int, tallies: Mapping[str, Tally]) -> None:
        """Add what a process has counted, by breaker; once, however often it is told.

        Args:
            teller: name of the process.
            number: of the batch; grows from one batch of a process to the next.
            tallies: what was counted.
        """
        calls: list[Call] = []
        for name, tally in tallies.items():
            keys = *self._keys.breaker(name), self._keys.tellers(name)
            calls.append((keys, (teller, number, json.dumps(tally.counts), json.dumps(tally.peaks))))
        self._mender.sound(tallies, lambda: self._scripts.run_each("tally", calls))

    # --- inside -------------------------------------------------------------------------------------

    def _ask(
        self,
        names: Iterable[str],
        question: Callable[[Any, BreakerKeys], object],
        read: Callable[[str, Any], T],
    ) -> dict[str, T]:
        """Put a question about each breaker, 500 breakers in one round trip; return what is read of the answers."""

        def answers(some: Sequence[str]) -> dict[str, T]:
            found = self._server.ask_each(some, lambda pipeline, name: question(pipeline, self._keys.breaker(name)))
            return {name: read(name, answer) for name, answer in zip(some, found, strict=True)}

        told: dict[str, T] = {}
        for some in portions(names):
            told |= self._mender.sound(some, partial(answers, some))
        return told


def _sampled(count: int) -> list[int]:
    """Return the ranks at equal distances that stand for so many deadlines; the last one is among them."""
    size = min(count, _SAMPLE)
    return [count * number // size - 1 for number in range(1, size + 1)]


def texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    """Return a hash as text, whatever somebody has written into it."""
    return {
        field.decode(errors="surrogateescape"): value.decode(errors="surrogateescape")
        for field, value in fields.items()
    }


def _in_order(minutes: Iterable[Minute]) -> list[Minute]:
    kept = sorted(minutes, key=lambda minute: minute.at)
    earliest = kept[-1].at - _MINUTES_KEPT * _MINUTE if kept else 0  # a slot stays until its place is needed
    return [minute for minute in kept if minute.at > earliest]


def transition_of(fields: Mapping[str, Any]) -> Transition:
    """Return a transition as the scripts write it."""
    states = {name: State(fields[name]) for name in ("previous", "state")}
    return Transition(**{**fields, **states, "at": fields["at"] / 1000})
