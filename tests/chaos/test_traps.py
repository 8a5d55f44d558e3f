"""The traps are laid around methods of the library; this fails when one of them moves."""

from __future__ import annotations

import pytest

from tests.chaos.traps import WINDOWS


@pytest.mark.parametrize(("owner", "method"), WINDOWS.values(), ids=WINDOWS)
def test_a_window_is_where_it_was(owner: type, method: str) -> None:
    assert callable(getattr(owner, method))
    assert method in owner.__dict__
