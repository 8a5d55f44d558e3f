"""Programs of a stack: readiness, logs, and above all that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from workers.processes import (
    StartError,
    free_port,
    is_recorded_alive,
    start_program,
    start_valkey,
    stop_recorded,
    wait_until,
)
from workers.stack import start_service

PARENT_AND_CHILD = """
import os, signal, sys, time
if os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(f"child {os.getpid()} is up", flush=True)
time.sleep(60)
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; a zombie has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state == "Z"


def test_a_program_that_ends_early_is_reported_with_its_last_output(tmp_path: Path) -> None:
    program = start_program(python("raise SystemExit('no such port')"), name="p", directory=tmp_path)
    with pytest.raises(StartError, match=r"p ended with 1\nno such port"):
        program.wait_for_output("ready")


def test_a_program_that_stays_silent_is_killed(tmp_path: Path) -> None:
    program = start_program(python("import time; time.sleep(60)"), name="p", directory=tmp_path)
    with pytest.raises(StartError, match="still waiting for: p to be ready"):
        program.wait_for_output("ready", timeout=0.1)
    assert not program.running


def test_output_of_an_earlier_run_does_not_count(tmp_path: Path) -> None:
    for word in ("first", "second"):
        program = start_program(python("import sys; print(sys.argv[1])", word), name="p", directory=tmp_path)
        program.popen.wait(60)
        assert program.output() == f"{word}\n"
    assert program.log.read_text() == "first\nsecond\n"


def test_stopping_takes_stubborn_children_along(tmp_path: Path) -> None:
    program = start_program(python(PARENT_AND_CHILD), name="p", directory=tmp_path)
    program.wait_for_output("is up")
    child = int(program.output().split()[1])
    assert program.stop() == -signal.SIGTERM
    wait_until(lambda: is_gone(child), what="the child to be gone")


def test_a_record_shows_whether_its_program_lives(tmp_path: Path) -> None:
    record = tmp_path / "p.pid"
    assert not is_recorded_alive(record)
    program = start_program(python("import time; time.sleep(60)"), name="p", directory=tmp_path, detached=True)
    assert is_recorded_alive(record)
    assert stop_recorded(record) == ["p"]
    assert program.popen.wait(60) == -signal.SIGTERM
    assert not record.exists()


def test_a_stale_record_with_the_id_of_an_innocent_process_does_no_harm(tmp_path: Path) -> None:
    record = tmp_path / "p.pid"
    record.write_text(str(os.getpid()))
    assert stop_recorded(record) == []
    assert not record.exists()


def test_a_frozen_program_is_killed_when_it_does_not_end(tmp_path: Path) -> None:
    program = start_program(python("import time; time.sleep(60)"), name="p", directory=tmp_path)
    program.freeze()
    assert stop_recorded(tmp_path / "p.pid", timeout=0.1) == ["p"]
    assert program.popen.wait(60) < 0  # by SIGKILL, or by the SIGTERM that it got before


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals children that their parent has ended")
def test_no_program_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from workers.processes import start_program
start_program([sys.executable, "-c", "import time; time.sleep(60)"], name="p", directory=Path({str(tmp_path)!r}))
print("started", flush=True)
time.sleep(60)
"""
    with subprocess.Popen(python(code), stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"started\n"
        assert is_recorded_alive(tmp_path / "p.pid")
        parent.kill()
    wait_until(lambda: not is_recorded_alive(tmp_path / "p.pid"), what="the orphan to be killed")


def test_a_server_comes_back_on_its_port_with_its_data(tmp_path: Path) -> None:
    server = start_valkey(tmp_path, persistent=True)
    redis.Redis.from_url(server.url()).set("key", "value")
    server.program.kill()
    again = start_valkey(tmp_path, port=server.port, persistent=True)
    assert redis.Redis.from_url(again.url()).get("key") == b"value"
    assert again.stop() == 0


def test_free_ports_lie_below_those_of_outgoing_connections() -> None:
    assert all(10_000 < free_port() < 32_768 for _ in range(20))


def test_the_flaky_service_runs_as_a_program(tmp_path: Path) -> None:
    service = start_service(tmp_path)
    service.make("mail", "hang", latency=0.5)
    state = service.stats()["mail"]
    assert (state["health"], state["latency"]) == ("hang", 0.5)
    assert service.environment["MAIL_URL"].endswith(f":{service.ports['mail']}/mail")
    assert service.program.stop() == 0
