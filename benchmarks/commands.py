"""What admission makes the servers do: commands while a breaker is CLOSED, and while it is OPEN.

Broker and store are two servers here. INFO commandstats of the broker shows what a task costs there, guarded
and not. On the store, MONITOR names each script that is run, so that what belongs to the view's poll, to
reports and to deferrals can be distinguished from what admission would need: ``acquire``.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks._rig import Rig, State, rig, verdict
from resilient_tasks.store.server import Script, script_names
from workers.processes import Worker

TASKS = 2_000


def digests() -> dict[str, str]:
    """Return the name of each of the store's scripts by the digest under which servers know it."""
    return {Script.load(name).digest: name for name in script_names()}


class Watch:
    """What a store was asked, counted by script or command; commands inside scripts are not."""

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self._names = digests()

    def note(self, command: str) -> None:
        """Count one request."""
        parts = command.split()
        verb = parts[0].lower()
        name = self._names.get(parts[1], "unknown script") if verb == "evalsha" else verb
        self.requests[name] += 1


@contextmanager
def watching(bench: Rig) -> Iterator[Watch]:
    """Listen to everything that the store is asked."""
    watch, stopped = Watch(), threading.Event()
    with bench.store.monitor() as monitor:

        def listen() -> None:
            for entry in monitor.listen():
                if entry["command"].startswith("ECHO done"):
                    stopped.set()
                    return
                if entry["client_type"] != "lua":
                    watch.note(entry["command"])

        threading.Thread(target=listen, daemon=True).start()
        yield watch
        bench.store.echo("done")
        stopped.wait(10)


def broker_commands(bench: Rig) -> Counter[str]:
    stats = bench.broker.info("commandstats")
    return Counter({name.removeprefix("cmdstat_"): entry["calls"] for name, entry in stats.items()})


def count(bench: Rig, template: str, worker: Worker) -> tuple[Counter[str], Counter[str], float]:
    """Return what one round made broker and store do, and how long it took."""
    bench.broker.config_resetstat()
    with watching(bench) as watch:
        seconds = bench.go(template, worker).seconds
    return broker_commands(bench), watch.requests, seconds


def report(rounds: dict[str, tuple[Counter[str], Counter[str], float]]) -> None:
    print(f"\nCommands per {TASKS} tasks that do nothing, one worker; broker: INFO commandstats\n")
    own = ("llen", "hlen", "config|resetstat", "info", "copy", "flushdb")  # of this benchmark
    names = sorted({name for broker, _, _ in rounds.values() for name in broker if name not in own})
    print(f"{'':22}" + "".join(f"{title:>20}" for title in rounds))
    for name in names:
        if any(broker[name] >= TASKS / 2 for broker, _, _ in rounds.values()):
            print(f"  {name:20}" + "".join(f"{broker[name] / TASKS:17.2f}/task" for broker, _, _ in rounds.values()))
    print("\nstore: requests in all, by script (MONITOR)\n")
    for name in sorted({name for _, store, _ in rounds.values() for name in store} | {"acquire"}):
        print(f"  {name:20}" + "".join(f"{store[name]:20}" for _, store, _ in rounds.values()))
    print(f"  {'in seconds':20}" + "".join(f"{seconds:20.1f}" for _, _, seconds in rounds.values()))


def main() -> None:
    with rig() as bench:
        plain, guarded = (bench.template(task, TASKS) for task in (bench.project.plain, bench.project.guarded))
        worker = bench.worker()
        rounds = {}
        for template in (plain, guarded):
            bench.go(template, worker)
        rounds["unguarded"] = count(bench, plain, worker)
        rounds["guarded, CLOSED"] = count(bench, guarded, worker)
        bench.set_state(State.FORCED_OPEN)
        rounds["guarded, OPEN"] = count(bench, guarded, worker)
    report(rounds)
    asked = [store["acquire"] + store["unknown script"] for _, store, _ in rounds.values()]
    print(f"\nadmissions that asked the store: {sum(asked)}; target 0: {verdict(met=not any(asked))}")


if __name__ == "__main__":
    main()
