"""How well a limit of calls in flight is kept, and how well it is used.

Three workers, more processes than the limit lets run. Tasks that last a tenth of a second show what a freed slot
costs until the next task has it; then workers are killed at random while 1,000 tasks wait for four slots.
"""

from __future__ import annotations

import random
import signal
import time
from typing import Any

from benchmarks._rig import Rig, rig, verdict, wait_until

WORKERS = 3
DURATIONS = (0.1, 0.5)  # seconds that a task lasts
SECONDS = 20  # that one measurement lasts at best
TASKS = 1000
KILL_EVERY = (4.0, 8.0)  # seconds, at random
TIMEOUT = 900.0  # seconds


def throughput(bench: Rig, seconds: float) -> None:
    """Measure how near tasks of one duration come to ``limit / seconds``."""
    project, side = bench.project, bench.broker
    count = round(SECONDS * project.LIMIT / seconds)
    side.delete(project.FINISHED, project.MOST_IN_FLIGHT)
    started = time.time()
    sent = {project.occupy.delay(seconds).id: place for place in range(count)}
    wait_until(lambda: side.llen(project.FINISHED) == count, timeout=TIMEOUT, what="all to finish")
    rate = count / (max(float(line.split()[1]) for line in finishes(bench)) - started)
    share = rate * seconds / project.LIMIT
    print(f"{count} tasks of {seconds:g} s: {rate:.1f} per second, {share:.0%} of limit / duration")
    moved = sorted(abs(sent[line.split()[0]] - place) for place, line in enumerate(finishes(bench)))
    places = f"median {moved[count // 2]}, 95 % {moved[count * 95 // 100]}, most {moved[-1]}"
    print(f"    places between being sent and being finished: {places}")


def kill_one(bench: Rig, workers: list[Any], choices: random.Random) -> None:
    """Kill one worker with all its processes, whose runs end with it, and start another."""
    victim = workers.pop(choices.randrange(len(workers)))
    victim.send_signal(signal.SIGKILL)
    victim.kill()
    runs = map(str, bench.broker.smembers(bench.project.IN_FLIGHT))
    gone = [run for run in runs if run.startswith(f"{victim.pid}:")]
    if gone:
        bench.broker.srem(bench.project.IN_FLIGHT, *gone)
    workers.append(bench.worker(concurrency=4))


def survival(bench: Rig, workers: list[Any]) -> None:
    """Kill workers while tasks wait for slots: never more than the limit in flight, and all of them finish."""
    project, side, choices = bench.project, bench.broker, random.Random(1)
    side.delete(project.FINISHED, project.MOST_IN_FLIGHT)
    ids = {project.occupy.delay(0.1).id for _ in range(TASKS)}
    kills, started = 0, time.time()
    while len(finished(bench)) < TASKS and time.time() - started < TIMEOUT:
        time.sleep(choices.uniform(*KILL_EVERY))
        if len(finished(bench)) < TASKS:
            kill_one(bench, workers, choices)
            kills += 1
    done, runs, most = finished(bench), side.llen(project.FINISHED), int(side.get(project.MOST_IN_FLIGHT) or 0)
    met = done == ids and most <= project.LIMIT
    print(
        f"{len(done)} of {TASKS} tasks finished in {runs} runs, {kills} workers killed, {time.time() - started:.0f} s;"
    )
    print(f"never more than {most} in flight, limit {project.LIMIT}: {verdict(met=met)}")


def finished(bench: Rig) -> set[str]:
    return {line.split()[0] for line in finishes(bench)}


def finishes(bench: Rig) -> list[str]:
    return list(map(str, bench.broker.lrange(bench.project.FINISHED, 0, -1)))


def main() -> None:
    with rig(BENCH_VISIBILITY="5") as bench:
        workers = [bench.worker(concurrency=4) for _ in range(WORKERS)]
        bench.beat()
        print(f"\nmax_concurrency={bench.project.LIMIT}, {WORKERS} workers of 4 processes\n")
        for seconds in DURATIONS:
            throughput(bench, seconds)
        survival(bench, workers)


if __name__ == "__main__":
    main()
