"""Breakers in Flower: pages in its own navigation, a JSON API, deferred queues on its Broker page.

``celery -A proj breakers flower`` starts a Flower that has them. Stock ``celery -A proj flower`` has them with one
line in its ``flowerconfig.py``::

    import resilient_tasks.flower.install

Needs the extra ``resilient-tasks[flower]``.
"""
