"""The Lua scripts of the ``lua`` folder: each put together with what it needs of ``lua/lib``, and run by its digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import cache, partial
from importlib import resources
from typing import Any

import redis
from redis.exceptions import NoScriptError

from resilient_tasks.store.server import Argument, Server, portions

_FOLDER = resources.files("resilient_tasks.store") / "lua"
_NEEDS = re.compile(r"^-- Needs (\w+)\.lua$", re.MULTILINE)

Call = tuple[Sequence[str], Sequence[Argument]]  # keys and arguments


def script_names() -> list[str]:
    """Return the names of all scripts."""
    return sorted(file.name.removesuffix(".lua") for file in _FOLDER.iterdir() if file.name.endswith(".lua"))


@cache
def _read(*path: str) -> str:
    return _FOLDER.joinpath(*path).read_text("utf-8")


def _needed_by(text: str) -> dict[str, str]:
    """Return the texts of the libraries that a text needs, by name, each behind those that it needs itself."""
    needed: dict[str, str] = {}
    for name in _NEEDS.findall(text):
        library = _read("lib", f"{name}.lua")
        needed.update({**_needed_by(library), name: library})
    return needed


class Script:
    """A Lua script, run by its digest; a server that does not know it, or no longer, gets its text."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    @classmethod
    @cache
    def load(cls, name: str, clock: str | None = None) -> Script:
        """Return a script of the ``lua`` folder, behind the clock and the libraries that it names as needed.

        Args:
            name: of the file, without ``.lua``.
            clock: Lua text that defines ``now_ms()``; ``None``: the server's time.
        """
        text = _read(f"{name}.lua")
        return cls("\n".join([clock or _read("lib", "now.lua"), *_needed_by(text).values(), text]))

    def __call__(self, client: redis.Redis, keys: Sequence[str], *args: Argument) -> Any:
        """Run it in one round trip; two if the server has to be given the text first."""
        try:
            return self._by_digest(client, keys, args)
        except NoScriptError:
            return client.eval(self.text, len(keys), *keys, *args)

    def each(self, client: redis.Redis, calls: Sequence[Call]) -> list[Any]:
        """Run it for each of several calls, all in one round trip. For scripts that may run twice."""
        replies = self._pipelined(client, calls)
        if any(isinstance(reply, NoScriptError) for reply in replies):
            client.script_load(self.text)
            replies = self._pipelined(client, calls)
        for reply in replies:
            if isinstance(reply, Exception):
                raise reply
        return replies

    def _pipelined(self, client: redis.Redis, calls: Sequence[Call]) -> list[Any]:
        with client.pipeline(transaction=False) as pipeline:
            for keys, args in calls:
                self._by_digest(pipeline, keys, args)
            return pipeline.execute(raise_on_error=False)

    def _by_digest(self, client: redis.Redis, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        # not evalsha(): the pipeline of a cluster's client has no method of that name
        return client.execute_command("EVALSHA", self.digest, len(keys), *keys, *args)


class Scripts:
    """All scripts, on one server. Every method may raise ``StoreError``; see :meth:`Server.run`.

    Args:
        server: where they run.
        clock: as for :meth:`Script.load`; for tests that advance the time.
    """

    def __init__(self, server: Server, clock: str | None = None) -> None:
        self._server = server
        # all at once: a deploy may replace the files while this process lives
        self._scripts = {name: Script.load(name, clock) for name in script_names()}

    def run(self, name: str, keys: Sequence[str], *args: Argument) -> Any:
        """Run a script and return its reply."""
        return self._server.run(lambda client: self._scripts[name](client, keys, *args))

    def run_each(self, name: str, calls: Iterable[Call]) -> list[Any]:
        """Run a script that may run twice for each of several calls, 500 in one round trip."""
        script = self._scripts[name]
        return [reply for some in portions(calls) for reply in self._server.run(partial(script.each, calls=some))]
