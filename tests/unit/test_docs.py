"""The manual: its site builds without a broken link, and every snippet in it can be read by what it is meant for."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS: dict[str, Callable[[str], object]] = {
    "python": lambda text: compile(text, "page", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT),
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "json": json.loads,
}


def snippets() -> Iterator[tuple[str, str, str]]:
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+).*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            yield page.name, language, text


def test_every_snippet_can_be_parsed() -> None:
    for page, language, text in snippets():
        if language in PARSERS:
            try:
                PARSERS[language](text)
            except (SyntaxError, ValueError, yaml.YAMLError) as error:
                pytest.fail(f"{page}: {error}\n{text}")


def test_the_readme_links_to_the_site_not_to_files() -> None:
    links = re.findall(r"\]\(([^)]*)\)|(?:src|srcset|href)=\"([^\"]*)\"", PAGES[0].read_text())
    assert all(link.startswith("https://") for pair in links for link in pair if link)


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
