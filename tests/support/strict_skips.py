"""A pytest plugin that turns skips into failures, for a machine on which everything must be able to run.

``python -m pytest -p tests.support.strict_skips``; ``make test-all`` asks for it when
``TEST_ALL_STRICT=1``. A test that is expected to fail (xfail) is no skip.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _fail_if_skipped((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _fail_if_skipped((yield))


def _fail_if_skipped(report: Any) -> Any:
    if report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"nothing may be skipped here, and this was: {report.longrepr}"
    return report
