"""Importing this makes every Flower that this process starts from now on show the breakers of its Celery app.

It is the line for ``flowerconfig.py``, which Flower reads before it makes its application.
"""

from __future__ import annotations

from resilient_tasks.flower import flower_internals
from resilient_tasks.flower.application import FlowerWithBreakers

flower_internals.command.Flower = FlowerWithBreakers
