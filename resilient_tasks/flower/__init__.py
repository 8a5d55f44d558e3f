"""Breakers in Flower: pages in its own navigation, a JSON API, deferred queues on its Broker page.

``celery -A proj breakers flower`` starts a Flower that has them. Stock ``celery -A proj flower`` has them with one
line in its ``flowerconfig.py``::

    from resilient_tasks.flower import install; install()

Needs the extra ``resilient-tasks[flower]``.
"""

from __future__ import annotations

from resilient_tasks.flower import seams
from resilient_tasks.flower.application import FlowerWithBreakers

__all__ = ["install"]


def install() -> None:
    """Make every Flower that this process starts from now on show the breakers of its Celery app."""
    seams.command.Flower = FlowerWithBreakers
