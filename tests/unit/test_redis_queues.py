from __future__ import annotations

from pathlib import Path

import redis
from celery import Celery
from kombu.transport.redis import SentinelChannel

from resilient_tasks.worker.broker_queues import PublishedQueues, RedisQueues
from workers.processes import start_valkey


def test_sentinels_are_asked_as_the_app_asks_them_but_not_for_long() -> None:
    app = Celery("app", broker="sentinel://one", set_as_current=False)
    given = {"master_name": "main", "sentinel_kwargs": {"password": "hush", "socket_timeout": 1.0}}
    app.conf.broker_transport_options = given
    options = RedisQueues(app, "resilient")._connection.transport_options
    asked_with = options["sentinel_kwargs"]
    assert options["master_name"] == "main"
    assert (asked_with["password"], asked_with["socket_timeout"]) == ("hush", 1.0)
    assert asked_with["socket_connect_timeout"] == 2.0
    assert asked_with["retry"].get_retries() == 0
    assert "sentinel_kwargs" in SentinelChannel.from_transport_options
    assert given["sentinel_kwargs"] == {"password": "hush", "socket_timeout": 1.0}, (
        "the app's settings stay as they are"
    )


def test_our_publishes_are_confirmed_whatever_the_app_says() -> None:
    app = Celery("app", broker="amqp://", set_as_current=False)
    app.conf.broker_transport_options = {"confirm_publish": False}
    assert PublishedQueues(app, "resilient")._connection.transport_options["confirm_publish"] is True


def test_deferred_queues_are_found_whatever_their_prefix(tmp_path: Path) -> None:
    server = start_valkey(tmp_path)
    prefix = "a*[b]?\\^:"
    app = Celery("app", broker=server.url(), set_as_current=False)
    app.conf.broker_transport_options = {"global_keyprefix": prefix}
    queues = RedisQueues(app, "resilient")
    with redis.Redis.from_url(server.url()) as client:
        for queue in ("resilient.deferred.payments", "resilient.deferred.payments:acme", "resilient.dead.payments"):
            client.lpush(f"{prefix}{queue}", "a message")
        client.lpush("aabab\\^:resilient.deferred.of-another-app", "a message")
    assert queues.found() == ["payments", "payments:acme"]
    queues.close()
    server.stop()
