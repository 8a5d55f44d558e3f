"""What a cut connection may cost, on a real server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from resilient_tasks.errors import StoreError
from resilient_tasks.store.redis import RedisStore
from workers.processes import Server, start_valkey


@pytest.fixture
def server(tmp_path) -> Iterator[Server]:
    server = start_valkey(tmp_path)
    yield server
    server.stop()


def test_a_subscription_that_was_cut_does_not_make_the_store_away(server):
    store = RedisStore(server.url(), namespace="promises", timeout=20.0, cooldown=60.0)
    changes = store.changes(timeout=5.0)
    assert next(changes) is None
    with redis.Redis.from_url(server.url()) as client:
        client.client_kill_filter(_type="pubsub")
    with pytest.raises(StoreError):
        next(changes)
    assert store.ping() > 0
    store.close()


def test_a_lost_server_is_noticed_by_the_next_command(server):
    store = RedisStore(server.url(), namespace="promises", timeout=20.0, cooldown=60.0)
    assert store.ping() > 0
    server.stop()
    with pytest.raises(StoreError, match="is unavailable"):
        store.ping()
    with pytest.raises(StoreError, match="tried a moment ago"):
        store.ping()
    store.close()
