"""Settings from the environment: ``RESILIENT_TASKS_STORE_URL``, ``RESILIENT_TASKS_TICK_INTERVAL``, ...

``Settings.load()`` reads them once, at start-up, and rejects every mistake: an unknown
variable, a value out of range, a policy field that does not exist. ``__`` nests, so that an operator
can override one field of one breaker without touching code::

    RESILIENT_TASKS_BREAKERS__PAYMENTS__FAILURE_RATE_THRESHOLD=0.3

Names of variables ignore case and punctuation: ``PAY_API`` is the override of a breaker
``pay_api``, ``pay-api`` or ``Pay.API``; with two of those in one app it is ambiguous and an error.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, TypedDict

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from resilient_tasks.core.memory import MEMORY_LIMIT_RULE, MemoryLimit
from resilient_tasks.core.model import NAME_PATTERN, NAME_RULE
from resilient_tasks.errors import ConfigurationError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.address import SCHEMES, hide_password
from resilient_tasks.validation import parse_field

PREFIX = "RESILIENT_TASKS_"
NESTED = "__"

_CODE_ONLY = frozenset({"classify", "failures", "ignore"})
_POLICY_FIELDS = [field.name for field in fields(BreakerPolicy)]


class Settings(BaseSettings):
    """What an operator can set without touching code. Use :meth:`load`; a ``Settings`` is immutable.

    Args:
        store_url: the shared store; ``None``: the broker if it is Redis, else the result backend if that is.
        namespace: prefix of all keys, queues and names in the store and the broker.
        tick_interval: seconds between two ticks.
        store_timeout: longest time in seconds that one command may keep the store's caller waiting.
        store_memory_limit: how much of a server's memory may be in use before nothing more is deferred.
        late_after: seconds after which a guarded call is late, and its breaker suspect in its worker.
        spare_slots: most pool slots that a worker adds while late calls hold all others; 0: none.
        gate_producers: publish tasks for a breaker that refuses straight into its deferred queue.
        breakers: overridden policy fields per breaker.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter=NESTED, env_ignore_empty=True, extra="forbid", frozen=True
    )

    # a field's description is what its error message says is allowed
    store_url: str | None = Field(
        None,
        pattern=rf"^(?i:{'|'.join(map(re.escape, SCHEMES))})://",
        description=f"a URL that begins with {', '.join(f'{scheme}://' for scheme in SCHEMES)}",
        repr=False,
    )
    namespace: str = Field("resilient", pattern=f"^{NAME_PATTERN}$", description=NAME_RULE)
    tick_interval: float = Field(1.0, ge=0.05, le=3600, description="a number of seconds from 0.05 to 3600")
    store_timeout: float = Field(0.5, ge=0.01, le=60, description="a number of seconds from 0.01 to 60")
    store_memory_limit: Annotated[str, AfterValidator(lambda text: MemoryLimit.parse(text) and text)] = Field(
        "80%", description=MEMORY_LIMIT_RULE
    )
    late_after: float = Field(0.5, ge=0.01, le=3600, description="a number of seconds from 0.01 to 3600")
    spare_slots: int = Field(2, ge=0, le=64, description="a whole number from 0 to 64")
    gate_producers: bool = Field(False, description="true or false")
    breakers: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description=f"policy fields per breaker, as in {PREFIX}BREAKERS__PAYMENTS__WINDOW=60"
    )

    @classmethod
    def load(cls, **overrides: Any) -> Settings:
        """Read the environment; ``overrides`` that are not None win over it.

        Raises:
            ConfigurationError: something is unknown or out of range. The message names the variable, the
                value (without a URL's password) and what is allowed.
        """
        given = {name: value for name, value in overrides.items() if value is not None}
        _refuse_unknown_variables(os.environ)
        try:
            loaded = cls(**given)
        except ValidationError as error:
            raise ConfigurationError(_explain(error, given)) from None  # pydantic's text would show passwords
        except SettingsError:  # only the overrides are JSON, as one variable; its value may hold a password
            allowed = cls.model_fields["breakers"].description
            raise ConfigurationError(f"{PREFIX}BREAKERS is no JSON: allowed is a JSON object of {allowed}") from None
        for breaker, values in loaded.breakers.items():
            for name, value in values.items():
                _parse(breaker, name, value)
        return loaded

    def policy_for(self, name: str, policy: BreakerPolicy) -> BreakerPolicy:
        """Return ``policy`` with what the settings override; raise if two match, or it then contradicts itself."""
        matches = [override for override in self.breakers if _folded(override) == _folded(name)]
        if len(matches) > 1:
            raise ConfigurationError(f"breaker {name!r}: the overrides {_listed(matches)} all match it; allowed is one")
        if not matches:
            return policy
        override = matches[0]
        values = {field: _parse(override, field, value) for field, value in self.breakers[override].items()}
        try:
            return replace(policy, **values)
        except ConfigurationError as error:
            variables = ", ".join(_variable("breakers", override, field) for field in values)
            raise ConfigurationError(f"breaker {name!r} with {variables}: {error}") from None

    def unknown_overrides(self, defined: Iterable[str]) -> list[str]:
        """Return the overrides that match none of the ``defined`` breakers; raise if one matches several."""
        by_folded: dict[str, list[str]] = {}
        for name in sorted(set(defined)):
            by_folded.setdefault(_folded(name), []).append(name)
        unknown = []
        for override in self.breakers:
            names = by_folded.get(_folded(override), [])
            if len(names) > 1:
                variable = _variable("breakers", override, "...")
                raise ConfigurationError(f"{variable} matches the breakers {_listed(names)}; allowed is one")
            unknown += [] if names else [override]
        return unknown


