"""What a server reports of itself: version, settings, the memory it uses; and how much of that deferring may fill."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

MEMORY_LIMIT_RULE = "a share of the server's maxmemory like 80%, a size like 512mb, or none"

_SIZE = re.compile(r"([0-9]{1,15})(kb|mb|gb)?")
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]+)?)%")
_UNITS = {"": 1, "kb": 1024, "mb": 1024**2, "gb": 1024**3}


class Memory(NamedTuple):
    """What a server says of its memory, in bytes."""

    used: int  # counted against ``maximum``
    maximum: int  # ``maxmemory``; 0 when it is not set

    @classmethod
    def read(cls, info: Mapping[str, Any]) -> Memory | None:
        """Return what is in a reply to ``INFO memory``; None if it is not there."""
        used = info.get("used_memory")
        if not isinstance(used, int):
            return None
        return cls(used - int(info.get("mem_not_counted_for_evict") or 0), int(info.get("maxmemory") or 0))


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """Up to where a server's memory may be filled; without either argument as far as it goes."""

    size: int | None = None  # bytes
    share: float | None = None  # of the server's ``maxmemory``, above 0 and up to 1

    @classmethod
    def parse(cls, text: str) -> MemoryLimit:
        """Read a limit as the settings give it.

        Raises:
            ValueError: it is not :data:`MEMORY_LIMIT_RULE`.
        """
        text = text.strip().lower()
        if text == "none":
            return cls()
        size, share = _SIZE.fullmatch(text), _SHARE.fullmatch(text)
        if size and int(size[1]):
            return cls(size=int(size[1]) * _UNITS[size[2] or ""])
        if share and 0 < float(share[1]) <= 100:  # noqa: PLR2004 - per cent
            return cls(share=float(share[1]) / 100)
        raise ValueError(f"{text!r}: allowed is {MEMORY_LIMIT_RULE}")

    def exceeded_by(self, memory: Memory) -> int | None:
        """Return the limit in bytes if ``memory`` has reached it, else None."""
        limit = self.size if self.share is None else int(self.share * memory.maximum)
        return limit if limit and memory.used >= limit else None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """One Redis or Valkey server as it reports itself. None: unknown."""

    role: str  # "store" or "broker"
    version: tuple[int, ...] = ()  # e.g. (7, 0, 15)
    product: str = "redis"  # or "valkey"
    policy: str | None = None  # its maxmemory-policy
    maxmemory: int | None = None  # bytes; 0: no limit
    persistent: bool | None = None  # whether anything of it survives a restart

    @property
    def title(self) -> str:
        """What it is: ``Valkey 9.1.0``."""
        return f"{self.product.capitalize()} {'.'.join(map(str, self.version))}"

    @classmethod
    def of(cls, role: str, info: Mapping[str, Any], saves: object) -> ServerFacts:
        """Read its answer to INFO; ``saves`` is its setting ``save``, when snapshots are written, None if unknown."""
        product = "valkey" if "valkey_version" in info else "redis"
        version = str(info.get(f"{product}_version", ""))
        appends = info.get("aof_enabled")
        return cls(
            role=role,
            version=tuple(int(part) for part in version.split(".") if part.isdigit()),
            product=product,
            policy=info.get("maxmemory_policy"),
            maxmemory=info.get("maxmemory"),
            persistent=True if appends else None if saves is None or appends is None else bool(saves),
        )
