from celery import shared_task


@shared_task(breaker="mail")
def remind(number: int) -> int:
    return number
