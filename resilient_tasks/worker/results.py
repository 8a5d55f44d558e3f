"""Writing results: whatever a result backend raises becomes one error, and no code of ours hides behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class ResultNotWrittenError(Exception):
    """A result backend has raised something; the text names its class."""


def write_result(write: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """Call a method of a result backend.

    Raises:
        ResultNotWrittenError: it raised something.
    """
    try:
        write(*args, **kwargs)
    except Exception as exc:
        raise ResultNotWrittenError(type(exc).__name__) from exc
