"""What chaos runs have come to, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.run import Outcome
from tests.chaos.stack import Setup

COLUMNS = ("acknowledged", "ok", "lost", "failed", "recovered", "unexpected", "duplicated", "unexplained")
_HEAD = (*COLUMNS, "left", "seconds")
#: The most ids of one kind that are worth reading.
MOST_IDS = 20


def name_of(setup: Setup) -> str:
    """Return a short name of a setup."""
    return "-".join([setup.broker, *(["everysec"] if setup.fsync != "always" else []), *["plain"] * setup.plain])


def head() -> str:
    """Return the head of the table."""
    return _row("run", _HEAD)


def line(setup: Setup, outcome: Outcome) -> str:
    """Return the line of one run."""
    return _row(f"{name_of(setup)} seed {outcome.schedule.seed}", _figures(outcome))


def total(setup: Setup, outcomes: Sequence[Outcome]) -> str:
    """Return the line of all runs together, and what second runs came from."""
    sums = [sum(column) for column in zip(*map(_figures, outcomes), strict=True)]
    reasons: Counter[str] = sum((outcome.account.reasons() for outcome in outcomes), Counter())
    second_runs = [f"{count:>8} ran again after: {reason}" for reason, count in reasons.most_common()]
    return "\n".join([_row(f"{name_of(setup)} in all", sums), *second_runs])


def findings(outcome: Outcome, directory: Path) -> str:
    """Return what is needed to find out why a run is not clean."""
    ids = {name: getattr(outcome.account, name) for name in ("lost", "failed", "unexpected", "unexplained")}
    listed = [f"  {name}: {' '.join(found[:MOST_IDS])}" for name, found in ids.items() if found]
    return "\n".join([str(outcome.schedule), f"  logs, data and ledger: {directory}", *listed])


def _figures(outcome: Outcome) -> list[int]:
    account = outcome.account
    values = [getattr(account, column) for column in COLUMNS]
    counts = [value if isinstance(value, int) else len(value) for value in values]
    return [*counts, outcome.left, round(outcome.seconds)]


def _row(first: str, cells: Sequence[object]) -> str:
    return f"{first:<28}" + " ".join(f"{cell!s:>{max(5, len(name))}}" for name, cell in zip(_HEAD, cells, strict=True))
