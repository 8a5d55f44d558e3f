"""The same outage for plain Celery with ``autoretry_for``, for pybreaker on Redis with retries, and for this library.

30 tasks a second, half of them payments, the others need no dependency; two workers of two processes. The payment
service is healthy for 30 s, answers 500 for 20 s, hangs for 20 s, and is healthy again for 30 s. All tasks have
``acks_late``, a time limit of 30 s and a client time-out of 5 s; the rivals retry five times with exponential back-off.

``python -m benchmarks.comparison`` measures, which takes seven minutes, and draws; ``... draw`` draws the last run.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import redis
from celery import Celery

from benchmarks._rivals import OURS, PLAIN, PYBREAKER, SYSTEMS
from workers.processes import start_valkey, start_worker

RATE = 30  # tasks per second, half of them payments
PHASES = {"healthy": 30, "500s": 20, "hangs": 20, "recovery": 30}  # seconds
ILL, WELL_AGAIN, END = 30, 70, 100  # seconds after the start
CALL = 0.05  # seconds that a healthy call takes
LONGEST_WAIT = 150.0  # seconds after the last task
IMAGES = Path(__file__).parents[1] / "docs" / "images"
DATA = Path(__file__).with_suffix(".json")
NAMES = {
    PLAIN: "Celery, `autoretry_for`",
    PYBREAKER: "pybreaker on Redis, and retries",
    OURS: "resilient_tasks",
}
ROWS = {
    "calls": "calls that reached the dead service",
    "mails_500s": "other tasks per second during 500s",
    "mails_hangs": "other tasks per second during the hang",
    "failed": "payments that failed",
    "lost": "payments lost",
    "held": "most messages held in workers",
    "recovery": "seconds from recovery to the last payment of the outage",
}


class Service:
    """The payment service: healthy, answers 500, or hangs; notes when it was called."""

    def __init__(self) -> None:
        self.phase = "healthy"
        self.called: list[float] = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                service.called.append(time.time())
                phase = service.phase
                time.sleep(30 if phase == "hangs" else CALL)
                self.send_response(500 if phase == "500s" else 200)
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:  # a client that has given up
                    return

        class Server(ThreadingHTTPServer):
            request_queue_size = 1024

        self._server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/"


@contextmanager
def sampled(broker: redis.Redis) -> Iterator[list[int]]:
    """Note how many messages the workers hold, four times a second."""
    held: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(0.25):
            held.append(int(broker.hlen("unacked")))

    thread = threading.Thread(target=sample)
    thread.start()
    yield held
    over.set()
    thread.join()


def publish(app: Celery, service: Service) -> tuple[float, dict[str, float]]:
    """Send the tasks of all phases; return when that began, and when each payment was sent."""
    began, sent = time.time(), {}
    starts = [(sum(list(PHASES.values())[:turn]), phase) for turn, phase in enumerate(PHASES)]
    for number in range(END * RATE):
        due = number / RATE
        time.sleep(max(0.0, began + due - time.time()))
        service.phase = next(phase for start, phase in reversed(starts) if due >= start)
        kind = ("charge", "mail")[number % 2]
        app.send_task(kind, task_id=f"{kind}-{number}")
        if kind == "charge":
            sent[f"charge-{number}"] = due
    service.phase = "healthy"
    return began, sent


def finished(results: redis.Redis) -> dict[str, tuple[str, float]]:
    """Return status and end of every task that has ended."""
    ended = {}
    for key in results.keys("celery-task-meta-*"):
        meta = json.loads(results.get(key) or b"{}")
        if meta.get("status") in ("SUCCESS", "FAILURE"):
            at = datetime.fromisoformat(meta["date_done"])
            ended[meta["task_id"]] = (meta["status"], at.timestamp())
    return ended


def per_second(moments: Sequence[float]) -> list[int]:
    """Return how many of these moments, in seconds after the start, lie in each second."""
    counts = Counter(int(moment) for moment in moments)
    return [counts[second] for second in range(END + 30)]


def measure(system: str) -> dict[str, Any]:
    """Run the outage once."""
    service = Service()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        server = start_valkey(directory)
        env = {"COMPARED": system, "COMPARED_BROKER": server.url(0).removesuffix("/0"), "COMPARED_URL": service.url}
        app = Celery("publisher", broker=server.url(0), set_as_current=False)
        broker, results = (redis.Redis.from_url(server.url(number)) for number in (0, 1))
        workers = [start_worker("benchmarks._rivals", name=f"worker-{n}", directory=directory, env=env) for n in (1, 2)]
        try:
            for worker in workers:
                worker.wait_until_ready()
            with sampled(broker) as held:
                began, sent = publish(app, service)
                deadline = time.time() + LONGEST_WAIT
                while len(ended := finished(results)) < END * RATE and time.time() < deadline:
                    time.sleep(0.5)
        finally:
            for worker in workers:
                worker.kill()
            server.stop()
    mails = [at - began for task, (_, at) in ended.items() if task.startswith("mail")]
    calls = [at - began for at in service.called]
    charges = {task: ended[task] for task in sent if task in ended}
    of_outage = [at - began - WELL_AGAIN for task, (_, at) in charges.items() if sent[task] < WELL_AGAIN]
    return {
        "calls": sum(ILL <= at < WELL_AGAIN for at in calls),
        "mails_500s": round(sum(30 <= at < 50 for at in mails) / 20, 1),
        "mails_hangs": round(sum(50 <= at < 70 for at in mails) / 20, 1),
        "failed": sum(status == "FAILURE" for status, _ in charges.values()),
        "lost": len(sent) - len(charges),
        "held": max(held),
        "recovery": round(max(of_outage), 1),
        "series": {"calls": per_second(calls), "mails": per_second(mails)},
    }


def table(data: dict[str, Any]) -> str:
    """Return the table as Markdown."""
    lines = [f"| | {' | '.join(NAMES.values())} |", "|---" * (len(NAMES) + 1) + "|"]
    lines += [
        f"| {text} | {' | '.join(f'{data[system][row]:,g}' for system in SYSTEMS)} |" for row, text in ROWS.items()
    ]
    return "\n".join(lines)


# --- the picture ------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, GAP = 250, 110, 46, 46, 26  # of one panel, and around it
THEMES = {
    "light": {
        "text": "#24292f",
        "muted": "#57606a",
        "grid": "#d0d7de",
        "ill": "#fff1e5",
        "line": ("#cf222e", "#0969da"),
    },
    "dark": {
        "text": "#e6edf3",
        "muted": "#9198a1",
        "grid": "#3d444d",
        "ill": "#3d2a16",
        "line": ("#ff7b72", "#58a6ff"),
    },
}
PANELS = (("calls", "calls to payments / s"), ("mails", "other tasks / s"))


def picture(data: dict[str, Any], theme: dict[str, Any]) -> str:
    """Return the picture as SVG: a column for each system, a row for each series."""
    seconds = END + 30
    across, down = LEFT + 3 * (WIDTH + GAP), TOP + 2 * (HEIGHT + GAP + 12) - 12
    style = f'font-family="system-ui, sans-serif" font-size="12" fill="{theme["text"]}"'
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {down}" {style} role="img">']
    parts.append("<title>Calls to a payment service and other tasks during an outage, for three set-ups</title>")
    for row, (series, label) in enumerate(PANELS):
        top = TOP + row * (HEIGHT + GAP + 12)
        most = max(max(data[system]["series"][series]) for system in SYSTEMS) or 1
        for column, system in enumerate(SYSTEMS):
            left = LEFT + column * (WIDTH + GAP)
            scale = WIDTH / seconds
            if row == 0:
                parts.append(f'<text x="{left}" y="18" font-weight="600">{NAMES[system].replace("`", "")}</text>')
            for start, length, phase in ((30, 20, "500s"), (50, 20, "hang")):
                x, width = left + start * scale, length * scale - 1
                parts.append(
                    f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="{HEIGHT}" fill="{theme["ill"]}"/>'
                )
                parts.append(_label(x + width / 2, top + 11, phase, theme["muted"], "middle"))
            parts.append(f'<path d="M{left} {top + HEIGHT}h{WIDTH}" stroke="{theme["grid"]}"/>')
            points = " ".join(
                f"{left + (second + 0.5) * scale:.1f},{top + HEIGHT - count / most * (HEIGHT - 16):.1f}"
                for second, count in enumerate(data[system]["series"][series][: seconds if series == "calls" else END])
            )
            line = f'fill="none" stroke="{theme["line"][row]}" stroke-width="1.6"'
            parts.append(f'<polyline points="{points}" {line}/>')
            parts += [
                _label(left + second * scale, top + HEIGHT + 14, f"{second} s", theme["muted"], "middle")
                for second in (0, 30, 70, 100)
            ]
        parts.append(_label(LEFT - 6, top + 20, str(most), theme["muted"], "end"))
        parts.append(_label(LEFT - 6, top + HEIGHT, "0", theme["muted"], "end"))
        parts.append(_label(LEFT, top - 8, label, theme["line"][row], "start"))
    return "\n".join([*parts, "</svg>\n"])


def _label(x: float, y: float, text: str, fill: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" fill="{fill}" text-anchor="{anchor}">{text}</text>'


def main() -> None:
    if "draw" not in sys.argv[1:]:
        data: dict[str, Any] = {"load": os.getloadavg()[0]}
        for system in SYSTEMS:
            data[system] = measure(system)
            print(system, {row: data[system][row] for row in ROWS}, flush=True)
        DATA.write_text(json.dumps(data) + "\n")
    data = json.loads(DATA.read_text())
    for name, theme in THEMES.items():
        (IMAGES / f"comparison-{name}.svg").write_text(picture(data, theme))
    print(table(data))


if __name__ == "__main__":
    main()
