"""The scripts as texts: they describe themselves, and keep the habits that numbers in Lua ask for."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from resilient_tasks.store.server import Script, script_names

PACKAGE = resources.files("resilient_tasks.store")
FOLDER = PACKAGE / "lua"
METHODS = script_names()
LIBRARIES = sorted(file.name.removesuffix(".lua") for file in (FOLDER / "lib").iterdir())
TEXTS = {name: (FOLDER / f"{name}.lua").read_text("utf-8") for name in METHODS}
TEXTS.update({name: (FOLDER / "lib" / f"{name}.lua").read_text("utf-8") for name in LIBRARIES})


def code_of(text: str) -> str:
    return re.sub(r"--.*", "", text)


def header_of(text: str) -> list[str]:
    return [line for line in text.split("\n\n", maxsplit=1)[0].splitlines() if line.startswith("--")]


def test_every_script_is_used() -> None:
    modules = "\n".join((PACKAGE / f"{name}.py").read_text("utf-8") for name in ("redis", "ledger", "server"))
    run = set(re.findall(r"\b(?:_run|script|script_each)\(\s*\"(\w+)\"", modules))
    assert sorted(run) == METHODS


def test_a_script_follows_what_it_needs_each_once() -> None:
    text = Script.load("lease").text
    at = [text.index(part) for part in map(TEXTS.__getitem__, ("now", "breaker", "lease"))]
    assert at == sorted(at)
    assert all(text.count(TEXTS[library]) == 1 for library in LIBRARIES)


def test_no_library_is_left_over() -> None:
    needed = {name for text in TEXTS.values() for name in re.findall(r"-- Needs (\w+)\.lua\n", text)}
    assert needed == {*LIBRARIES} - {"now"}


@pytest.mark.parametrize("name", METHODS)
def test_the_header_reads_like_a_signature(name: str) -> None:
    header = header_of(TEXTS[name])
    assert re.fullmatch(rf"-- {name}\(.*\) -> .+", header[0])
    text = "\n".join(header)
    delegated = "see breaker.lua" in text
    code = code_of(TEXTS[name])
    for what in ("KEYS", "ARGV"):
        used = {int(number) for number in re.findall(rf"{what}\[(\d+)\]", code)}
        described = {int(number) for number in re.findall(rf"-- (?:{what})?\s+(\d+)(?:\.\.)? ", section(header, what))}
        assert used <= described or (delegated and used <= described | {1, 2, 3, 4}), what


def section(header: list[str], what: str) -> str:
    """Return the lines of a header that describe KEYS or ARGV."""
    lines, inside = [], False
    for line in header:
        if re.match(r"-- [A-Z]", line):
            inside = line.startswith(f"-- {what}")
        lines += [line] if inside else []
    return "\n".join(lines)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_timestamps_keep_all_their_digits(name: str) -> None:
    """``tostring`` has 14 digits; a float that is returned loses its fraction."""
    assert "tostring(" not in code_of(TEXTS[name])


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_the_only_clock_is_the_servers(name: str) -> None:
    assert name == "now" or "'TIME'" not in code_of(TEXTS[name])


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_lines_and_functions_are_short(name: str) -> None:
    lines = TEXTS[name].splitlines()
    assert max(map(len, lines)) <= 120
    functions = re.findall(r"^local function.*?^end", TEXTS[name], re.DOTALL | re.MULTILINE)
    assert max((len(function.splitlines()) for function in functions), default=0) <= 20


def test_another_clock_takes_the_place_of_the_servers() -> None:
    script = Script.load("time", clock="local function now_ms() return 5 end")
    assert "TIME'" not in script.text
    assert script.text.startswith("local function now_ms() return 5 end")
