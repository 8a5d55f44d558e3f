"""Names of breakers and namespaces. They become parts of keys, queues and metrics, so they are checked first."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches
from urllib.parse import quote, unquote

from resilient_tasks.errors import ConfigurationError

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
#: Names of dead-letter queues that belong to no breaker.
RESERVED = frozenset({"undecodable"})
NAME_RULE = "1 to 100 letters, digits, '_', '.' and '-', beginning with a letter or a digit"


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may name a breaker or a namespace.

    Args:
        kind: what it names, for the message, e.g. ``"breaker"``.
        name: what somebody has called it.

    Raises:
        ConfigurationError: it may not.
    """
    if isinstance(name, str) and name in RESERVED:
        raise ConfigurationError(f"{kind} name {name!r}: it is reserved; allowed is another one")
    if isinstance(name, str) and re.fullmatch(NAME_PATTERN, name, re.ASCII):
        return name
    raise ConfigurationError(f"{kind} name {name!r}: allowed is {NAME_RULE}")


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return a question for the end of a message about an unknown name; "" if none of the known is like it."""
    near = get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {near[0]!r}?" if near else ""


# --- children ---------------------------------------------------------------------------------------

ALL_KEYS = "*"
KEY_RULE = "text or an integer, at most 99 characters as percent-encoded UTF-8, not empty"
_SEPARATOR = ":"
_LONGEST_KEY = 99


def child_name(parent: str, key: object) -> str:
    """Return the name of a parent's child: ``payments:acme``; what may not be part of a name is percent-encoded.

    Raises:
        ConfigurationError: the key cannot name a child.
    """
    if isinstance(key, (str, int)) and not isinstance(key, bool):
        try:
            escaped = quote(str(key), safe="").replace("~", "%7E")
        except UnicodeEncodeError:  # half of a surrogate pair
            escaped = ""
        if 0 < len(escaped) <= _LONGEST_KEY:
            return f"{parent}{_SEPARATOR}{escaped}"
    raise ConfigurationError(f"key {key!r:.100} of breaker {parent!r}: allowed is {KEY_RULE}")


def parent_of(name: str) -> str | None:
    """Return the name of a child's parent; None for a breaker that is no child."""
    parent, separator, _ = name.partition(_SEPARATOR)
    return parent if separator else None


def is_child(name: str) -> bool:
    """Whether this is the name of a child, and in the one way in which its key is written."""
    parent, key = parent_of(name), key_of(name)
    return (
        parent is not None and quote(unquote(key), safe="").replace("~", "%7E") == key and 0 < len(key) <= _LONGEST_KEY
    )


def key_of(name: str) -> str:
    """Return the percent-encoded key in a child's name; "" for a breaker that is no child."""
    return name.partition(_SEPARATOR)[2]
