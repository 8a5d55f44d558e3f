"""``shared_task`` for type checkers: Celery's own, which with ``celery-types`` knows no options but Celery's.

Its stub knows ours, and the tasks that it makes know ``apply_async(on_open=)``. For tasks of an app write
``Celery("shop", task_cls=ResilientTask)``.
"""

from __future__ import annotations

from celery import shared_task

__all__ = ["shared_task"]
