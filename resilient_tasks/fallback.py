"""Fallbacks: what answers when a dependency cannot.

A task names one fallback or a list of them, and they are tried in order until one answers::

    @app.task(breaker=payments, fallback=[other_source, cached(max_age=3600), constant(0)])
    def balance(account_id): ...

- a function is called with the task's arguments; if it raises, the next one is tried;
- ``cached(...)`` is the last good value of this task for these arguments, kept in the shared store;
- ``constant(...)`` always answers.

The task layer makes one :class:`FallbackChain` per task when the task is defined. Where a result came from is kept
beside it as its :class:`Provenance`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from kombu import serialization
from kombu.utils import json as kombu_json

from resilient_tasks.call import Call, parameter_names
from resilient_tasks.errors import ConfigurationError, ResilienceError, StoreError
from resilient_tasks.store.base import Store
from resilient_tasks.validation import PositiveSeconds, check

logger = logging.getLogger("resilient_tasks")

LARGEST_VALUE = 64 * 1024  # bytes of JSON that ``cached`` keeps for one call

CacheKey = Callable[[tuple[Any, ...], dict[str, Any]], str]

_ALLOWED = "allowed are cached(max_age=...), constant(...), a function, or a list of these"
_VALUES, _PROVENANCE = "fallback", "provenance"  # kinds of values in the store


@dataclass(frozen=True, slots=True)
class Served:
    """A fallback's answer. ``None`` is a legitimate ``value``.

    Args:
        value: what the task returns.
        source: ``"cached"``, ``"constant"`` or the function's name.
        age: seconds since a cached value was good; ``None`` for other sources.
    """

    value: Any
    source: str
    age: float | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same value; made by :func:`constant`."""

    value: Any


