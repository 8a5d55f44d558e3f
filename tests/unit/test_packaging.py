"""What a user installs: the package with its Lua scripts and type marker, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "resilient_tasks"

#: Refuses the modules named in argv, as if they were not installed, then uses what needs no extra.
BARE = """
import sys
absent = set(sys.argv[1:])
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import resilient_tasks, resilient_tasks.checks, resilient_tasks.cli, resilient_tasks.signals, resilient_tasks.testing
for name in resilient_tasks.__all__:
    getattr(resilient_tasks, name)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_every_source_file_script_page_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    patterns = ("*.py", "*.lua", "*.html", "*.js", "*.css", "*.yml", "*.json", "py.typed")
    wanted = {str(path.relative_to(ROOT)) for pattern in patterns for path in PACKAGE.rglob(pattern)}
    assert "resilient_tasks/py.typed" in wanted
    assert wanted <= set(wheel.namelist())


def test_the_wheel_holds_nothing_but_the_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert tops - info == {"resilient_tasks"}
    assert len(info) == 1


def read_metadata(wheel: zipfile.ZipFile) -> bytes:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return wheel.read(name)


def installed_with(requirements: Iterable[str], extras: Iterable[str] = ("",)) -> set[str]:
    """Return the distributions that these requirements bring, those of their requirements among them."""
    brought: set[str] = set()
    for each in map(Requirement, requirements):
        if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras):
            brought |= {canonicalize_name(each.name)}
            brought |= installed_with(requires(each.name) or (), ("", *each.extras))
    return brought


def test_a_bare_install_works_with_what_it_brings(wheel: zipfile.ZipFile) -> None:
    brought = installed_with(message_from_bytes(read_metadata(wheel)).get_all("Requires-Dist") or ())
    absent = [
        module
        for module, distributions in packages_distributions().items()
        if brought.isdisjoint(map(canonicalize_name, distributions)) and module != "resilient_tasks"
    ]
    assert {"flower", "rich", "prometheus_client"} <= set(absent)
    ran = subprocess.run([sys.executable, "-c", BARE, *absent], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_the_wheel_says_what_it_needs(wheel: zipfile.ZipFile) -> None:
    metadata = read_metadata(wheel).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "License-Expression: MIT" in metadata
    required = {
        Requirement(line.partition(": ")[2]).name
        for line in metadata.splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    }
    assert required == {"celery", "click", "click-didyoumean", "kombu", "pydantic-settings", "redis", "tenacity"}


def test_the_wheel_brings_celery_a_command(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "[celery.commands]\nbreakers = resilient_tasks.cli:breakers" in wheel.read(name).decode()
