"""What passes with which versions: one virtual environment and one run of the quick tests per row (`make matrix`).

A row pins what it names; pip chooses all else, the newest that fits. A row that pip cannot resolve and a Python that
is not installed are reported, and are no failures. Rows may be chosen: ``python -m tests.matrix 'redis-py 7'``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
LOWEST = re.compile(r"([\w-]+)(?:\[[\w,-]+\])?>=([\d.]+)")
DECLARED = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]\n\n")[0]
OLDEST = [f"{name}=={version}" for name, version in LOWEST.findall(DECLARED)]

#: Name: Python, pins.
ROWS: dict[str, tuple[str, list[str]]] = {
    "newest": (HERE, []),
    "Celery 5.6": (HERE, ["celery==5.6.*"]),
    "redis-py 7": (HERE, ["redis==7.*"]),
    "redis-py 6": (HERE, ["redis==6.*"]),
    "Flower 2.1": (HERE, ["flower==2.1.*"]),
    **{f"Python {version}": (version, []) for version in ("3.10", "3.12", "3.13", "3.14")},
    "oldest": ("3.10", [*OLDEST, "flower==2.1.0"]),
}
WITH = ["fakeredis[lua]", "gevent", "hypothesis", "psutil", "pytest", "pytest-timeout"]
UNIT = [f"tests/unit/test_{name}.py" for name in ("celery_internals", "kombu_internals", "flower", "flower_internals")]
#: The contract on a real server only; of the outages not the one that takes half a minute.
RUNS = [
    [*UNIT, "tests/contract", "-k", "not fakeredis and not cluster and not local"],
    [
        *("tests/integration/test_outage.py", "tests/integration/test_flower.py"),
        *("-m", "not chromium", "-k", "not gevent and not queue_without_workers"),
    ],
]
SHOWN = ("celery", "kombu", "redis", "flower")


def run(*command: str | Path) -> tuple[int, str]:
    """Return the exit code and the output of a program; it has ten minutes."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
        )
    except subprocess.TimeoutExpired as late:
        return 1, f"{late.stdout!r}\nno end within {late.timeout:g} s"
    return done.returncode, done.stdout


def check(python: str, pins: list[str], home: Path) -> tuple[str, str]:
    """Return versions and verdict of one row."""
    program = sys.executable if python == HERE else shutil.which(f"python{python}")
    if program is None or run(program, "-m", "venv", home)[0]:
        return "", f"no Python {python} here"
    own = home / "bin" / "python"
    pip = (own, "-m", "pip", "--disable-pip-version-check")
    code, said = run(*pip, "install", "--quiet", "--editable", ".[cli,demo,flower,metrics]", *WITH, *pins)
    if code:
        return "", "not installable: " + (re.findall(r"ERROR: (.*)", said) or said.splitlines()[-1:] or ["?"])[0]
    found = dict(line.split("==") for line in run(*pip, "freeze", "--exclude-editable")[1].splitlines() if "==" in line)
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    codes = set()
    for arguments in RUNS:
        code, said = run(own, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
        codes.add(code)
        for number, word in re.findall(r"(\d+) (passed|failed|error|skipped)", said[-200:]):
            counts[word] += int(number)
        if code:
            print(said, file=sys.stderr)
    verdict = ", ".join(f"{number} {word}" for word, number in counts.items() if number)
    return " | ".join(found.get(name, "-") for name in SHOWN), f"FAILED: {verdict}" if any(codes) else verdict


def main(names: list[str]) -> int:
    """Print the table as its rows come; 1 if one failed, or none passed."""
    print("| row | Python | " + " | ".join(SHOWN) + " | tests |\n|" + "---|" * (len(SHOWN) + 3))
    verdicts = []
    for name in names or ROWS:
        python, pins = ROWS[name]
        with tempfile.TemporaryDirectory() as home:
            versions, verdict = check(python, pins, Path(home))
        print(f"| {name} | {python} | {versions or ' | '.join('-' * len(SHOWN))} | {verdict} |", flush=True)
        verdicts.append(verdict)
    return int(any(each.startswith("FAILED") for each in verdicts) or not any("passed" in each for each in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
