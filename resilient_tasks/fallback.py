"""Fallbacks: what answers when a dependency cannot.

A task names one fallback or a list of them, and they are tried in order until one answers::

    @app.task(breaker=payments, fallback=[other_source, cached(max_age=3600), constant(0)])
    def balance(account_id): ...

- a function is called with the task's arguments; if it raises, the next one is tried;
- ``cached(...)`` is the last good value of this task for these arguments, kept in the shared store;
- ``constant(...)`` always answers.

The task layer makes one :class:`FallbackChain` per task when the task is defined.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from kombu import serialization
from kombu.utils import json as kombu_json

from resilient_tasks.call import Call, parameter_names
from resilient_tasks.errors import ConfigurationError, ResilienceError, StoreError
from resilient_tasks.store.base import Store

logger = logging.getLogger("resilient_tasks")

LARGEST_VALUE = 64 * 1024
"""Most bytes of JSON that ``cached`` keeps for one call."""

CacheKey = Callable[[tuple[Any, ...], dict[str, Any]], str]

_ALLOWED = "allowed are cached(max_age=...), constant(...), a function, or a list of these"
_VALUES = "fallback"


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


class Fallback(Protocol):
    """One link of a chain."""

    def check(self, task_name: str, parameters: Sequence[str]) -> None:
        """Raise ConfigurationError if this cannot work for a task with these parameters."""

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return an answer, or None to let the next one try."""


@dataclass(frozen=True, slots=True)
class Cached:
    """The last good value; made by :func:`cached`."""

    max_age: float
    key: str | CacheKey | None = None

    def check(self, task_name: str, parameters: Sequence[str]) -> None:
        """Refuse a ``max_age`` that is not a positive number and a ``key`` that names no parameter."""
        if not _is_positive_number(self.max_age):
            raise ConfigurationError(
                f"task {task_name!r}: fallback cached(max_age={self.max_age!r}): allowed is a positive number"
                " of seconds"
            )
        if self.key is not None and not callable(self.key) and self.key not in parameters:
            raise ConfigurationError(
                f"task {task_name!r}: fallback cached(key={self.key!r}): allowed is the name of a parameter,"
                f" one of {', '.join(parameters) or '(none)'}, or a callable (args, kwargs) -> str"
            )

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return the last good value if it is not older than ``max_age``."""
        key = self.key_of(call)
        found = None if key is None else _read_value(store, key)
        if found is None or found[1] > self.max_age:
            return None
        payload, age = found
        try:
            return Served(_decode(payload), "cached", age)
        except Exception:
            what = "Task %s[%s]: its last good value cannot be read"
            logger.exception(what, call.task_name, call.task_id, extra=call.log_fields)
            return None

    def key_of(self, call: Call) -> str | None:
        """Return the digest under which the value of ``call`` is kept; None: this call cannot be cached."""
        try:
            identity = self._identity(call)
            text = kombu_json.dumps([call.task_name, identity], sort_keys=True)
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


@dataclass(frozen=True, slots=True)
class Constant:
    """Always the same value; made by :func:`constant`."""

    value: Any

    def check(self, task_name: str, parameters: Sequence[str]) -> None:  # noqa: ARG002  the protocol's
        """Refuse a value that cannot become a task's result."""
        try:
            _encode(self.value)
        except Exception as error:
            raise ConfigurationError(
                f"task {task_name!r}: fallback constant({self.value!r}): allowed is a value that JSON can hold"
            ) from error

    def answer(self, call: Call, store: Store) -> Served:  # noqa: ARG002  the protocol's
        """Return the value; a copy, because a caller may change what it gets."""
        return Served(copy.deepcopy(self.value), "constant")


