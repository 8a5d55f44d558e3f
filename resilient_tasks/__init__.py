"""Circuit breakers shared by a whole fleet of Celery workers.

While a dependency is down, tasks that need it are deferred in the broker or served from a fallback;
probes find out when it is back; the waiting tasks then finish by themselves, under their own ids.

A public name is imported when it is first used: ``celery --help`` looks for our commands in this package, and
needs nothing else of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilient_tasks.app import Resilience
    from resilient_tasks.breaker import Breaker
    from resilient_tasks.core.classification import dependency_errors
    from resilient_tasks.core.model import Outcome, Snapshot, State
    from resilient_tasks.errors import (
        BreakerOpenError,
        ConfigurationError,
        DeadLetterError,
        DeferralExpiredError,
        DeferredQueueFullError,
        ResilienceError,
        StoreError,
    )
    from resilient_tasks.fallback import Provenance, cached, constant
    from resilient_tasks.operations.waiting import DeadLetter
    from resilient_tasks.policy import BreakerPolicy
    from resilient_tasks.worker.task import ResilientTask

__all__ = [
    "Breaker",
    "BreakerOpenError",
    "BreakerPolicy",
    "ConfigurationError",
    "DeadLetter",
    "DeadLetterError",
    "DeferralExpiredError",
    "DeferredQueueFullError",
    "Outcome",
    "Provenance",
    "Resilience",
    "ResilienceError",
    "ResilientTask",
    "Snapshot",
    "State",
    "StoreError",
    "cached",
    "constant",
    "dependency_errors",
]

#: Where they are, each module after those that it imports: a name is looked for in one after the other.
_MODULES = (
    "errors", "core.model", "core.classification", "policy", "fallback", "breaker", "worker.task",
    "operations.waiting", "app",
)  # fmt: skip

if TYPE_CHECKING:
    __version__: str
else:  # or every name would be right for type checkers

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return importlib.import_module("importlib.metadata").version("resilient-tasks")
        for module in _MODULES if name in __all__ else ():
            found = vars(importlib.import_module(f"{__name__}.{module}"))
            if name in found:
                return globals().setdefault(name, found[name])
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
