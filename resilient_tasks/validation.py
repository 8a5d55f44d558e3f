"""What users may give: types with bounds, checked by pydantic, and one text for every mistake.

The description of a type is what its error says is allowed.
"""

from __future__ import annotations

from functools import lru_cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from resilient_tasks.errors import ConfigurationError

_LONGEST = 30 * 24 * 3600
_MANY = 1_000_000_000

PositiveSeconds = Annotated[float, Field(gt=0, lt=float("inf"), description="a positive number of seconds")]
Seconds = Annotated[
    float, Field(gt=0, le=_LONGEST, description="a positive number of seconds up to 2,592,000 (30 days)")
]
SecondsOrZero = Annotated[float, Field(ge=0, le=_LONGEST, description="from 0 to 2,592,000 seconds (30 days)")]
Rate = Annotated[float, Field(gt=0, le=1, description="a number above 0 and up to 1")]
Count = Annotated[int, Field(ge=1, le=_MANY, description="an integer of 1 or more")]
NumberOf = Annotated[int, Field(ge=1, le=1_000_000, description="an integer from 1 to 1,000,000")]


def check(subject: str, name: str, kind: Any, value: object) -> None:
    """Check one value, without conversion; raise ConfigurationError, which names subject, name and value."""
    _parse(subject, name, TypeAdapter(kind), value, _allowed(kind))


def parse(name: str, kind: Any, value: object) -> Any:
    """Return a value that came as JSON or as text; raise ConfigurationError if it is not allowed."""
    return _parse("", name, TypeAdapter(kind), value, _allowed(kind), strict=not isinstance(value, str))


def check_fields(thing: Any, subject: str = "") -> None:
    """Check all fields of a dataclass; raise ConfigurationError if a value is not allowed."""
    for name, (adapter, allowed) in _fields(thing.__class__).items():
        _parse(subject, name, adapter, getattr(thing, name), allowed)


def parse_field(owner: type, name: str, value: object) -> Any:
    """Return a value for one field of a dataclass, from text too; raise ConfigurationError if it is not allowed."""
    adapter, allowed = _fields(owner)[name]
    return _parse("", name, adapter, value, allowed, strict=not isinstance(value, str))


def _parse(
    subject: str, name: str, adapter: TypeAdapter[Any], value: object, allowed: str, *, strict: bool = True
) -> Any:
    try:
        return adapter.validate_python(value, strict=strict)
    except (ValidationError, OverflowError):
        raise ConfigurationError(f"{subject}{name}={value!r}: allowed is {allowed}") from None


@lru_cache(maxsize=100)
def _fields(owner: Any) -> dict[str, tuple[TypeAdapter[Any], str]]:
    hints = get_type_hints(owner, include_extras=True)
    return {name: (TypeAdapter(hints[name]), _allowed(hints[name])) for name in owner.__dataclass_fields__}


def _allowed(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType) and NoneType in parts:
        return " or ".join([*(_allowed(part) for part in parts if part is not NoneType), "None"])
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is Annotated:
        texts = (getattr(part, "description", None) for part in reversed(parts))
        return next((text for text in texts if isinstance(text, str)), _allowed(parts[0]))
    return "True or False" if kind is bool else getattr(kind, "__name__", str(kind))
