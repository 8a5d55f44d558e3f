"""Circuit breakers shared by a whole fleet of Celery workers.

While a dependency is down, tasks that need it are deferred in the broker or served from a fallback;
probes find out when it is back; the waiting tasks then finish by themselves, under their own ids.
"""

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
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.worker.dead_letters import DeadLetter
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