# --- what is wrong, and where -----------------------------------------------------------------------


def _variable(*path: str) -> str:
    return PREFIX + NESTED.join(part.upper() for part in path)


def _folded(name: str) -> str:
    return re.sub(r"\W", "_", name.lower())


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    """Find typing errors: pydantic-settings reads the variables it knows and never sees the others."""
    for variable in environ:
        if not variable.upper().startswith(PREFIX):
            continue
        field, *nested = variable[len(PREFIX) :].lower().split(NESTED)
        if field not in Settings.model_fields or (nested and field != "breakers"):
            allowed = ", ".join(PREFIX + name.upper() for name in Settings.model_fields)
            raise ConfigurationError(f"{variable} is not a setting; allowed are {allowed}")  # its value may be a secret


def _explain(error: ValidationError, given: Mapping[str, Any]) -> str:
    first = error.errors(include_url=False, include_context=False)[0]
    path = [str(part) for part in first["loc"]]
    label = ".".join(path) if path[0] in given else _variable(*path)
    field = Settings.model_fields.get(path[0])
    if field is None:
        return f"{label} is not a setting; allowed are {', '.join(Settings.model_fields)}"
    value = first["input"]
    shown = hide_password(value) if isinstance(value, str) else value
    if path[0] == "store_url" and "://" not in str(value):
        shown = "***"  # any part of it may be a password
    return f"{label}={shown!r}: allowed is {field.description}"


def _parse(breaker: str, name: str, value: Any) -> Any:
    """Return an overridden policy field as the policy wants it; environment variables are text."""
    variable = _variable("breakers", breaker, name)
    if name in _CODE_ONLY:
        raise ConfigurationError(f"{variable}={value!r}: {name} takes Python callables; give it in code")
    if name not in _POLICY_FIELDS:
        allowed = ", ".join(known for known in _POLICY_FIELDS if known not in _CODE_ONLY)
        raise ConfigurationError(f"{variable}={value!r}: no such policy field; allowed are {allowed}")
    is_none = isinstance(value, str) and value.strip().lower() in ("none", "null")
    try:
        return parse_field(BreakerPolicy, name, None if is_none else value)
    except ConfigurationError as error:
        raise ConfigurationError(f"{variable}={value!r}: {str(error).rpartition(': ')[2]}") from None


class SettingsFields(TypedDict, total=False):
    """The fields of :class:`Settings` as keyword arguments, for type checkers; None: as the environment says."""

    store_url: str | None
    namespace: str | None
    tick_interval: float | None
    store_timeout: float | None
    store_memory_limit: str | None
    late_after: float | None
    spare_slots: int | None
    gate_producers: bool | None
    breakers: dict[str, dict[str, Any]] | None
