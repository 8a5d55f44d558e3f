"""Taking messages off a Redis broker: at no moment is one only in the worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty
from typing import Any

import pytest
import redis
from kombu import Connection, Consumer, Queue
from kombu.transport import redis as kombu_redis

from resilient_tasks.worker import kombu_internals
from resilient_tasks.worker.kombu_internals import TURNS, give_up_turns
from workers.processes import Server, wait_until


@pytest.fixture
def broker(server: Server) -> Iterator[Any]:
    client: Any = redis.Redis.from_url(server.url(), decode_responses=True)
    client.flushdb()
    yield client
    client.config_set("maxmemory", "0")


@pytest.fixture(params=["", "prefix."], ids=["", "key prefix"])
def prefix(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def connection(server: Server, broker: Any, prefix: str) -> Iterator[Connection]:
    kombu_internals.install("resilient.dead.undecodable")
    with Connection(server.url(), transport_options={"global_keyprefix": prefix}) as connection:
        yield connection


def publish(connection: Connection, *bodies: str, queue: str = "work", priority: int = 0) -> None:
    for body in bodies:
        connection.Producer().publish(body, routing_key=queue, declare=[Queue(queue)], priority=priority)


@contextmanager
def consuming(connection: Connection, *queues: str, no_ack: bool = False) -> Iterator[list[Any]]:
    received: list[Any] = []
    with Consumer(
        connection.channel(), [Queue(queue) for queue in queues], on_message=received.append, no_ack=no_ack
    ):  # fmt: skip
        yield received


def drain(connection: Connection, received: list[Any], count: int) -> list[Any]:
    """Receive messages one after the other and return their bodies."""
    while len(received) < count:
        connection.drain_events(timeout=60)
    return [message.payload for message in received]


def received_by_a_channel(connection: Connection) -> tuple[Any, Any]:
    """Return a channel, and a message that it has received and not acknowledged."""
    publish(connection, "a")
    channel, received = connection.channel(), list[Any]()
    with Consumer(channel, [Queue("work")], on_message=received.append):
        drain(connection, received, 1)
    return channel, received[0]


def test_both_kinds_of_transport_take_messages_this_way(connection: Connection) -> None:
    assert kombu_redis.Transport.Channel is kombu_internals.TakingChannel
    assert issubclass(kombu_redis.SentinelTransport.Channel, kombu_internals.TakingChannel)


def test_a_message_that_was_taken_and_never_read_comes_back(connection: Connection, broker: Any, prefix: str) -> None:
    publish(connection, "a")
    channel = connection.channel()
    with Consumer(channel, [Queue("work")]):
        connection.transport.cycle.on_poll_start()
        wait_until(lambda: broker.hlen(f"{prefix}unacked"), what="the message to be taken")
        assert broker.llen(f"{prefix}work") == 0
        (tag,) = broker.zrange(f"{prefix}unacked_index", 0, -1)
        channel.qos.restore_by_tag(tag)
        assert (broker.llen(f"{prefix}work"), broker.hlen(f"{prefix}unacked")) == (1, 0)


@pytest.mark.parametrize(
    "value", ["\udcff", "\\ud800 \udcff \\", float("nan"), float("inf"), [float("nan")], None, "\U0001f600"]
)
@pytest.mark.parametrize("where", ["a header", "exchange"])
def test_whatever_a_message_holds_it_is_noted(broker: Any, where: str, value: Any) -> None:
    info = {"exchange": value if where == "exchange" else "", "routing_key": "work"}
    message = {"headers": {where: value}, "properties": {"delivery_tag": "a-tag", "delivery_info": info}}
    text = json.dumps(message)
    broker.lpush("work", text)
    assert broker.eval(kombu_internals.TAKE, 3, "unacked", "unacked_index", "work", 1.0) == ["work", text]
    noted = json.loads(broker.hget("unacked", "a-tag"))
    assert json.dumps(noted[0]) == text
    assert broker.zrange("unacked_index", 0, -1) == ["a-tag"]
    if where == "a header":
        assert noted[1:] == ["", "work"]


def test_kombu_itself_loses_it(server: Server, broker: Any) -> None:
    with Connection(server.url()) as connection:
        publish(connection, "a")
        with Consumer(connection.channel(), [Queue("work")]):
            connection.transport.cycle.on_poll_start()
            wait_until(lambda: not broker.llen("work"), what="the message to be popped")
            assert broker.hlen("unacked") == 0


def test_messages_arrive_in_order_and_are_acknowledged(connection: Connection, broker: Any, prefix: str) -> None:
    publish(connection, "a", "b", "c")
    with consuming(connection, "work") as received:
        assert drain(connection, received, 3) == ["a", "b", "c"]
        assert broker.hlen(f"{prefix}unacked") == broker.zcard(f"{prefix}unacked_index") == 3
        for message in received:
            message.ack()
        assert broker.hlen(f"{prefix}unacked") == broker.zcard(f"{prefix}unacked_index") == 0


def test_a_server_that_has_lost_the_script_gets_it_again(connection: Connection, broker: Any) -> None:
    with consuming(connection, "work") as received:
        for number, body in enumerate(["a", "b", "c"]):
            publish(connection, body)
            assert drain(connection, received, number + 1)[-1] == body
            broker.script_flush()


def test_one_client_acknowledges_all(connection: Connection) -> None:
    channel: Any = connection.channel()
    with channel.conn_or_acquire() as first, channel.conn_or_acquire() as second:
        assert first is second


def test_the_most_urgent_comes_first(connection: Connection) -> None:
    publish(connection, "later", priority=9)
    publish(connection, "now", priority=0)
    with consuming(connection, "work") as received:
        assert drain(connection, received, 2) == ["now", "later"]


@pytest.mark.parametrize("priority", [0, 9])
def test_whatever_it_waits_for_all_queues_are_served(connection: Connection, priority: int) -> None:
    with consuming(connection, "work", "play", "rest") as received:
        for number, queue in enumerate(["rest", "play", "work"]):
            with pytest.raises(TimeoutError):
                connection.drain_events(timeout=0.01)
            publish(connection, queue, queue=queue, priority=priority)
            assert drain(connection, received, number + 1)[-1] == queue


def wait_at(connection: Connection) -> None:
    """Let all channels of a connection find nothing and begin to wait."""
    with pytest.raises(TimeoutError):
        connection.drain_events(timeout=0.2)


def test_waiting_pops_nothing_and_leaves_no_command_pending(connection: Connection, broker: Any, prefix: str) -> None:
    channel = connection.channel()
    with Consumer(channel, [Queue("work"), Queue("play")]):
        wait_at(connection)
        while channel._asked != "wait":  # a slow machine needs more than that
            wait_at(connection)
        assert channel._in_poll is None
        assert broker.info("clients")["blocked_clients"] == 0
        publish(connection, "a", "b", queue="play")
        assert broker.llen(f"{prefix}play") == len("ab")
        assert broker.hlen(f"{prefix}unacked") == 0


@pytest.mark.parametrize("published_at", range(6))
def test_whenever_a_worker_dies_a_message_is_in_exactly_one_place(
    connection: Connection, broker: Any, prefix: str, published_at: int
) -> None:
    channel: Any = connection.channel()
    received: list[Any] = []
    with Consumer(channel, [Queue("work"), Queue("play")], on_message=received.append):
        for step in range(12):  # take, watch, wait: each is sent, then its answer is read
            if step == published_at:
                publish(connection, "a", queue="play", priority=9)
            if step % 2 == 0:
                connection.transport.cycle.on_poll_start()
            elif channel.client.connection.can_read(timeout=0.1):
                with suppress(Empty):
                    channel._brpop_read()
            with broker.pipeline(transaction=True) as at_once:  # the server may be about to run what was sent
                places = at_once.llen(f"{prefix}play{channel.sep}9").hlen(f"{prefix}unacked").execute()
            assert sum(places) == (step >= published_at)
        assert drain(connection, received, 1) == ["a"]


@pytest.mark.parametrize("priority", [0, 9])
def test_a_message_in_any_list_ends_the_wait(connection: Connection, priority: int) -> None:
    queues = [f"queue-{number}" for number in range(10)]
    kombu_internals.LONGEST_WAIT, before = 3600.0, kombu_internals.LONGEST_WAIT
    try:
        with consuming(connection, *queues) as received:
            for number, queue in enumerate(reversed(queues)):
                wait_at(connection)
                publish(connection, queue, queue=queue, priority=priority)
                assert drain(connection, received, number + 1)[-1] == queue
    finally:
        kombu_internals.LONGEST_WAIT = before


def test_a_message_that_comes_between_the_look_and_the_wait_is_taken(connection: Connection) -> None:
    channel: Any = connection.channel()
    received: list[Any] = []
    with Consumer(channel, [Queue("work"), Queue("play")], on_message=received.append):
        channel._all_empty = True
        connection.transport.cycle.on_poll_start()
        publish(connection, "a", queue="play")
        assert drain(connection, received, 1) == ["a"]


def test_a_queue_that_is_added_during_the_wait_is_watched(connection: Connection) -> None:
    received: list[Any] = []
    with Consumer(connection.channel(), [Queue("work")], on_message=received.append) as consumer:
        wait_at(connection)
        consumer.add_queue(Queue("play"))
        consumer.consume()
        wait_at(connection)
        publish(connection, "a", queue="play")
        assert drain(connection, received, 1) == ["a"]


def test_a_busy_worker_receives_no_changes(connection: Connection) -> None:
    channel: Any = connection.channel()
    received: list[Any] = []
    channel.basic_qos(0, 1, False)
    with Consumer(channel, [Queue("work"), Queue("play")], on_message=received.append):
        wait_at(connection)
        publish(connection, "a")
        drain(connection, received, 1)
        sock = channel.client.connection._sock
        publish(connection, "b", queue="play")
        wait_at(connection)
        assert channel.client.connection._sock is sock
        received[0].ack()
        assert drain(connection, received, 2) == ["a", "b"]


def test_a_server_that_reports_no_changes_is_asked_ten_times_a_second(
    server: Server, connection: Connection, broker: Any, prefix: str
) -> None:
    broker.acl_setuser(
        "app", enabled=True, nopass=True, keys=["*"], channels=["*"], commands=["+@all", "-client|tracking"]
    )
    url = server.url().replace("redis://", "redis://app:any@")
    options = {"global_keyprefix": prefix}
    with Connection(url, transport_options=options) as other, consuming(other, "work", "play") as received:
        for number, queue in enumerate(["work", "play"]):
            wait_at(other)
            publish(other, queue, queue=queue, priority=9)
            assert drain(other, received, number + 1)[-1] == queue
    broker.acl_deluser("app")


@pytest.mark.parametrize("busy", [0, 3])
def test_a_busy_queue_leaves_the_others_their_turn(connection: Connection, busy: int) -> None:
    for queue in ("work", "play", "rest"):
        publish(connection, *[queue] * 4, queue=queue, priority=busy)
    with consuming(connection, "work", "play", "rest") as received:
        assert sorted(drain(connection, received, 3)) == ["play", "rest", "work"]
        assert sorted(drain(connection, received, 12)) == sorted(["work", "play", "rest"] * 4)


def test_a_queue_whose_message_is_deferred_gives_up_its_turns_while_others_have_messages(
    connection: Connection,
) -> None:
    for queue in ("work", "play"):
        publish(connection, *[queue] * (TURNS + 2), queue=queue)
    with consuming(connection, "work", "play") as received:
        first = drain(connection, received, 1)[0]
        give_up_turns(received[0], first)
        bodies = drain(connection, received, 2 * TURNS)
        assert first not in bodies[1 : 1 + TURNS]
        assert first in bodies[1 + TURNS : 3 + TURNS]


def test_an_order_of_queues_that_the_user_has_set_stays(server: Server) -> None:
    with Connection(server.url(), transport_options={"queue_order_strategy": "priority"}) as connection:
        for queue in ("work", "play"):
            publish(connection, *[queue] * 3, queue=queue)
        with consuming(connection, "work", "play") as received:
            drain(connection, received, 1)
            give_up_turns(received[0], "work")
            assert drain(connection, received, 6) == ["work"] * 3 + ["play"] * 3


def test_a_server_that_is_out_of_memory_hands_out_its_messages_and_takes_acknowledgements(
    connection: Connection, broker: Any, prefix: str
) -> None:
    publish(connection, "a", "b")
    with consuming(connection, "work") as received:
        broker.config_set("maxmemory", "1")
        assert drain(connection, received, 2) == ["a", "b"]
        received[0].ack()
        assert broker.hlen(f"{prefix}unacked") == 1
        with pytest.raises(TimeoutError):
            connection.drain_events(timeout=0.3)
        received[0].channel.qos.restore_visible(interval=1)
        broker.config_set("maxmemory", "0")
        publish(connection, "c")
        assert drain(connection, received, 3)[-1] == "c"


def test_what_is_not_acknowledged_is_not_noted(connection: Connection, broker: Any, prefix: str) -> None:
    publish(connection, "a")
    with consuming(connection, "work", no_ack=True) as received:
        assert drain(connection, received, 1) == ["a"]
    assert broker.hlen(f"{prefix}unacked") == 0


def test_a_channel_that_is_done_with_replies_takes_tasks_in_one_step(
    connection: Connection, broker: Any, prefix: str
) -> None:
    channel = connection.channel()
    with Consumer(channel, [Queue("replies")], no_ack=True):  # as a worker that asks for its neighbours
        connection.transport.cycle.on_poll_start()
    received: list[Any] = []
    with Consumer(channel, [Queue("work")], on_message=received.append):
        publish(connection, "a", "b")
        assert drain(connection, received, 1) == ["a"]
        connection.transport.cycle.on_poll_start()
        wait_until(lambda: not broker.llen(f"{prefix}work"), what="the second message to be taken")
        assert broker.hlen(f"{prefix}unacked") == len("ab")


def test_without_emulated_acknowledgements_nothing_is_noted(
    connection: Connection, server: Server, broker: Any, prefix: str
) -> None:
    options = {"global_keyprefix": prefix, "ack_emulation": False}
    with Connection(server.url(), transport_options=options) as careless:
        publish(careless, "a")
        with consuming(careless, "work") as received:
            assert drain(careless, received, 1) == ["a"]
    assert broker.hlen(f"{prefix}unacked") == 0


def test_a_server_that_dies_in_mid_restore_is_waited_for_half_a_minute(connection: Connection) -> None:
    assert kombu_redis.Channel.unacked_mutex_expire > kombu_internals.TakingChannel.unacked_mutex_expire == 30
    assert connection.channel().qos.unacked_mutex_expire == 30


def test_a_lock_on_restoring_that_the_user_has_timed_stays_so(server: Server) -> None:
    kombu_internals.install("resilient.dead.undecodable")
    with Connection(server.url(), transport_options={"unacked_mutex_expire": 5}) as connection:
        assert connection.channel().qos.unacked_mutex_expire == 5


def test_a_channel_that_cannot_requeue_anything_closes_all_the_same(
    connection: Connection, broker: Any, prefix: str
) -> None:
    channel, _ = received_by_a_channel(connection)
    client, channel.connection.client = channel.connection.client, None
    channel._pool = None
    with pytest.raises(AttributeError):
        kombu_redis.QoS.restore_unacked_once(channel.qos)
    channel.qos.restore_unacked_once()
    channel.connection.client = client
    assert broker.hlen(f"{prefix}unacked") == 1


def test_what_is_acknowledged_after_its_channel_has_closed_is_left_alone(connection: Connection) -> None:
    channel, message = received_by_a_channel(connection)
    channel.close()
    channel._pool = None  # as when nothing could be requeued
    with pytest.raises(AttributeError):
        kombu_redis.QoS.ack(channel.qos, message.delivery_tag)
    message.ack()
    with consuming(connection, "work") as again:
        assert drain(connection, again, 1) == ["a"]
