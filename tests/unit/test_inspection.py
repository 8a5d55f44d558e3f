"""``celery inspect breakers``: what one worker answers."""

from __future__ import annotations

from types import SimpleNamespace

from celery import Celery
from celery.worker.control import Panel

from resilient_tasks import Breaker, Resilience
from resilient_tasks.core.model import Verb
from resilient_tasks.testing import Clock
from resilient_tasks.worker.bootsteps import breakers
from tests.support.doubles import FlakyStore


def test_celery_knows_the_command() -> None:
    assert Panel.meta["breakers"].type == "inspect"


def test_an_app_without_breakers_has_none() -> None:
    assert breakers(SimpleNamespace(app=Celery("bare", set_as_current=False))) == {}


def test_a_view_agrees_until_the_store_knows_better(
    app: Celery, resilience: Resilience, payments: Breaker, clock: Clock
) -> None:
    store = FlakyStore(clock)
    resilience.use_store(store)
    payments.isolate()
    worker = SimpleNamespace(app=app)
    seen = breakers(worker)["payments"]
    assert (seen["state"], seen["epoch"], seen["agrees"]) == ("FORCED_OPEN", payments.snapshot().epoch, True)
    assert seen["age"] >= 0
    store.is_unavailable = True
    assert breakers(worker)["payments"]["agrees"] is None
    store.is_unavailable = False
    resilience.fleet.view.stop(timeout=60)  # nothing refreshes the view any more
    store.inner.command(payments._dependency.spec, Verb.RESET)
    seen = breakers(worker)["payments"]
    assert (seen["state"], seen["agrees"]) == ("FORCED_OPEN", False)
