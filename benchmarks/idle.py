"""What an idle worker asks of the store, and how much of a core it takes, with few breakers and with many."""

from __future__ import annotations

import time

from benchmarks._rig import Rig, cpu, rig, verdict

BREAKERS = (10, 1_000)
SETTLING, SECONDS = 5.0, 20.0
MOST_COMMANDS = 5.0  # a second, whatever the number of breakers


def asked(bench: Rig) -> tuple[int, float]:
    """Return how many commands the store has processed, those inside scripts too, and its CPU seconds."""
    info = bench.store.info()
    return int(info["total_commands_processed"]), float(info["used_cpu_user"]) + float(info["used_cpu_sys"])


def main() -> None:
    """Measure and print."""
    for breakers in BREAKERS:
        with rig(BENCH_BREAKERS=str(breakers - 1)) as bench:
            worker = bench.worker()
            time.sleep(SETTLING)
            before, used_before = asked(bench), sum(cpu(worker))
            time.sleep(SECONDS)
            after, used = asked(bench), sum(cpu(worker)) - used_before
            commands = (after[0] - before[0] - 1) / SECONDS
            busy = (after[1] - before[1]) / SECONDS
            print(
                f"{breakers:5} breakers: {commands:6.1f} commands/s ({verdict(met=commands <= MOST_COMMANDS)}),"
                f" store {busy:.2%} of a core, worker {used / SECONDS:.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