@dataclass(frozen=True, slots=True)
class Function:
    """A user's function as a fallback."""

    function: Callable[..., Any]

    def check(self, task_name: str, parameters: Sequence[str]) -> None:  # noqa: ARG002  the protocol's
        """Refuse coroutine functions: a task's body is synchronous and nothing would await them."""
        if _is_async(self.function):
            raise ConfigurationError(
                f"task {task_name!r}: fallback {self.name} is a coroutine function: allowed is a plain function"
            )

    def answer(self, call: Call, store: Store) -> Served | None:  # noqa: ARG002  the protocol's
        """Call the function with the task's arguments; an exception, or what JSON cannot hold, is no answer."""
        try:
            value = self.function(*call.args, **call.kwargs)
            _encode(value)
        except Exception as error:
            expected = isinstance(error, ResilienceError)  # its own breaker refused: no traceback per task
            fields = call.task_name, call.task_id, self.name, error
            logger.warning("Task %s[%s]: fallback %s: %r", *fields, exc_info=not expected, extra=call.log_fields)
            return None
        return Served(value, self.name)

    @property
    def name(self) -> str:
        """Name of the function, however it is wrapped."""
        function = _unwrapped(self.function)
        return str(getattr(function, "__name__", type(function).__name__))


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

    def __init__(self, task_name: str, members: Sequence[Fallback]) -> None:
        self.task_name = task_name
        self.members = tuple(members)
        self._warned = False

    def __bool__(self) -> bool:
        return bool(self.members)

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return the first answer, or None if no fallback has one. Raises nothing."""
        for member in self.members:
            served = member.answer(call, store)
            if served is not None:
                return served
        return None

    def remember(self, call: Call, value: Any, store: Store) -> None:
        """Keep a good value for the ``cached`` fallbacks of this chain. Raises nothing."""
        lifetimes = self._lifetimes(call)
        if not lifetimes:
            return
        encoded, fault = _encoded(value)
        if fault:
            self._warn_once(call, fault)
            return
        try:
            for key, max_age in lifetimes.items():
                store.put(_VALUES, key, encoded, ttl=max_age)
        except StoreError as error:
            logger.debug("last good value not kept: %s", error)

    def _lifetimes(self, call: Call) -> dict[str, float]:
        """Keys to write; fallbacks that differ in ``max_age`` only share the longest-lived entry."""
        lifetimes: dict[str, float] = {}
        for member in self.members:
            if isinstance(member, Cached) and (key := member.key_of(call)) is not None:
                lifetimes[key] = max(member.max_age, lifetimes.get(key, 0.0))
        return lifetimes

    def _warn_once(self, call: Call, why: str) -> None:
        if not self._warned:
            self._warned = True
            what = "Task %s[%s]: its result is not kept for cached(): %s"
            logger.warning(what, call.task_name, call.task_id, why, extra=call.log_fields)


def as_chain(fallback: Any, task_name: str, body: Callable[..., Any]) -> FallbackChain:
    """Make the chain that a task's ``fallback=`` describes; ``None`` makes an empty one.

    Args:
        fallback: ``cached(...)``, ``constant(...)``, a function, or a list or tuple of these.
        task_name: for messages and cache keys.
        body: the task's function, ``task.run``; a ``key=`` that names none of its parameters is found here.

    Raises:
        ConfigurationError: one of them is something else or cannot work; the message names the task.
    """
    if fallback is None:
        return FallbackChain(task_name, [])
    items = fallback if isinstance(fallback, (list, tuple)) else [fallback]
    members = [_as_member(item, task_name) for item in items]
    parameters = parameter_names(body)
    for member in members:
        member.check(task_name, parameters)
    return FallbackChain(task_name, members)


def _as_member(item: Any, task_name: str) -> Fallback:
    if isinstance(item, (Cached, Constant)):
        return item
    if item is cached or item is constant or not callable(item):
        raise ConfigurationError(f"task {task_name!r}: fallback={item!r}: {_ALLOWED}")
    return Function(item)


# --- small helpers --------------------------------------------------------------------------------


def _read_value(store: Store, key: str) -> tuple[bytes, float] | None:
    try:
        return store.get(_VALUES, key)
    except StoreError as error:
        logger.debug("last good value not read: %s", error)
        return None


def _encoded(value: Any) -> tuple[bytes, str]:
    """Return ``value`` as JSON, and what is wrong with that: an empty text if nothing is."""
    try:
        encoded = _encode(value)
    except Exception as error:  # noqa: BLE001  whatever a user's __json__ may raise
        return b"", f"JSON cannot hold it ({type(error).__name__})"
    if len(encoded) > LARGEST_VALUE:
        return b"", f"{len(encoded)} bytes are more than {LARGEST_VALUE}"
    return encoded, ""


def _encode(value: Any) -> bytes:
    _, _, payload = serialization.dumps(value, serializer="json")
    return payload if isinstance(payload, bytes) else str(payload).encode()


def _decode(payload: bytes) -> Any:
    return serialization.loads(payload, "application/json", "utf-8", accept={"application/json"})


def _is_positive_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _is_async(function: Callable[..., Any]) -> bool:
    function = _unwrapped(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _unwrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, partial):
        function = function.func
    return function
