"""The Celery side: the only package that knows Celery's and kombu's internals.

``pipeline.py`` shows the life of a delivery; ``celery_internals.py`` holds every touch of something that Celery or
kombu do not document.
"""
