"""How many of the library's modules run for a task that is deferred and resumed: how much a reader has to open.

One prefork worker and beat; everything counts that they call from the refusal until the tasks have finished: gate,
deferral, tick, trials, resume, run and report, but not what is only imported, or has run at the start.
"""

from __future__ import annotations

from benchmarks._rig import TIMEOUT, rig, verdict, wait_until
from benchmarks.recovery import waiting

TASKS = 5
LIMIT = 25


def main() -> None:
    with rig() as bench:
        project, tracing = bench.project, {"BENCH_MODULES": "1"}
        bench.worker(env=tracing)
        bench.beat()
        bench.broker.set(project.NOTING, 1)
        project.recovering.trip(reason="benchmark")
        for _ in range(TASKS):
            project.charge.delay()
        wait_until(lambda: waiting(bench, project.recovering) == TASKS, timeout=TIMEOUT, what="all to wait")
        wait_until(lambda: bench.broker.llen(project.FINISHED) == TASKS, timeout=TIMEOUT, what="all to finish")
        modules = sorted(map(str, bench.broker.smembers(project.MODULES)))
    print("\n".join(modules))
    print(f"\n{len(modules)} modules; <= {LIMIT}: {verdict(met=len(modules) <= LIMIT)}")


if __name__ == "__main__":
    main()
