"""What the gate costs a worker: a task that does nothing, guarded and not, through the same worker.

Prefork with two processes, Redis broker, acks_late. Rounds alternate, so that a busy machine slows both alike;
the ratio is the median of the ratios of neighbouring rounds. CPU time says the same with less noise.
With the argument ``bare`` or ``usual`` only that setting is measured.
"""

from __future__ import annotations

from statistics import median

from benchmarks._rig import Rig, Round, confidence, in_each_setting, verdict

TASKS = 300  # per round
PAIRS = 30
TARGET = 0.97


def measure(bench: Rig) -> list[tuple[Round, Round]]:
    """Return pairs of neighbouring rounds, unguarded and guarded."""
    plain, guarded = (bench.template(task, TASKS) for task in (bench.project.plain, bench.project.guarded))
    worker = bench.worker()
    for template in (plain, guarded):
        bench.go(template, worker)
    pairs = []
    for number in range(PAIRS):
        if number % 2:
            own = bench.go(guarded, worker)
            pairs.append((bench.go(plain, worker), own))
        else:
            other = bench.go(plain, worker)
            pairs.append((other, bench.go(guarded, worker)))
    return pairs


def report(setting: str, pairs: list[tuple[Round, Round]]) -> None:
    print(f"\n{PAIRS} pairs of rounds of {TASKS} tasks that do nothing; {setting}\n")
    print(f"{'':12}{'tasks/s':>10}{'CPU of main process':>22}{'CPU of pool':>14}   (per task)")
    for index, name in enumerate(("unguarded", "guarded")):
        rounds = [pair[index] for pair in pairs]
        speed = TASKS / median(one.seconds for one in rounds)
        main, pool = (median(getattr(one, part) for one in rounds) / TASKS * 1e6 for part in ("main", "pool"))
        print(f"{name:12}{speed:10.0f}{main:19.0f} µs{pool:11.0f} µs")
    print()
    compare_medians("tasks/s", [plain.seconds / guarded.seconds for plain, guarded in pairs])
    compare_medians("tasks per CPU second of the main process", [plain.main / guarded.main for plain, guarded in pairs])


def compare_medians(what: str, ratios: list[float]) -> None:
    low, high = confidence(ratios)
    decided = low >= TARGET or high < TARGET
    print(f"guarded / unguarded, {what}: {median(ratios):.3f}, with 95 % confidence {low:.3f} to {high:.3f};", end=" ")
    print(f"target >= {TARGET}:", verdict(met=low >= TARGET) if decided else "too noisy here to decide")


def compare(bench: Rig, setting: str) -> None:
    report(setting, measure(bench))


def main() -> None:
    in_each_setting("benchmarks.throughput", compare)


if __name__ == "__main__":
    main()
