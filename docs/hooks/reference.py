"""Tables of the reference, made from the code when the site is built: ``<!-- generated: policy -->`` in a page."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import click

from resilient_tasks import errors, prometheus, signals
from resilient_tasks.cli import breakers
from resilient_tasks.monitor import events
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.settings import PREFIX, Settings
from resilient_tasks.validation import _allowed
from resilient_tasks.worker.definitions import OPTIONS
from resilient_tasks.worker.task import ResilientTask

TRANSITION = "those of a transition"
#: Events that are no transition: when they are sent, and their fields.
EVENTS = {
    events.BREAKER_WOULD_OPEN: ("a breaker in `SHADOW` would have opened", TRANSITION),
    events.BREAKER_SUSPECT: ("a call of the breaker is late in this worker", "`breaker`"),
    events.SLOT_ADDED: (
        "the worker added a spare slot, because late calls hold all others",
        "`slots`, `spare`, `reason`",
    ),
    events.SLOT_REMOVED: ("it took the slot back", "`slots`, `spare`, `reason`"),
    events.QUEUE_BLOCKED: ('`overflow="block"`: the worker stopped consuming a queue', "`queue`"),
    events.QUEUE_UNBLOCKED: ("it consumes the queue again", "`queue`"),
    events.TASK_DEFERRED: ("a task was deferred", "`uuid`, `breaker`, `since`, `reason`"),
    events.TASK_FALLBACK: ("a fallback has answered", "`uuid`, `breaker`, `source`, `age`"),
    events.TASK_IGNORED: ("a later task with the same `coalesce_key` has replaced a waiting one", "`uuid`"),
    events.TASK_RESUMED: ("a task is on its way back to its queue", "`uuid`"),
}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the tables in; a name that is not known fails the build."""
    return re.sub(r"<!-- generated: (\w+) -->", lambda mark: "\n".join(GENERATORS[mark[1]]()), markdown)


def plain(docstring: str) -> str:
    """Return Markdown for what our docstrings are written in."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", " ".join(docstring.split()))
    return text.replace("``", "`").replace("|", r"\|")


def arguments(owner: Any) -> dict[str, str]:
    """Return the entries of a docstring's ``Args:``."""
    _, _, rest = (inspect.getdoc(owner) or "").partition("Args:\n")
    section = re.split(r"\n\n", rest)[0]
    return {name: plain(text) for name, text in re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)}


def table(*header: str, rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Yield the lines of a table."""
    yield f"| {' | '.join(header)} |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def shown(value: Any) -> str:
    """Return a default as a table shows it."""
    return "none" if value in (None, (), {}) else f"`{getattr(value, '__name__', None) or repr(value)}`"


def policy() -> Iterator[str]:
    """All fields of ``BreakerPolicy``."""
    texts, kinds = arguments(BreakerPolicy), get_type_hints(BreakerPolicy, include_extras=True)
    rows = [
        (
            f"`{each.name}`",
            shown(each.default),
            re.sub(r"^\*\w+\.\* ", "", texts[each.name]),
            _allowed(kinds[each.name]),
        )
        for each in fields(BreakerPolicy)
    ]
    return table("field", "default", "meaning", "allowed", rows=rows)


def task_options() -> Iterator[str]:
    """All options of a task."""
    texts = arguments(ResilientTask)
    if texts.keys() != OPTIONS:
        raise ValueError(f"options without a text, or the other way round: {texts.keys() ^ OPTIONS}")
    return table("option", "meaning", rows=[(f"`{name}`", text) for name, text in texts.items()])


def settings() -> Iterator[str]:
    """All variables of the environment."""
    texts = arguments(Settings)
    rows = [
        (
            f"`{PREFIX}{name.upper()}`",
            shown(None if name == "breakers" else field.default),
            texts[name],
            field.description,
        )
        for name, field in Settings.model_fields.items()
    ]
    return table("variable", "default", "meaning", "allowed", rows=rows)


def commands(group: Any = breakers, path: str = "") -> Iterator[str]:
    """All commands, with their help and options."""
    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
            continue
        context = click.Context(command, info_name=name)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        yield f"\n### {path}{name}\n\n`celery -A proj breakers {path}{usage}`\n"
        yield "\n\n".join(map(plain, inspect.cleandoc(command.help or "").split("\n\n"))) + "\n"
        records = [option.get_help_record(context) for option in command.params if isinstance(option, click.Option)]
        if records:
            yield from table("option", "", rows=[(f"`{record[0]}`", plain(record[1])) for record in records if record])


def metrics() -> Iterator[str]:
    """All metrics."""
    rows = [(f"`{name}`", "none", text) for name, text in prometheus.HEALTH.items()]
    rows += [
        (f"`{each.name}`", ", ".join(f"`{label}`" for label in ("breaker", *each.labels)), each.text)
        for each in prometheus.METRICS
    ]
    return table("metric", "labels", "", rows=rows)


def celery_events() -> Iterator[str]:
    """All events."""
    known = {
        value for name, value in vars(events).items() if name.isupper() and isinstance(value, str) and "-" in value
    }
    if known != EVENTS.keys():
        raise ValueError(f"events without a text, or the other way round: {known ^ EVENTS.keys()}")
    transitions = [
        (f"`{name}`", f"a breaker became `{state}`", TRANSITION) for state, name in events._EVENT_OF_STATE.items()
    ]
    rows = transitions + [(f"`{name}`", when, sent) for name, (when, sent) in EVENTS.items()]
    return table("event", "when", "fields", rows=rows)


def celery_signals() -> Iterator[str]:
    """All signals, with the comments above them."""
    source = Path(signals.__file__).read_text("utf-8")
    texts = {name: plain(text) for text, name in re.findall(r"^#: (.*)\n(\w+) = Signal", source, re.MULTILINE)}
    return table(
        "signal", "when, and what receivers get", rows=[(f"`{name}`", texts[name]) for name in signals.__all__]
    )


def error_classes() -> Iterator[str]:
    """All errors."""
    for error in vars(errors).values():
        if inspect.isclass(error) and error.__module__ == errors.__name__:
            bases = ", ".join(f"`{base.__name__}`" for base in error.__bases__)
            text = (inspect.getdoc(error) or "").partition("Args:")[0]
            yield f"\n### {error.__name__}\n\n{plain(text)} Derived from {bases}.\n"
            if attributes := arguments(error):
                yield from table("attribute", "", rows=[(f"`{name}`", what) for name, what in attributes.items()])


GENERATORS: dict[str, Callable[[], Iterator[str]]] = {
    "policy": policy,
    "task_options": task_options,
    "settings": settings,
    "commands": commands,
    "metrics": metrics,
    "events": celery_events,
    "signals": celery_signals,
    "errors": error_classes,
}
