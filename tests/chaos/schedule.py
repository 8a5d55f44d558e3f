"""What goes wrong in a chaos run, and when: all of it follows from the seed."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

#: Seconds between two faults, on average.
FAULT_INTERVAL = 2.5
SHORTEST, LONGEST = 0.3, 3.0
DEPENDENCIES = ("payments", "accounts", "mail")
#: A dependency's health in turn, and how long each lasts, in seconds.
ILLNESSES = ("5xx", "refuse", "hang")
LONGEST_WELL, LONGEST_ILL = 5.0, 4.0


@dataclass(frozen=True)
class Planned:
    """One fault: from ``at`` for ``lasts`` seconds."""

    fault: str
    at: float
    lasts: float

    def __str__(self) -> str:
        return f"{self.at:6.2f} s for {self.lasts:.2f} s: {self.fault}"


@dataclass(frozen=True)
class Weather:
    """From ``at`` on, a dependency has a health."""

    dependency: str
    health: str
    at: float


@dataclass(frozen=True)
class Schedule:
    """All that goes wrong in one run."""

    seed: int
    faults: tuple[Planned, ...]
    weather: tuple[Weather, ...]

    def __str__(self) -> str:
        return "\n".join([f"schedule of seed {self.seed}:", *map(str, self.faults)])


def make_schedule(seed: int, targets: Mapping[str, str], duration: float) -> Schedule:
    """Return the schedule of a seed.

    Args:
        seed: the same one gives the same schedule.
        targets: what each fault that is possible strikes; nothing is struck twice at once.
        duration: seconds over which the tasks are published.
    """
    chance = random.Random(seed)
    count = max(2, round(duration / FAULT_INTERVAL))
    chosen = chance.sample(sorted(targets), min(count, len(targets)))
    free_at: dict[str, float] = defaultdict(float)
    faults = []
    for fault in chosen:
        lasts = chance.uniform(SHORTEST, LONGEST)
        at = max(chance.uniform(0.5, duration), free_at[targets[fault]])
        free_at[targets[fault]] = at + lasts + 1.0
        faults.append(Planned(fault, round(at, 2), round(lasts, 2)))
    weather = [change for dependency in DEPENDENCIES for change in _weather(dependency, duration, chance)]
    return Schedule(seed, tuple(sorted(faults, key=lambda planned: planned.at)), tuple(weather))


def _weather(dependency: str, duration: float, chance: random.Random) -> list[Weather]:
    changes, at = [], chance.uniform(0.0, LONGEST_WELL)
    while at < duration:
        changes.append(Weather(dependency, chance.choice(ILLNESSES), at))
        at += chance.uniform(SHORTEST, LONGEST_ILL)
        changes.append(Weather(dependency, "up", at))
        at += chance.uniform(SHORTEST, LONGEST_WELL)
    return changes
