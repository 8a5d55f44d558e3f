"""The Celery side: the only package that knows Celery's and kombu's internals.

A task message travels through it like this::

    strategy ─► request.submit ─► task body (pool) ─► request.on_success / on_failure
        │            │                  │                        │
        └── gate ────┘            TaskDeferred ───────────► deferral.defer
                                                                 ▲
    beat ─► control queue ─► heart ─► tick ─► probe, resume ─────┘ (and back to the origin queue)

``seams`` holds every touch of something Celery or kombu do not document.
"""
