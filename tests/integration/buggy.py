"""The shop, whose workers fail with a bug of the library's own while a key says so."""

from __future__ import annotations

from tests.integration import bugs
from tests.integration.shop import *  # noqa: F403
from tests.integration.shop import SIDE

bugs.install(SIDE)
