import os

from celery import Celery

from resilient_tasks import Resilience

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")

app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

resilience = Resilience(app)
payments = resilience.breaker("payments", minimum_calls=5, open_duration=1, open_multiplier=1, open_jitter=0, ramp=0)
