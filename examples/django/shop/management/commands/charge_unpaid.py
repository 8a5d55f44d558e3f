from typing import Any

from django.core.management.base import BaseCommand
from proj.celery import resilience

from shop import tasks
from shop.models import Order


class Command(BaseCommand):
    help = "Send off again what is not paid."

    def handle(self, *args: Any, **options: Any) -> None:
        numbers = list(Order.objects.filter(paid=False).values_list("number", flat=True))
        for number in numbers:
            tasks.charge.delay(number)
        state = resilience["payments"].state
        self.stdout.write(f"{len(numbers)} sent, payments is {state}, accepting: {resilience['payments'].accepting}")
