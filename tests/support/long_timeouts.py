"""Imported by the projects that tests run: on a slow machine neither the store nor a result backend counts as away."""

from __future__ import annotations

import os
import sys

from resilient_tasks.worker import deferral

os.environ.setdefault("RESILIENT_TASKS_STORE_TIMEOUT", "20")
if "pytest" not in sys.modules:  # unit tests have the real one
    deferral.STATE_TIMEOUT = float(os.environ.get("SHOP_STATE_TIMEOUT", "20"))
