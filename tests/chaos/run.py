"""One chaos run: a stack, a producer, a schedule of faults, and the account of every task."""

from __future__ import annotations

import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.accounting import Account, Redelivery, balance, histories
from tests.chaos.faults import FAULTS, MissedError, possible_faults
from tests.chaos.producer import RATE, Producer
from tests.chaos.schedule import Planned, Schedule, Weather, make_schedule
from tests.chaos.stack import Setup, Stack

#: Seconds between two looks at the clock.
BEAT = 0.05
#: Seconds without any event, with nothing left on the broker, after which all is over.
QUIET = 3.0
#: Seconds that everything may take to come to an end after the last fault.
TIMEOUT = 180.0


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Args:
        schedule: what went wrong in it.
        account: what became of the tasks.
        left: messages that are still on the broker.
        seconds: that it took.
    """

    schedule: Schedule
    account: Account
    left: int
    seconds: float

    @property
    def clean(self) -> bool:
        """Whether the run proves the claim."""
        return self.account.clean and not self.left


def schedule_of(seed: int, broker: str, tasks: int) -> Schedule:
    """Return what goes wrong in the run of a seed."""
    targets = {name: fault.target for name, fault in possible_faults(broker).items()}
    return make_schedule(seed, targets, tasks / RATE)


def run(setup: Setup, schedule: Schedule, tasks: int, directory: Path) -> Outcome:
    """Carry a schedule out; logs, data and ledger stay in ``directory``."""
    began = time.monotonic()
    with Stack(setup, directory) as stack:
        for worker in stack.workers:
            worker.program.wait_for_output("ready.", timeout=60)
        options = stack.broker.transport_options
        producer = Producer(stack.broker_url, options, stack.ledger, seed=schedule.seed, tasks=tasks)
        producer.start()
        redeliveries = _Course(stack, schedule).play()
        producer.join()
        left = _settle(stack)
        account = balance(histories(stack.ledger.entries()), redeliveries)
    return Outcome(schedule, account, left, time.monotonic() - began)


class _Course:
    """Carries a schedule out, in this thread."""

    def __init__(self, stack: Stack, schedule: Schedule) -> None:
        self._stack = stack
        self._faults = list(schedule.faults)
        self._weather = sorted(schedule.weather, key=lambda change: change.at)
        self._under_way: list[tuple[float, str, float, ExitStack]] = []  # end, fault, begin, how to end it
        self._redeliveries: list[Redelivery] = []
        self._began = time.monotonic()

    @property
    def _now(self) -> float:
        return time.monotonic() - self._began

    def play(self) -> list[Redelivery]:
        """Inflict all faults and end them; return those after which tasks may run once more."""
        while self._faults or self._weather or self._under_way:
            while self._weather and self._weather[0].at <= self._now:
                self._change(self._weather.pop(0))
            for ending in [fault for fault in self._under_way if fault[0] <= self._now]:
                self._end(ending)
            while self._faults and self._faults[0].at <= self._now and not self._is_struck(self._faults[0]):
                self._inflict(self._faults.pop(0))
            self._stack.keep_alive()
            time.sleep(BEAT)
        return self._redeliveries

    def _change(self, change: Weather) -> None:
        self._stack.set_health(change.dependency, change.health)

    def _is_struck(self, planned: Planned) -> bool:
        """Whether its target has not recovered yet: some faults take their time to end."""
        target = FAULTS[planned.fault].target
        return any(FAULTS[fault].target == target for _, fault, _, _ in self._under_way)

    def _inflict(self, planned: Planned) -> None:
        began = time.monotonic()
        ending = ExitStack()
        ending.enter_context(FAULTS[planned.fault].inflict(self._stack))
        self._under_way.append((self._now + planned.lasts, planned.fault, began, ending))

    def _end(self, under_way: tuple[float, str, float, ExitStack]) -> None:
        self._under_way.remove(under_way)
        _, fault, began, ending = under_way
        with suppress(MissedError):
            ending.close()
            self._note(fault, began)

    def _note(self, fault: str, began: float) -> None:
        if FAULTS[fault].redelivers:
            self._redeliveries.append(Redelivery(fault, began, time.monotonic()))


def _settle(stack: Stack) -> int:
    """Wait until nothing moves any more; return the number of messages that the broker still has."""
    deadline = time.monotonic() + TIMEOUT
    size, moved_at = -1, time.monotonic()
    while True:
        stack.keep_alive()
        left, before, size = stack.broker.holds(), size, stack.ledger.path.stat().st_size
        now = time.monotonic()
        if size != before:
            moved_at = now
        if now > deadline or (not left and now - moved_at > QUIET):
            return left
        time.sleep(QUIET / 6)
