"""The Celery project that the benchmarks run: tasks that do nothing, with a breaker and without.

Bare is the setting in which the library costs most in proportion: no results, no task events and no log line
per task, so that little but Celery's own handling of a message is left to compare with. ``BENCH_USUAL=1``
switches all three on, as most projects have them, ``BENCH_EVENTS=1`` task events alone. ``BENCH_TRACED=1`` makes a
span of each task, which goes nowhere. ``BENCH_WATCH=1`` makes each process of a worker note when it begins to refuse,
``BENCH_RECEIVERS=1`` gives every signal a receiver, ``BENCH_COUNT=1`` has each process count its function calls,
``BENCH_MODULES=1`` has each note the library's modules whose functions it calls. ``BENCH_BREAKERS`` is a number of
breakers that no task uses.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from typing import Any
from uuid import uuid4

import redis
from celery import Celery, signals
from opentelemetry import trace
from opentelemetry.instrumentation.celery import CeleryInstrumentor
from opentelemetry.sdk.trace import TracerProvider

from resilient_tasks import Resilience
from resilient_tasks import signals as notifications

USUAL = os.environ.get("BENCH_USUAL") == "1"
EVENTS = USUAL or os.environ.get("BENCH_EVENTS") == "1"
REFUSALS = "refusals"  # list on the broker's server: who saw the breaker refuse, and when
NOTING = "noting"  # key on the broker's server, while modules are noted
MODULES = "modules"  # set on the broker's server: modules of the library whose functions were called
WATCH_INTERVAL = 0.002  # seconds

app = Celery("bench", broker=os.environ["BENCH_BROKER"], backend=os.environ["BENCH_BACKEND"])
app.conf.update(
    broker_connection_retry_on_startup=True,
    task_acks_late=True,
    task_ignore_result=not USUAL,
    worker_prefetch_multiplier=4,
    broker_transport_options={"visibility_timeout": float(os.environ.get("BENCH_VISIBILITY", "3600"))},
)
resilience = Resilience(app)
payments = resilience.breaker("payments")
for number in range(int(os.environ.get("BENCH_BREAKERS", "0"))):
    resilience.breaker(f"unused-{number:04}")
QUICK: dict[str, Any] = {
    "consecutive_failures": 3,
    "open_duration": 2.0,
    "open_multiplier": 1.0,
    "open_jitter": 0.0,
    "ramp": 0.0,
}
recovering = resilience.breaker("recovering", **QUICK)
probed = resilience.breaker("probed", **QUICK)

healing = resilience.breaker("healing", minimum_calls=10, window=10, open_duration=2.0, open_multiplier=1.0)
LIMIT = 4
limited = resilience.breaker("limited", max_concurrency=LIMIT)

SIDE = redis.Redis.from_url(os.environ["BENCH_BROKER"])
ILL = "dependency:ill"
FINISHED = "finished"  # list on the broker's server: when tasks finished, seconds since 1970

if not USUAL:
    for silenced in ("celery.worker.strategy", "celery.app.trace", "resilient_tasks"):
        logging.getLogger(silenced).setLevel(logging.WARNING)


if os.environ.get("BENCH_RECEIVERS") == "1":
    for name in notifications.__all__:
        getattr(notifications, name).connect(lambda **_: None, weak=False)


if os.environ.get("BENCH_TRACED") == "1":
    trace.set_tracer_provider(TracerProvider())
    CeleryInstrumentor().instrument()


@app.task(send_events=EVENTS)
def plain() -> None:
    """Do nothing."""


@app.task(breaker=payments, send_events=EVENTS)
def guarded() -> None:
    """Do nothing, behind the gate."""


@app.task(breaker=payments, send_events=EVENTS)
def brief() -> None:
    """Take 5 ms, behind the gate."""
    time.sleep(0.005)


@probed.probe
def probe() -> None:
    """Ask the dependency of ``probed``."""
    call()


@app.task(breaker=recovering)
def charge() -> None:
    """Call the dependency; without a probe, tasks like this one find out that it is back."""
    call()
    SIDE.rpush(FINISHED, str(time.time()))


@app.task(breaker=probed)
def ship() -> None:
    """Call the dependency; a probe finds out that it is back."""
    call()
    SIDE.rpush(FINISHED, str(time.time()))


#: Serve a call if fewer than N were served within the last second: N grows from ARGV 1 to 2 calls/s in ARGV 3 seconds.
SERVE = SIDE.register_script("""
local healed, time = tonumber(redis.call('GET', KEYS[1])), redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
if not healed then
  return 0
end
local bears = ARGV[1] + (ARGV[2] - ARGV[1]) * math.min(1, (now - healed) / 1000 / ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 1000)
if redis.call('ZCARD', KEYS[2]) >= bears then
  return 0
