"""A runnable Celery project on top of ``resilient_tasks``, made to be copied from.

``app`` and ``tasks`` are what an application would have. ``service`` is the flaky HTTP service they
call, ``processes`` and ``stack`` run everything on one machine, ``drill`` breaks it and measures.
"""
