"""What our commands cost: processor time, because the time on the wall is the machine's affair.

``celery --help`` with our commands and without them, and ``celery -A workers.app breakers list`` beside
``celery -A workers.app --version``, which imports no app. Everything is compiled before, as in any installation;
Flower's command is left out, because it imports redis-py for ``--version``, too.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks._rig import verdict
from workers.processes import start_valkey

ROUNDS = 15
LIMIT = 0.5  # seconds
CELERY = """
import importlib.metadata as metadata, sys
found, wanted = metadata.entry_points, sys.argv.pop(1)
metadata.entry_points = lambda **which: [each for each in found(**which) if each.name == wanted]
from celery.__main__ import main
main()
"""


def celery(*arguments: str, with_command: str = "breakers") -> list[str]:
    """Return the command line of ``celery`` with one command from elsewhere among its own."""
    return [sys.executable, "-c", CELERY, with_command, *arguments]


def processor_time(command: Sequence[str], environment: dict[str, str]) -> float:
    """Return the seconds that a command computes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    commands = {
        "celery --help without our commands": celery("--help", with_command="none"),
        "celery --help": celery("--help"),
        "celery -A workers.app --version": celery("-A", "workers.app", "--version"),
        "celery -A workers.app breakers list": celery("-A", "workers.app", "breakers", "list"),
    }
    with tempfile.TemporaryDirectory() as directory:
        server = start_valkey(Path(directory))
        environment = {
            **os.environ,
            "CELERY_BROKER_URL": server.url(0),
            "CELERY_RESULT_BACKEND": server.url(1),
            "PYTHONDONTWRITEBYTECODE": "",
            "PYTHONPYCACHEPREFIX": directory,
        }
        for command in commands.values():
            processor_time(command, environment)  # compiles
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, command in commands.items():
                times[name].append(processor_time(command, environment))
        server.stop()
    print(f"\nSeconds of processor time, median of {ROUNDS}\n")
    for name, measured in times.items():
        print(f"{name:38}{median(measured):6.2f}")
    pairs = zip(times["celery -A workers.app breakers list"], times["celery -A workers.app --version"], strict=True)
    more = median(listed - version for listed, version in pairs)
    print(f"\nlist beside --version {more:+.2f} s; <= {LIMIT:g}: {verdict(met=more <= LIMIT)}")


if __name__ == "__main__":
    main()