end
return redis.call('ZADD', KEYS[2], now, ARGV[4])
""")
HEALED_AT = "dependency:healed at"  # ms since 1970 on the broker's server; missing while the dependency is down
BEARS = (10, 200, 20)  # calls/s at first, calls/s in the end, seconds
CALLS = "calls"  # list on the broker's server: when a call was made, seconds since 1970, and 1 if it was served


@app.task(breaker=healing, bind=True)
def bill(self: Any) -> None:
    """Call a dependency that bears only so many calls a second."""
    served = SERVE(keys=[HEALED_AT, "served"], args=[*BEARS, self.request.id])
    SIDE.rpush(CALLS, f"{time.time()} {served}")
    if not served:
        raise ConnectionError
    SIDE.rpush(FINISHED, self.request.id)


IN_FLIGHT = "in flight"  # set on the broker's server: runs of ``occupy``, by process group of their worker
MOST_IN_FLIGHT = "most in flight"
_ENTER = SIDE.register_script(
    """
    redis.call('SADD', KEYS[1], ARGV[1])
    local most = math.max(redis.call('SCARD', KEYS[1]), tonumber(redis.call('GET', KEYS[2]) or 0))
    redis.call('SET', KEYS[2], most)
    """
)


@app.task(bind=True, breaker=limited)
def occupy(self: Any, seconds: float) -> None:
    """Be in flight for a while."""
    run = f"{os.getpgrp()}:{uuid4().hex}"
    _ENTER(keys=[IN_FLIGHT, MOST_IN_FLIGHT], args=[run])
    time.sleep(seconds)
    SIDE.srem(IN_FLIGHT, run)
    SIDE.rpush(FINISHED, f"{self.request.id} {time.time()}")


HANGS_FOR = "hangs for "  # and the name of a dependency: key on the broker's server, seconds that its calls hang
WORKS = 0.01  # seconds that a healthy task takes, and a call to a dependency that does not hang
LIMITED = int(os.environ.get("BENCH_PER_WORKER", "0")) or None
sick = resilience.breaker("sick", slow_call_duration=1, max_concurrency_per_worker=LIMITED)
ailing = resilience.breaker("ailing", slow_call_duration=1)


def ask(dependency: str) -> None:
    """Call a dependency that hangs while a key says so."""
    time.sleep(float(SIDE.get(HANGS_FOR + dependency) or WORKS))


@app.task(breaker=sick)
def ask_sick() -> None:
    """Call one dependency."""
    ask("sick")


@app.task(breaker=ailing)
def ask_ailing() -> None:
    """Call another."""
    ask("ailing")


@app.task
def work() -> None:
    """Be healthy."""
    time.sleep(WORKS)
    SIDE.rpush(FINISHED, time.time())


def call() -> None:
    """Call a dependency that is ill while a key exists."""
    if SIDE.exists(ILL):
        raise ConnectionError


def watch() -> None:
    """Note each time at which this process begins to refuse, as the gate and the guards of this process see it."""
    with redis.Redis.from_url(os.environ["BENCH_BROKER"]) as client:
        refused = not payments._dependency.cached_state.admits
        while True:
            refuses = not payments._dependency.cached_state.admits
            if refuses and not refused:
                client.rpush(REFUSALS, f"{os.getpid()} {time.time()}")
            refused = refuses
            time.sleep(WATCH_INTERVAL)


FUNCTION_CALLS = "function calls"  # hash on the broker's server: how many each process's main thread has made so far
WRITE_INTERVAL = 0.1  # seconds


def note_modules() -> None:
    """Note each module at the first call of one of its functions, in all threads and in processes forked from here."""
    seen: set[str] = set()

    def note(frame: Any, event: str, _argument: object) -> None:
        _, inside, module = frame.f_code.co_filename.rpartition("/resilient_tasks/")
        if event == "call" and inside and module not in seen and SIDE.exists(NOTING):
            seen.add(module)
            SIDE.sadd(MODULES, module)

    sys.setprofile(note)
    threading.setprofile(note)


def start_counting(**_: Any) -> None:
    """Count the functions that this thread calls, Python's and C's: those do not depend on the machine's other jobs."""
    calls = 0

    def count(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    def write() -> None:
        with redis.Redis.from_url(os.environ["BENCH_BROKER"]) as client:
            while True:
                client.hset(FUNCTION_CALLS, str(os.getpid()), calls)
                time.sleep(WRITE_INTERVAL)

    threading.Thread(target=write, daemon=True).start()
    sys.setprofile(count)


def start_watching(**_: Any) -> None:
    threading.Thread(target=watch, daemon=True).start()


if os.environ.get("BENCH_WATCH") == "1":
    signals.worker_ready.connect(start_watching)
    signals.worker_process_init.connect(start_watching)

if os.environ.get("BENCH_MODULES") == "1":
    note_modules()

if os.environ.get("BENCH_COUNT") == "1":
    signals.worker_ready.connect(start_counting)
    signals.worker_process_init.connect(start_counting)
