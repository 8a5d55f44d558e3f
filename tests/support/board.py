"""Reading a Grafana dashboard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VARIABLES = {"$__rate_interval": "1m", "$breaker": ".*"}


def queries(board: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the queries of a board with their panels' titles, with Grafana's variables filled in."""
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            query = target["expr"]
            for variable, value in _VARIABLES.items():
                query = query.replace(variable, value)
            yield panel["title"], query
