from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.views.decorators.csrf import csrf_exempt
from proj.celery import resilience

from resilient_tasks import BreakerOpenError
from shop import tasks
from shop.models import Order


def checkout(request: HttpRequest) -> JsonResponse:
    payments = resilience["payments"]
    return JsonResponse({"pay": "now" if payments.accepting else "later", "state": payments.state})


@csrf_exempt
def order(request: HttpRequest, number: int) -> JsonResponse:
    with transaction.atomic():
        Order.objects.create(number=number)
        tasks.charge.delay_on_commit(number)
    return JsonResponse({"number": number}, status=202)


@csrf_exempt
def order_now(request: HttpRequest, number: int) -> JsonResponse:
    try:
        with transaction.atomic():
            Order.objects.create(number=number)
            tasks.charge.apply_async_on_commit((number,), on_open="fail")
    except BreakerOpenError as refused:  # raised after the commit: the order is stored, its task is not sent
        return JsonResponse({"error": str(refused)}, status=503, headers={"Retry-After": refused.retry_after or 10})
    return JsonResponse({"number": number}, status=202)


def price(request: HttpRequest, number: int) -> JsonResponse:
    result = tasks.price.apply_async((number,), on_open="fallback")
    return JsonResponse({"price": result.get(timeout=30)})