@dataclass(frozen=True, slots=True)
class Cached:
    """The last good value; made by :func:`cached`."""

    max_age: float
    key: str | CacheKey | None = None

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return the last good value if it is not older than ``max_age``."""
        key = self.key_of(call)
        try:
            found = None if key is None else store.get(_VALUES, key)
        except StoreError as error:
            logger.debug("last good value not read: %s", error, extra=call.log_fields)
            return None
        if found is None or found[1] > self.max_age:
            return None
        payload, age = found
        try:
            value = serialization.loads(payload, "application/json", "utf-8", accept={"application/json"})
        except Exception:
            what = "Task %s[%s]: its last good value cannot be read"
            logger.exception(what, call.task_name, call.task_id, extra=call.log_fields)
            return None
        return Served(value, "cached", age)

    def key_of(self, call: Call) -> str | None:
        """Return the digest under which the value of ``call`` is kept; None: this call cannot be cached."""
        try:
            text = kombu_json.dumps([call.task_name, self._identity(call)], sort_keys=True)
        except Exception as error:  # noqa: BLE001  users' key functions, and arguments that JSON cannot hold
            what = "Task %s[%s]: this call cannot be cached: %r"
            logger.warning(what, call.task_name, call.task_id, error, extra=call.log_fields)
            return None
        return hashlib.sha256(text.encode()).hexdigest()

    def _identity(self, call: Call) -> Any:
        if callable(self.key):
            key = self.key(tuple(call.args), dict(call.kwargs))
            if not isinstance(key, str):
                raise TypeError(f"cached(key=...) returned {key!r}: allowed is a str")
            return key
        arguments = call.arguments()
        return arguments if self.key is None else arguments[self.key]


def cached(max_age: float, key: str | CacheKey | None = None) -> Cached:
    """Answer with the task's last good value for the same arguments.

    Every success of the task is kept in the shared store as JSON for ``max_age`` seconds, if it takes at
    most 64 KiB. The store's memory is bounded by that and by the number of different calls in ``max_age``.

    Args:
        max_age: seconds for which a value is good enough.
        key: what identifies a call; default all arguments. The name of a parameter, or a callable
            ``(args, kwargs) -> str``.
    """
    return Cached(max_age, key)


def constant(value: Any) -> Constant:
    """Answer with ``value``, which must be something that JSON can hold."""
    return Constant(value)


class FallbackChain:
    """The fallbacks of one task, tried in order. Empty chains are false."""

    def __init__(self, members: Sequence[Cached | Constant | Callable[..., Any]]) -> None:
        self._members = members
        self._has_warned = False

    def __bool__(self) -> bool:
        return bool(self._members)

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return the first answer, or None if no fallback has one. Raises nothing."""
        for member in self._members:
            if isinstance(member, Constant):
                return Served(copy.deepcopy(member.value), "constant")  # a caller may change what it gets
            served = member.answer(call, store) if isinstance(member, Cached) else _called(member, call)
            if served is not None:
                return served
        return None

    def remember(self, call: Call, value: Any, store: Store) -> None:
        """Keep a good value for the ``cached`` fallbacks of this chain. Raises nothing."""
        lifetimes: dict[str, float] = {}  # fallbacks that differ in ``max_age`` only share the longest-lived entry
        for member in self._members:
            if isinstance(member, Cached) and (key := member.key_of(call)) is not None:
                lifetimes[key] = max(member.max_age, lifetimes.get(key, 0.0))
        if not lifetimes:
            return
        try:
            encoded = _encode(value)
        except Exception as error:  # noqa: BLE001  whatever a user's __json__ may raise
            self._warn_once(call, f"JSON cannot hold it ({type(error).__name__})")
            return
        if len(encoded) > LARGEST_VALUE:
            self._warn_once(call, f"{len(encoded)} bytes are more than {LARGEST_VALUE}")
            return
        try:
            for key, max_age in lifetimes.items():
                store.put(_VALUES, key, encoded, ttl=max_age)
        except StoreError as error:
            logger.debug("last good value not kept: %s", error)

    def _warn_once(self, call: Call, why: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            what = "Task %s[%s]: its result is not kept for cached(): %s"
            logger.warning(what, call.task_name, call.task_id, why, extra=call.log_fields)


def _called(function: Callable[..., Any], call: Call) -> Served | None:
    """Call a function with the task's arguments; an exception, or what JSON cannot hold, is no answer."""
    name = str(getattr(_unwrapped(function), "__name__", type(_unwrapped(function)).__name__))
    try:
        value = function(*call.args, **call.kwargs)
        _encode(value)
    except Exception as error:
        is_expected = isinstance(error, ResilienceError)  # its own breaker refused: no traceback per task
        fields = call.task_name, call.task_id, name, error
        logger.warning("Task %s[%s]: fallback %s: %r", *fields, exc_info=not is_expected, extra=call.log_fields)
        return None
    return Served(value, name)


def as_chain(fallback: Any, task_name: str, body: Callable[..., Any]) -> FallbackChain:
    """Make the chain that a task's ``fallback=`` describes; ``None`` makes an empty one.

    What cannot work for the task with this ``body`` raises ConfigurationError.
    """
    items = [] if fallback is None else fallback if isinstance(fallback, (list, tuple)) else [fallback]
    for item in items:
        _check(item, f"task {task_name!r}: fallback", parameter_names(body))
    return FallbackChain(tuple(items))


def _check(item: Any, subject: str, parameters: Sequence[str]) -> None:
    if isinstance(item, Cached):
        check(f"{subject} cached: ", "max_age", PositiveSeconds, item.max_age)
        if item.key is not None and not callable(item.key) and item.key not in parameters:
            raise ConfigurationError(
                f"{subject} cached(key={item.key!r}): allowed is the name of a parameter,"
                f" one of {', '.join(parameters) or '(none)'}, or a callable (args, kwargs) -> str"
            )
    elif isinstance(item, Constant):
        try:
            _encode(item.value)
        except Exception as error:
            raise ConfigurationError(
                f"{subject} constant({item.value!r}): allowed is a value that JSON can hold"
            ) from error
    elif item is cached or item is constant or not callable(item):
        raise ConfigurationError(f"{subject}={item!r}: {_ALLOWED}")
    else:
        function = _unwrapped(item)
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise ConfigurationError(f"{subject} {item!r} is a coroutine function: allowed is a plain function")


def _encode(value: Any) -> bytes:
    _, _, payload = serialization.dumps(value, serializer="json")
    return payload if isinstance(payload, bytes) else str(payload).encode()


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, partial):
        function = function.func
    return function


# --- where a result came from ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a task's result came from when a fallback made it.

    Args:
        source: ``"cached"``, ``"constant"`` or the function's name.
        age: seconds since a cached value was good when it was served, else ``None``.
        breaker: name of the breaker whose refusal or failure called for the fallback.
    """

    source: str
    age: float | None
    breaker: str


def write_provenance(store: Store, task_id: str, served: Served, breaker: str, ttl: float) -> None:
    """Note for ``ttl`` seconds where the result of ``task_id`` came from. Raises nothing."""
    note = {"source": served.source, "age": served.age, "breaker": breaker}
    try:
        store.put(_PROVENANCE, task_id, json.dumps(note).encode(), ttl=ttl)
    except StoreError as error:
        logger.debug("provenance not kept: %s", error)


def read_provenance(store: Store, task_id: str) -> Provenance | None:
    """Return where the result of ``task_id`` came from; None: from the task itself, or not known (any more).

    Raises:
        StoreError: the store is unavailable.
    """
    found = store.get(_PROVENANCE, task_id)
    return None if found is None else Provenance(**json.loads(found[0]))
