"""Names of breakers and namespaces. They become parts of keys, queues and metrics, so they are checked first."""

from __future__ import annotations

import re

from resilient_tasks.errors import ConfigurationError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
NAME_RULE = "1 to 100 letters, digits, '_', '.' and '-', beginning with a letter or a digit"


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may name a breaker or a namespace.

    Args:
        kind: what it names, for the message, e.g. ``"breaker"``.
        name: what somebody has called it.

    Raises:
        ConfigurationError: it may not.
    """
    if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name, re.ASCII):
        return name
    raise ConfigurationError(f"{kind} name {name!r}: allowed is {NAME_RULE}")
