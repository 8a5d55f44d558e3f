"""Running a program under a time limit; when time is up it is killed with all that it has started."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence


def run_program(command: Sequence[str], timeout: float, *, wants_output: bool = False) -> tuple[int, str]:
    """Run a program without a shell, input or error output; return its exit code and, if wanted, what it wrote.

    Raises:
        TimeoutError: it has not ended within ``timeout`` seconds.
        OSError: it cannot be started.
    """
    with subprocess.Popen(  # noqa: S603 - no shell, and the user's own program or ours
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if wants_output else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise TimeoutError from error
    return process.returncode, output or ""
