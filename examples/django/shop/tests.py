"""Tests as a user of the library writes them: no broker, no worker, no store."""

from celery import current_app
from django.test import TestCase
from proj.celery import resilience

from resilient_tasks import BreakerOpenError
from resilient_tasks.testing import force, in_memory
from shop.models import Order
from shop.tasks import charge, price


class OutageTests(TestCase):
    def setUp(self) -> None:
        current_app.conf.task_always_eager = current_app.conf.task_eager_propagates = True
        self.enterContext(in_memory(resilience))

    def test_the_page_says_so(self) -> None:
        force(resilience["payments"], "OPEN")
        self.assertEqual(self.client.get("/checkout").json(), {"pay": "later", "state": "OPEN"})

    def test_an_order_is_refused(self) -> None:
        force(resilience["payments"], "OPEN")
        with self.captureOnCommitCallbacks() as callbacks:
            self.client.post("/orders/7/now")
        with self.assertRaises(BreakerOpenError):
            callbacks[0]()
        self.assertFalse(Order.objects.get(number=7).paid)

    def test_an_eager_task_is_refused_and_a_fallback_answers(self) -> None:
        self.assertEqual(price.delay(3).get(), "3.00")
        force(resilience["payments"], "OPEN")
        force(resilience["prices"], "OPEN")
        self.assertEqual(price.delay(3).get(), "3.00")
        self.assertEqual(price.delay(4).get(), "on request")
        with self.assertRaises(BreakerOpenError):
            charge.delay(7)
