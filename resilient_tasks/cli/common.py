"""What all commands share: the app's runtime, names of breakers, and an unavailable broker."""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Concatenate, ParamSpec, TypeVar

import click
from celery import Celery
from click.shell_completion import CompletionItem

from resilient_tasks.breaker import this_user
from resilient_tasks.cli import Unavailable
from resilient_tasks.cli.display import printable
from resilient_tasks.core.model import ALL_KEYS, child_name, is_child, key_of, parent_of
from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.worker import seams
from resilient_tasks.worker.runtime import Runtime, find_runtime

P = ParamSpec("P")
R = TypeVar("R")

#: Names that the answer to an unknown one lists.
MOST_NAMED = 20


def pass_runtime(command: Callable[Concatenate[Runtime, P], R]) -> Callable[P, R]:
    """Give a command the runtime of the app that ``celery -A`` names, as its first argument."""

    @functools.wraps(command)
    def with_runtime(*args: P.args, **kwargs: P.kwargs) -> R:
        return command(runtime_in(click.get_current_context()), *args, **kwargs)

    return with_runtime


def runtime_in(ctx: click.Context) -> Runtime:
    """Return the runtime of the app that the command line names, with all breakers that its modules define.

    Raises:
        click.ClickException: the app has none.
    """
    return _runtime_of(ctx.obj.app)


@functools.lru_cache(maxsize=1)
def _runtime_of(app: Celery) -> Runtime:
    logging.getLogger("resilient_tasks").addHandler(logging.NullHandler())  # a command says itself what it did
    seams.import_task_modules(app)
    runtime = find_runtime(app)
    if runtime is None:
        raise click.ClickException(
            f"app {app.main!r} has no Resilience: name the app that has, as in celery -A proj breakers ..."
        )
    return runtime


def note(runtime: Runtime, breaker: str, text: str) -> None:
    """Log in the history of a breaker what this user has done to its tasks; without a store nothing is logged."""
    with suppress(StoreError):
        runtime.fleet.history.note(breaker, text, this_user())


class BreakerName(click.ParamType):  # type: ignore[type-arg]  # older releases of click know no argument
    """Name of a breaker that the app defines, or of a child of it: ``payments:acme``."""

    name = "breaker"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name; fail with the nearest one if it is not defined."""
        runtime = runtime_in(ctx or click.get_current_context())
        parent, key = parent_of(value), key_of(value)
        if parent is not None and parent in runtime.breakers and key and not is_child(value):
            return self.child(parent, key, param, ctx)
        if not runtime.defines(value):
            near = difflib.get_close_matches(value, runtime.breakers, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"defined: {_some(sorted(runtime.breakers))}"
            self.unknown(f"no breaker is named '{printable(value)}'; {hint}", param, ctx)
        return value

    def child(self, parent: str, key: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the name of the child for a key as typed."""
        if key == ALL_KEYS:
            self.fail(f"'{parent}:{ALL_KEYS}' means all children of {parent}: name one breaker", param, ctx)
        try:
            return child_name(parent, key)
        except ConfigurationError as error:
            self.fail(printable(str(error)), param, ctx)

    def unknown(self, message: str, param: click.Parameter | None, ctx: click.Context | None) -> None:
        """Handle a name that is not defined."""
        self.fail(message, param, ctx)

    def shell_complete(self, ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so; none if the app cannot be found: completion must not fail."""
        try:
            app = seams.app_named(ctx.find_root().params["app"])
            seams.import_task_modules(app)
            runtime = find_runtime(app)
        except Exception:  # noqa: BLE001 - importing the user's app may raise anything
            return []
        names = sorted(runtime.breakers) if runtime else []
        return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def _some(names: Sequence[str]) -> str:
    """Return names in one line, however many there are."""
    more = [f"and {len(names) - MOST_NAMED} more"] if len(names) > MOST_NAMED else []
    return ", ".join([*names[:MOST_NAMED], *more]) or "none"


class BreakerNames(BreakerName):
    """The same, or ``payments:*`` for all children of a breaker."""

    name = "breakers"

    def child(self, parent: str, key: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Let the wildcard pass for :func:`expand`."""
        return f"{parent}:{ALL_KEYS}" if key == ALL_KEYS else super().child(parent, key, param, ctx)


def expand(runtime: Runtime, names: Iterable[str]) -> list[str]:
    """Return the names, each once, with those of all children that there are now in place of wildcards."""
    found = dict[str, None]()
    for name in names:
        children = runtime.fleet.store.children(str(parent_of(name))) if key_of(name) == ALL_KEYS else [name]
        found.update(dict.fromkeys(sorted(children)))
    return list(found)


@contextmanager
def asking_the_broker(runtime: Runtime) -> Iterator[None]:
    """Turn an error of an unavailable broker into one line and an exit code."""
    try:
        yield
    except runtime.queues.errors as error:
        raise Unavailable(f"the broker is unavailable: {type(error).__name__}: {printable(str(error))}") from error
