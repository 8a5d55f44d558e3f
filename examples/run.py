"""Start an example with all that it needs: ``python -m examples.run django`` or ``fastapi``; Ctrl-C stops it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from examples.service import Service
from workers.processes import (
    PROJECT,
    Program,
    accepts_connections,
    free_port,
    start_beat,
    start_program,
    start_valkey,
    start_worker,
)

EXAMPLES = {"django": "proj", "fastapi": "app"}  # directory, and what ``celery -A`` takes
TRY = {
    "django": ("curl {site}checkout", "curl -X POST {site}orders/1", "curl -X POST {site}orders/2/now"),
    "fastapi": (
        "curl {site}summaries -H 'Content-Type: application/json' -d '{{\"text\": \"a long story\"}}' -i",
        "curl {site}summaries/later -H 'Content-Type: application/json' -d '{{\"text\": \"a long story\"}}'",
    ),
}


class Project:
    """A project in a directory, its Valkey server, and its processes."""

    def __init__(self, root: Path, directory: Path, service: Service, app: str) -> None:
        self.root, self.directory, self.service, self.app = root, directory, service, app
        self.server = start_valkey(directory / "valkey")
        self.env = {
            "BROKER_URL": self.server.url(0),
            "SERVICE_URL": service.url,
            "DIRECTORY": str(directory),
            "PYTHONPATH": f"{root}:{PROJECT}",
        }
        self._programs: list[Program] = [self.server.program]
        self.is_django = (root / "manage.py").exists()
        if self.is_django:
            self.env["DJANGO_SETTINGS_MODULE"] = "proj.settings"
            self.run("-m", "django", "migrate", "-v0", "--run-syncdb")

    def run(self, *arguments: str) -> str:
        """Run Python with these arguments and return what it writes."""
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.root, env={**os.environ, **self.env}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout + done.stderr

    def worker(self, *arguments: str) -> Program:
        """Start a worker and wait until it consumes."""
        worker = start_worker(
            self.app, name="worker", arguments=["--without-mingle", *arguments],
            directory=self.directory, env=self.env, cwd=self.root,
        )  # fmt: skip
        self._programs.append(worker)
        return worker.wait_until_ready()

    def beat(self) -> Program:
        """Start beat."""
        self._programs.append(start_beat(self.app, directory=self.directory, env=self.env, cwd=self.root))
        return self._programs[-1]

    def website(self) -> str:
        """Start the website, wait until it answers, and return its address."""
        port = free_port()
        django = ["django", "runserver", "--noreload", f"127.0.0.1:{port}"]
        command = django if self.is_django else ["uvicorn", "app:api", "--port", str(port)]
        site = start_program(
            [sys.executable, "-m", *command], name="site", directory=self.directory, env=self.env, cwd=self.root
        )
        self._programs.append(site)
        site.wait_ready(lambda: accepts_connections(port))
        return f"http://127.0.0.1:{port}/"

    def close(self) -> None:
        """Stop everything."""
        for program in reversed(self._programs):
            program.stop()


def main() -> None:
    """Start the example that the command line names, and wait for Ctrl-C."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in EXAMPLES:
        sys.exit(f"example {name!r}: allowed is {' or '.join(EXAMPLES)}")
    with tempfile.TemporaryDirectory() as directory:
        service = Service()
        project = Project(Path(__file__).parent / name, Path(directory), service, EXAMPLES[name])
        try:
            project.worker()
            site = project.website()
            print("\n".join(["It runs. Try:", *(f"  {line.format(site=site)}" for line in TRY[name])]))
            print(f"Make its dependency ill, and well again:\n  curl -X PUT {service.url} -d '{{\"status\": 503}}'")
            print(f"  curl -X PUT {service.url} -d '{{\"status\": 200}}'\nSee its breakers:")
            settings = " ".join(f"{variable}={value}" for variable, value in project.env.items())
            print(f"  {settings} {sys.executable} -m celery -A {project.app} breakers watch")
            print("Ctrl-C stops it.", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            pass
        finally:
            project.close()
            service.close()


if __name__ == "__main__":
    main()
