"""Calls of a task, and fallbacks: what answers when a dependency cannot.

A task names one fallback or a list of them, and they are tried in order until one answers::

    @app.task(breaker=payments, fallback=[other_source, cached(max_age=3600), constant(0)])
    def balance(account_id): ...

- a function is called with the task's arguments; if it raises, the next one is tried;
- ``cached(...)`` is the last good value of this task for these arguments, kept in the shared store;
- ``constant(...)`` always answers.

The task layer makes one :class:`FallbackChain` per task when the task is defined. Where a result came from is kept
beside it as its :class:`Provenance`.

The options ``breaker_key`` and ``coalesce_key`` are the name of one of the task's parameters, however it is passed, or
a callable ``(args, kwargs) -> str``.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

from kombu import serialization
from kombu.exceptions import DecodeError, EncodeError
from kombu.utils import json as kombu_json

from resilient_tasks.errors import ConfigurationError, ResilienceError, StoreError
from resilient_tasks.monitor.events import about
from resilient_tasks.store.base import Store
from resilient_tasks.validation import PositiveSeconds, check

logger = logging.getLogger("resilient_tasks")

LARGEST_VALUE = 64 * 1024  # bytes of JSON that ``cached`` keeps for one call

TaskKey = str | Callable[[tuple[Any, ...], dict[str, Any]], str]
ALLOWED_KEYS = "the name of a parameter, or a callable (args, kwargs) -> str"

_VALUES, _PROVENANCE = "fallback", "provenance"  # kinds of values in the store


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a task: what a fallback answers for, or what succeeded and is worth remembering."""

    task_name: str
    body: Callable[..., Any]  # ``task.run``; its signature makes ``f(1)`` and ``f(a=1)`` one call
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    task_id: str = ""  # "" if it is called by hand

    def arguments(self) -> dict[str, Any]:
        """Return all arguments by parameter name, defaults included; TypeError if they do not fit the body."""
        bound = _signature(self.body).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def log(self, level: int, what: str, *details: object, exc_info: bool = False) -> None:
        """Log something about the task."""
        fields = about(self.task_id, self.task_name)
        message = f"Task %s[%s]{what}"
        logger.log(level, message, self.task_name, self.task_id, *details, exc_info=exc_info, extra=fields)


@lru_cache(maxsize=1024)
def _signature(body: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(body)


def _parameter_names(body: Callable[..., Any]) -> list[str]:
    """Return the names of the parameters by which calls of a function can be distinguished."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [parameter.name for parameter in _signature(body).parameters.values() if parameter.kind not in variadic]


def is_task_key(key: Any, body: Callable[..., Any]) -> bool:
    """Whether ``key`` may be a key of the task with this body."""
    return callable(key) or (isinstance(key, str) and key in _parameter_names(body))


def key_of(call: Call, key: TaskKey) -> str:
    """Return the key of one call; TypeError if the arguments do not fit, or the callable returned no text."""
    found = found_by(key, call)
    if callable(key) and not isinstance(found, str):
        raise TypeError(f"the key of task {call.task_name!r} is {found!r}: allowed is a str")
    return str(found)


def found_by(key: TaskKey, call: Call) -> object:
    """Return what the callable returns, or the value of the parameter; raises likewise."""
    return key(tuple(call.args), dict(call.kwargs)) if callable(key) else call.arguments()[key]


@dataclass(frozen=True, slots=True)
class Served:
    """A fallback's answer. ``None`` is a legitimate ``value``."""

    value: Any
    source: str  # "cached", "constant" or the function's name
    age: float | None = None  # seconds since a cached value was good


@dataclass(frozen=True, slots=True)
class Constant:
    """Answer with ``value``, which must be something that JSON can hold."""

    value: Any


constant = Constant


@dataclass(frozen=True, slots=True)
class Cached:
    """Answer with the task's last good value for the same arguments.

    Every success of the task is kept in the shared store as JSON for ``max_age`` seconds, if it takes at
    most 64 KiB. The store's memory is bounded by that and by the number of different calls in ``max_age``.

    Args:
        max_age: seconds for which a value is good enough.
        key: what identifies a call; default all arguments. The name of a parameter, or a callable
            ``(args, kwargs) -> str``.
    """

    max_age: float
    key: TaskKey | None = None

    def answer(self, call: Call, store: Store) -> Served | None:
        """Return the last good value if it is not older than ``max_age``."""
        key = self.key_of(call)
        try:
            found = None if key is None else store.get(_VALUES, key)
        except StoreError as error:
            call.log(logging.DEBUG, ": last good value not read: %s", error)
            return None
        if found is None or found[1] > self.max_age:
            return None
        payload, age = found
        try:
            value = serialization.loads(payload, "application/json", "utf-8", accept={"application/json"})
        except DecodeError:
            call.log(logging.ERROR, ": its last good value cannot be read", exc_info=True)
            return None
        return Served(value, "cached", age)

    def key_of(self, call: Call) -> str | None:
        """Return the digest under which the value of ``call`` is kept; None: this call cannot be cached."""
        try:
            if callable(self.key):
                identity: object = key_of(call, self.key)
            else:
                arguments = call.arguments()
                identity = arguments if self.key is None else arguments[self.key]
            text = kombu_json.dumps([call.task_name, identity], sort_keys=True)
        except Exception as error:  # noqa: BLE001  users' key functions, and arguments that JSON cannot hold
            call.log(logging.WARNING, ": this call cannot be cached: %r", error)
            return None
        return hashlib.sha256(text.encode()).hexdigest()


cached = Cached


class FallbackChain:
    """The fallbacks of one task, tried in order."""

    def __init__(self, members: Sequence[Cached | Constant | Callable[..., Any]]) -> None:
        self._members = members
        self._has_warned = False

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
        except EncodeError as error:  # around whatever a user's __json__ may raise
            self._warn_once(call, f"JSON cannot hold it ({type(error.__context__).__name__})")
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
            call.log(logging.WARNING, ": its result is not kept for cached(): %s", why)


def _called(function: Callable[..., Any], call: Call) -> Served | None:
    """Call a function with the task's arguments; an exception, or what JSON cannot hold, is no answer."""
    name = str(getattr(_unwrapped(function), "__name__", type(_unwrapped(function)).__name__))
    try:
        value = function(*call.args, **call.kwargs)
        _encode(value)
    except Exception as error:  # noqa: BLE001  a user's function
        is_expected = isinstance(error, ResilienceError)  # its own breaker refused: no traceback per task
        call.log(logging.WARNING, ": fallback %s: %r", name, error, exc_info=not is_expected)
        return None
    return Served(value, name)


def as_chain(fallback: Any, task_name: str, body: Callable[..., Any]) -> FallbackChain | None:
    """Make the chain that a task's ``fallback=`` describes; ConfigurationError for what cannot work for this body."""
    items = [] if fallback is None else fallback if isinstance(fallback, (list, tuple)) else [fallback]
    for item in items:
        _check(item, f"task {task_name!r}: fallback", _parameter_names(body))
    return FallbackChain(tuple(items)) if items else None


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
        except EncodeError as error:
            what = f"{subject} constant({item.value!r}): allowed is a value that JSON can hold"
            raise ConfigurationError(what) from error
    elif item is cached or item is constant or not callable(item):
        allowed = "allowed are cached(max_age=...), constant(...), a function, or a list of these"
        raise ConfigurationError(f"{subject}={item!r}: {allowed}")
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
    note = asdict(Provenance(served.source, served.age, breaker))
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
