"""What the library takes for granted of Celery and kombu and neither documents: a release that moves it fails here."""

from __future__ import annotations

import inspect
import json
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import amqp
import pytest
from billiard.pool import Pool as BilliardPool
from celery import Celery
from celery.app.task import Context
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.concurrency import prefork, solo, thread
from celery.concurrency.asynpool import AsynPool
from celery.exceptions import Ignore, InvalidTaskError, TaskRevokedError
from celery.worker import control, loops, state, strategy
from celery.worker import worker as worker_module
from celery.worker.autoscale import Autoscaler
from celery.worker.autoscale import WorkerComponent as AutoscaleStep
from celery.worker.consumer import Consumer
from celery.worker.request import Request, create_request_cls
from kombu import Connection, Exchange, Producer, Queue
from kombu import Consumer as MessageConsumer
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.transport.pyamqp import Message as AMQPMessage

from resilient_tasks.worker import celery_internals
from workers.processes import Server, wait_until


@pytest.fixture
def app() -> Celery:
    app = Celery("internals", broker="memory://", backend="cache+memory://", set_as_current=False)

    @app.task(name="double", shared=False)
    def double(number: int) -> int:
        return 2 * number

    app.finalize()
    return app


@pytest.fixture
def channel(server: Server) -> Iterator[Any]:
    with Connection(server.url(0), transport_options={"global_keyprefix": "pre."}) as connection:
        channel = connection.default_channel
        celery_internals.plain_client(channel).flushdb()
        yield channel


def test_a_consumers_loop_asks_for_its_handler_by_name(app: Celery) -> None:
    assert "obj.create_task_handler()" in inspect.getsource(loops.asynloop)
    assert "obj.create_task_handler()" in inspect.getsource(loops.synloop)
    taken: list[Any] = []
    consumer = SimpleNamespace(create_task_handler=lambda: taken.append)
    celery_internals.filter_messages(consumer, lambda message: message != "bad")
    handle = consumer.create_task_handler()
    for message in ("good", "bad"):
        handle(message)
    assert taken == ["good"]
    assert callable(Consumer.create_task_handler)


def test_only_prefork_discards_what_no_process_has_accepted(app: Celery) -> None:
    assert "job.discard()" in inspect.getsource(AsynPool.flush)
    assert "self.pool.flush()" in inspect.getsource(Consumer.on_close)
    forking = prefork.TaskPool(1, app=app)
    forking._pool = object.__new__(AsynPool)
    assert celery_internals.discards_unaccepted(forking)
    assert not celery_internals.discards_unaccepted(solo.TaskPool(app=app))
    assert not celery_internals.discards_unaccepted(thread.TaskPool(1, app=app))


def request_of(app: Celery, base: type = Request, **headers: Any) -> Any:
    body = json.dumps([[21], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}])
    message = SimpleNamespace(
        headers={"id": "an-id", "task": "double", "lang": "py", **headers}, body=body, payload=json.loads(body),
        content_type="application/json", content_encoding="utf-8", delivery_info={}, properties={},
    )  # fmt: skip
    return base(message, app=app, task=app.tasks["double"])


# --- the worker's state ---------------------------------------------------------------------------


def test_task_ready_forgets_a_request(app: Celery) -> None:
    request = request_of(app)
    state.task_reserved(request)
    assert request in state.reserved_requests
    assert state.requests["an-id"] is request
    celery_internals.task_ready(request)
    assert request not in state.reserved_requests
    assert "an-id" not in state.requests


def test_revoked_ids_are_those_that_the_revoke_command_adds_to(app: Celery) -> None:
    celery_internals.revoked_ids.add("revoked-id")
    try:
        assert "revoked-id" in list(state.revoked)
        assert request_of(app, id="revoked-id").id in celery_internals.revoked_ids
    finally:
        celery_internals.revoked_ids.discard("revoked-id")


def test_revoked_stamps_are_lists_that_the_command_adds_to() -> None:
    revoke: Any = control.revoke_by_stamped_headers
    try:
        revoke(SimpleNamespace(), {"tenant": "acme"})
        revoke(SimpleNamespace(), {"tenant": ["bolt"], "user": [1]})
        assert celery_internals.revoked_stamps == {"tenant": ["acme", "bolt"], "user": [1]}
    finally:
        celery_internals.revoked_stamps.clear()


@pytest.mark.parametrize("flag", ["should_stop", "should_terminate"])
@pytest.mark.parametrize("exit_code", [0, True])
def test_shutting_down_is_shown_by_two_flags_that_hold_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, flag: str, exit_code: int
) -> None:
    assert (state.should_stop, state.should_terminate) == (None, None)
    assert not celery_internals.shutting_down()
    monkeypatch.setattr(state, flag, exit_code)
    assert celery_internals.shutting_down()


def test_error_callbacks_are_called_as_the_backend_calls_them(app: Celery) -> None:
    called: list[Any] = []

    @app.task(name="note-failure", shared=False)
    def note(request: Any, error: Any, traceback: Any) -> None:
        called.append((request.id, error, traceback))

    request = request_of(app)
    request._context.errbacks = [note.s()]
    error = ValueError("no")
    celery_internals.call_errbacks(app.backend, request._context, error)
    assert called == [("an-id", error, None)]


@pytest.mark.parametrize("protocol", [1, 2])
def test_a_request_is_made_of_a_message_of_either_protocol(app: Celery, protocol: int) -> None:
    write = {1: app.amqp.as_task_v1, 2: app.amqp.as_task_v2}[protocol]
    headers, _, body, _ = write("an-id", "double", (21,), errbacks=["an-errback"])
    message = SimpleNamespace(
        headers=headers, properties={}, payload=json.loads(json.dumps(body)), body=json.dumps(body), delivery_info={},
        content_type="application/json", content_encoding="utf-8",
    )  # fmt: skip
    request = Request(message, app=app, task=app.tasks["double"], **celery_internals.parts_of(message))
    assert (request.id, request.args, request.kwargs) == ("an-id", [21], {})
    assert request._context.errbacks == ["an-errback"]


@pytest.mark.parametrize("accepted", [["json"], ["json", "pickle"]])
def test_accepted_types_are_those_that_a_worker_takes(app: Celery, accepted: list[str]) -> None:
    app.conf.accept_content = accepted
    with app.connection_for_read() as connection:
        consumer = MessageConsumer(connection, auto_declare=False, accept=app.conf.accept_content)
        assert celery_internals.accepted_types(app.conf.accept_content) == consumer.accept


@pytest.mark.parametrize("text", ["2030-01-01T00:00:00Z", "2030-01-01T00:00:00.5+02:00", "2030-01-01T00:00:00"])
def test_a_moment_is_read_as_a_request_reads_it(app: Celery, text: str) -> None:
    moment, expires = celery_internals.read_moment(text), request_of(app, expires=text).expires
    assert moment is not None
    assert moment.replace(tzinfo=None) == expires.replace(tzinfo=None)
    assert celery_internals.read_moment(None) is None


# --- running a task -------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_tracer_is_what_celery_itself_would_use(app: Celery, fast: bool) -> None:  # noqa: FBT001
    app.use_fast_trace_task = fast
    request_class = create_request_cls(
        Request, app.tasks["double"], SimpleNamespace(apply_async=None), "", None, app=app
    )
    closure = inspect.getclosurevars(request_class.execute_using_pool).nonlocals
    assert celery_internals.tracer(app) is closure["trace"] is (fast_trace_task if fast else trace_task_ret)


def test_a_tracer_takes_the_message_and_returns_failed_value_and_runtime(app: Celery) -> None:
    request = request_of(app)
    failed, value, runtime = celery_internals.tracer(app)(
        request.type, request.id, request.request_dict, request.body, request.content_type, request.content_encoding,
        app=app,
    )  # fmt: skip
    assert (failed, value) == (0, "42")
    assert runtime >= 0


def test_an_ignore_leaves_neither_result_nor_callbacks(app: Celery) -> None:
    @app.task(name="ignoring", shared=False, on_failure=lambda *_: pytest.fail("on_failure was called"))
    def ignoring() -> None:
        raise Ignore

    result = ignoring.apply(throw=False)
    assert result.state == "IGNORED"
    assert app.AsyncResult(result.id).state == "PENDING"


# --- the derived request class, the pool's slot, the strategy -----------------------------------------


def test_celery_derives_a_request_class_that_overrides_two_methods(app: Celery) -> None:
    class Ours(Request):
        pass

    derived = create_request_cls(Ours, app.tasks["double"], SimpleNamespace(apply_async=None), "", None, app=app)
    overridden = {name for name in vars(derived) if not name.startswith("__")}
    assert overridden == {"execute_using_pool", "on_success"}
    assert derived.__mro__[1] is Ours


def test_the_derived_class_submits_what_we_submit(app: Celery) -> None:
    submitted: list[tuple[tuple, dict]] = []

    def apply_async(*args: Any, **options: Any) -> None:
        submitted.append((args, options))

    pool = SimpleNamespace(apply_async=apply_async)
    derived = create_request_cls(Request, app.tasks["double"], pool, "", None, app=app)
    request = request_of(app, derived)
    request.execute_using_pool(pool)
    (trace, *_), options = submitted[0]
    assert trace is celery_internals.tracer(app)
    assert options.pop("args") == (
        request.type, request.id, request.request_dict, request.body, request.content_type, request.content_encoding,
    )  # fmt: skip
    assert set(options) == {
        "accept_callback", "timeout_callback", "callback", "error_callback", "soft_timeout", "timeout",
        "correlation_id",
    }  # fmt: skip


@pytest.mark.parametrize("refused", [True, False])
def test_a_task_revoked_at_submission_frees_its_pool_slot(refused: bool) -> None:  # noqa: FBT001
    released = []

    def execute_using_pool(_pool: object) -> None:
        if refused:
            raise TaskRevokedError("an-id")

    worker = SimpleNamespace(pool=None, _quick_release=lambda: released.append(1))
    worker_module.WorkController._process_task(worker, SimpleNamespace(execute_using_pool=execute_using_pool))
    assert len(released) == refused


def test_the_signature_of_a_strategy_and_of_its_handler(app: Celery) -> None:
    assert list(inspect.signature(strategy.default).parameters)[:3] == ["task", "app", "consumer"]
    needed = [
        "hostname", "connection_errors", "event_dispatcher", "timer", "apply_eta_task", "disable_rate_limits",
        "task_buckets", "on_task_request", "_limit_task", "_limit_post_eta", "controller",
    ]  # fmt: skip
    source = inspect.getsource(strategy.default)
    assert all(f"consumer.{name}" in source for name in needed)
    handler = strategy.default(app.tasks["double"], app, _Anything())
    assert list(inspect.signature(handler).parameters)[:5] == ["message", "body", "ack", "reject", "callbacks"]


def test_a_consumer_reports_a_message_that_its_strategy_finds_invalid() -> None:
    reported: list[Exception] = []

    def invalid(*_: Any) -> None:
        raise InvalidTaskError("not a task")

    consumer = SimpleNamespace(
        strategies={"double": invalid}, on_unknown_message=None, on_unknown_task=None, on_task_message=(),
        on_invalid_task=lambda _body, _message, exc: reported.append(exc), call_soon_ack=None, call_soon=None,
        _restore_prefetch_count_after_connection_restart=None, _maximum_prefetch_restored=True,
    )  # fmt: skip
    on_task_received = Consumer.create_task_handler(consumer, promise=lambda *_, **__: None)
    on_task_received(SimpleNamespace(headers={"task": "double"}, ack_log_error=None, reject_log_error=None))
    assert [type(exc) for exc in reported] == [InvalidTaskError]


class _Anything:
    """Has whatever attribute it is asked for."""

    def __getattr__(self, name: str) -> Any:
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _Anything()


# --- kombu's Redis transport --------------------------------------------------------------------------


def publish(channel: Any, queue: str, **options: Any) -> None:
    Producer(channel).publish({"hello": 1}, routing_key=queue, declare=[Queue(queue)], **options)


def receive(channel: Any, *queues: Queue) -> tuple[Any, MessageConsumer]:
    received: list[Any] = []
    consumer = MessageConsumer(channel, queues=list(queues), on_message=received.append)
    consumer.consume()
    channel.connection.client.drain_events(timeout=60)
    return received[0], consumer


@pytest.mark.parametrize("priority", [0, 3, 9])
def test_messages_lie_in_the_list_that_we_say(channel: Any, priority: int) -> None:
    publish(channel, "shop", priority=priority)
    raw = {"properties": {"priority": priority}}
    key = celery_internals.list_key(channel, "shop", celery_internals.message_priority(channel, raw))
    assert key.startswith("pre.shop")
    waiting = celery_internals.plain_client(channel).lrange(key, 0, -1)
    assert [celery_internals.decode_message(text)["properties"]["priority"] for text in waiting] == [priority]
    assert celery_internals.queue_size(channel, "shop") == 1


def test_a_delivered_message_lies_in_the_unacknowledged_hash_and_its_index(channel: Any) -> None:
    publish(channel, "shop")
    message, _ = receive(channel, Queue("shop"))
    unacked, index = celery_internals.unacked_keys(channel)
    client = celery_internals.plain_client(channel)
    assert celery_internals.emulates_acks(channel)
    assert client.hkeys(unacked) == [message.delivery_tag.encode()] == client.zrange(index, 0, -1)


def test_a_message_that_a_script_took_is_forgotten_without_touching_redis(channel: Any) -> None:
    publish(channel, "shop")
    message, _ = receive(channel, Queue("shop"))
    celery_internals.forget_delivery(message)
    assert message.acknowledged
    assert celery_internals.plain_client(channel).hlen(celery_internals.unacked_keys(channel)[0]) == 1
    channel.qos.restore_unacked_once()
    assert celery_internals.queue_size(channel, "shop") == 0


def test_a_message_survives_the_way_through_our_encoding(channel: Any) -> None:
    publish(channel, "shop", headers={"id": "an-id"}, priority=3)
    message, _ = receive(channel, Queue("shop"))
    again = channel.Message(
        celery_internals.decode_message(celery_internals.encode_message(message.serializable())), channel=channel
    )
    assert (again.payload, again.headers, again.properties) == (message.payload, message.headers, message.properties)


def test_fresh_delivery_tags_differ(channel: Any) -> None:
    assert celery_internals.new_delivery_tag(channel) != celery_internals.new_delivery_tag(channel)


@pytest.mark.parametrize(
    ("kind", "binding", "routing_key"),
    [("", "", "shop"), ("direct", "shop.new", "shop.new"), ("topic", "shop.*", "shop.new")],
)
def test_the_queue_that_a_message_came_from(channel: Any, kind: str, binding: str, routing_key: str) -> None:
    exchange = Exchange(f"an-exchange-{kind}", kind) if kind else Exchange("")
    queues = [Queue("other"), Queue("shop", exchange if kind else None, routing_key=binding)]
    for queue in queues:
        queue(channel).declare()
    Producer(channel).publish({}, exchange=exchange, routing_key=routing_key)
    message, consumer = receive(channel, *queues)
    assert celery_internals.queue_of(consumer, message) == "shop"


@pytest.mark.parametrize(
    "forged", [{"exchange": ["x"], "routing_key": "shop"}, {"exchange": "", "routing_key": {"a": 1}}]
)
def test_a_forged_route_leads_to_a_queue_that_is_consumed(forged: dict[str, Any]) -> None:
    consumer = SimpleNamespace(queues=[Queue("shop")])
    message = SimpleNamespace(delivery_info=forged, channel=None)
    assert celery_internals.queue_of(consumer, message) == "shop"


def test_what_an_emulated_broker_takes_back_goes_to_the_end(app: Celery) -> None:
    with app.connection_for_read() as connection:
        queue = Queue("taken-back")(connection.default_channel)
        for number in range(3):
            Producer(connection).publish(number, exchange="", routing_key="taken-back", declare=[queue])
        assert celery_internals.is_emulated(connection.default_channel)
        queue.get().requeue()
        assert [queue.get(no_ack=True).payload for _ in range(3)] == [1, 2, 0]


def test_on_amqp_the_consumer_tag_names_the_queue() -> None:
    consumer = SimpleNamespace(_active_tags={"shop": "tag-1", "other": "tag-2"})
    message = SimpleNamespace(delivery_info={"consumer_tag": "tag-2"}, channel=None)
    assert celery_internals.queue_of(consumer, message) == "other"


def test_amqp_gives_a_task_its_headers_twice(app: Celery) -> None:
    headers = {"id": "an-id", "task": "double", "ours": 1, "theirs": 2}
    sent = amqp.Message("[[21], {}, {}]", content_type="application/json", application_headers=headers)
    sent.delivery_info = {"delivery_tag": 1}
    message = AMQPMessage(sent, channel=SimpleNamespace(no_ack_consumers=None))
    request = Request(message, app=app, task=app.tasks["double"], body=message.body, headers=message.headers)
    celery_internals.drop_header_of_amqp(request.request_dict, "ours")
    seen = Context(request.request_dict)
    assert seen.properties["application_headers"] == {"id": "an-id", "task": "double", "theirs": 2}
    assert message.properties["application_headers"] == message.headers == headers


def test_the_current_app_is_no_proxy(app: Celery) -> None:
    app.set_current()
    try:
        assert celery_internals.current_app() is app
    finally:
        Celery("another").set_current()


def test_a_paused_queue_gets_what_was_on_its_way_and_nothing_more(channel: Any) -> None:
    received: list[Any] = []
    consumer: Any = MessageConsumer(channel, queues=[Queue("shop"), Queue("other")], on_message=received.append)
    consumer.consume()
    with pytest.raises(TimeoutError):
        channel.connection.client.drain_events(timeout=0.1)  # leaves a BRPOP of both queues under way
    tag = celery_internals.pause_queue(consumer, "shop")
    assert tag is not None
    for _ in range(3):
        publish(channel, "shop")
    publish(channel, "other")
    for _ in range(2):
        channel.connection.client.drain_events(timeout=60)
    assert [message.delivery_info["routing_key"] for message in received] == ["shop", "other"]
    assert [queue.name for queue in consumer.queues] == ["shop", "other"]  # it still counts as consumed
    assert celery_internals.queue_size(channel, "shop") == 2
    assert celery_internals.unpause_queue(consumer, "shop", tag)
    for _ in range(2):
        channel.connection.client.drain_events(timeout=60)
    assert len(received) == 4


def test_a_queue_that_was_cancelled_meanwhile_is_not_consumed_again(channel: Any) -> None:
    consumer = MessageConsumer(channel, queues=[Queue("shop")], on_message=lambda _: None)
    assert celery_internals.pause_queue(consumer, "shop") is None
    consumer.consume()
    tag = celery_internals.pause_queue(consumer, "shop")
    assert tag is not None
    consumer.cancel_by_queue("shop")
    assert not celery_internals.unpause_queue(consumer, "shop", tag)
    consumer.add_queue(Queue("shop"))
    consumer.consume()
    assert not celery_internals.unpause_queue(consumer, "shop", tag)
    assert consumer.consuming_from("shop")


def test_requests_that_wait_for_a_slot_are_reserved(app: Celery) -> None:
    request = request_of(app)
    state.task_reserved(request)
    assert request in celery_internals.reserved_requests()
    state.task_ready(request)


@pytest.mark.parametrize("name", ["workers.app", "workers.app:app"])
def test_an_app_is_found_by_the_name_that_the_command_line_takes(name: str) -> None:
    assert celery_internals.app_named(name).main == "workers"


def test_the_modules_that_an_app_includes_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    celery_internals.import_task_modules(Celery("internals", include=["colorsys"], set_as_current=False))
    assert "colorsys" in sys.modules


# --- composing a message ------------------------------------------------------------------------------


def test_a_composed_message_is_the_one_that_would_be_published(channel: Any) -> None:
    queue, sent = Queue("here", Exchange("to-here"), routing_key="here"), {
        "exchange": "to-here", "routing_key": "here", "serializer": "json", "headers": {"id": "1", "task": "double"},
        "priority": 3, "correlation_id": "1", "reply_to": "replies", "expiration": 2.5, "retry": True,
        "retry_policy": {"max_retries": 1}, "compression": "zlib",
    }  # fmt: skip
    composed = celery_internals.compose(channel, ((1,), {}, {}), sent)
    with Producer(channel) as producer:
        producer.publish(((1,), {}, {}), declare=[queue], **sent)
    published = queue(channel).get(accept=["json"])
    raw, expected = composed.serializable(), published.serializable()
    for one in (raw, expected):
        del one["properties"]["delivery_tag"]
    assert raw == expected
    assert composed.payload == published.payload


def test_a_message_for_amqp_is_composed_without_asking_the_broker() -> None:
    with Connection("amqp://user@nowhere.invalid") as connection:
        channel = SimpleNamespace(connection=SimpleNamespace(client=connection))
        sent = {
            "exchange": "to-here",
            "routing_key": "here",
            "serializer": "json",
            "headers": {"id": "1"},
            "priority": 3,
        }
        composed = celery_internals.compose(channel, ((1,), {}, {}), sent)
    assert composed.delivery_info == {"exchange": "to-here", "routing_key": "here"}
    assert (composed.properties["priority"], composed.properties["delivery_mode"]) == (3, 2)
    assert (composed.headers, composed.payload) == ({"id": "1"}, [[1], {}, {}])


# --- pools that grow --------------------------------------------------------------------------------


def test_a_forked_pool_grows_by_what_grow_and_maintain_pool_do() -> None:
    grow, shrink = inspect.getsource(BilliardPool.grow), inspect.getsource(BilliardPool.shrink)
    assert all(part in grow for part in ("self._processes += 1", "self._putlock.grow()", "self.on_grow(n)"))
    parts = ("self._iterinactive()", "self._processes -= 1", "self._putlock.shrink()", "terminate_controlled()")
    assert all(part in shrink for part in (*parts, "self.on_shrink(1)"))
    assert "self._repopulate_pool(joined)" in inspect.getsource(BilliardPool._maintain_pool)
    assert "self._processes - len(self._pool)" in inspect.getsource(BilliardPool._repopulate_pool)
    up = inspect.getsource(AsynPool.on_process_alive)
    assert "self._all_inqueues.add(proc.inqW_fd)" in up
    assert "mark_worker_as_busy(ready_fd)" in inspect.getsource(AsynPool._create_write_handlers)
    assert "self._mark_worker_as_available(inqW_fd)" in inspect.getsource(AsynPool.on_job_ready)


def test_one_slot_more_lets_one_waiting_task_in() -> None:
    semaphore = LaxBoundedSemaphore(1)
    started: list[int] = []
    for number in range(3):
        semaphore.acquire(started.append, number)
    forked: list[int] = []
    pool: Any = SimpleNamespace(_processes=1, on_grow=forked.append, _putlock=semaphore)
    pool.maintain_pool = lambda: forked.append(pool._processes)
    celery_internals._fork_one_more(pool)
    assert (started, forked, pool._processes) == ([0, 1], [1, 2], 2)
    semaphore.acquire(started.append, 3)
    assert started == [0, 1]
    semaphore.release()
    assert started == [0, 1, 2]


def test_a_pool_that_cannot_fork_stays_as_it_was() -> None:
    def refuse() -> None:
        raise OSError("out of memory")

    semaphore = LaxBoundedSemaphore(1)
    pool = SimpleNamespace(_processes=1, on_grow=lambda _: None, maintain_pool=refuse, _putlock=semaphore)
    with pytest.raises(OSError, match="out of memory"):
        celery_internals._fork_one_more(pool)
    assert (pool._processes, semaphore.initial_value) == (1, 1)


def test_a_process_to_which_a_task_was_written_is_not_ended() -> None:
    ended: list[int] = []

    def process(fd: int) -> Any:
        return SimpleNamespace(inqW_fd=fd, terminate_controlled=lambda: ended.append(fd))

    running, written, starting, idle = map(process, range(4))
    pool = SimpleNamespace(
        _pool=[running, written, starting, idle],
        _all_inqueues={0, 1, 3},
        _busy_workers={1},
        _worker_active=lambda worker: worker is running,
        _processes=4,
        _putlock=LaxBoundedSemaphore(4),
        on_shrink=lambda _: None,
    )
    assert celery_internals._end_one_process(pool)
    assert (ended, pool._processes, pool._putlock.initial_value) == ([3], 3, 3)
    pool._busy_workers.add(3)
    assert not celery_internals._end_one_process(pool)


def test_a_pool_of_threads_grows_and_shrinks_at_once(app: Celery, caplog: pytest.LogCaptureFixture) -> None:
    pool = thread.TaskPool(1, app=app)
    assert celery_internals.queues_inside(pool)
    go_on, ran = threading.Event(), threading.Event()
    first = pool.executor.submit(go_on.wait)
    second = pool.executor.submit(ran.set)
    celery_internals.add_slot(pool)
    assert ran.wait(60), "a thread of its own takes what waits"
    second.result(10)
    wait_until(lambda: pool.executor._idle_semaphore._value)
    assert pool.num_processes == 2
    assert celery_internals.remove_slot(pool)
    wait_until(lambda: len(pool.executor._threads) == 1)
    assert not celery_internals.remove_slot(pool), "the other one is busy"
    go_on.set()
    assert first.result(10)
    assert pool.executor.submit(lambda: 5).result(10) == 5
    assert pool.num_processes == 1
    assert not caplog.records
    pool.on_stop()


def test_the_green_pool_grows_where_its_submitter_waits(app: Celery) -> None:
    gevent = pytest.importorskip("gevent")
    pool = pytest.importorskip("celery.concurrency.gevent").TaskPool(1, app=app)
    pool.on_start()
    busy, ran = pool._pool.spawn(gevent.sleep, 60), threading.Event()
    submitter = gevent.spawn(pool._pool.spawn, ran.set)
    gevent.sleep(0)  # now it waits for a slot
    celery_internals.add_slot(pool)
    submitter.join(10)
    assert submitter.successful()
    pool._pool.join(0.1)
    assert ran.is_set()
    busy.kill()
    assert celery_internals.can_grow(SimpleNamespace(grow=None))
    assert not celery_internals.can_grow(solo.TaskPool(app=app))
    assert celery_internals.pool_name(solo.TaskPool(app=app)) == "solo"


def test_the_prefetch_count_follows_the_pool() -> None:
    source = inspect.getsource(Consumer._update_prefetch_count)
    assert "self.initial_prefetch_count = (" in source
    assert "self._update_qos_eventually(index)" in source
    assert "consumer._update_prefetch_count(n)" in inspect.getsource(control.pool_grow)
    qos: list[int] = []
    consumer = SimpleNamespace(
        initial_prefetch_count=8, prefetch_multiplier=4, qos=object(), _update_qos_eventually=qos.append
    )
    celery_internals.change_prefetch(consumer, 1)
    assert (consumer.initial_prefetch_count, qos) == (12, [1])
    consumer.initial_prefetch_count = 0
    celery_internals.change_prefetch(consumer, 1)
    assert (consumer.initial_prefetch_count, qos) == (0, [1]), "0 means no limit"


def test_autoscale_says_how_far_it_goes(app: Celery) -> None:
    assert "self.max_concurrency = max_concurrency" in inspect.getsource(Autoscaler.__init__)
    assert "w.autoscaler = None" in inspect.getsource(AutoscaleStep.__init__)
    consumer = SimpleNamespace(controller=SimpleNamespace(autoscaler=SimpleNamespace(max_concurrency=5)))
    assert celery_internals.autoscale_maximum(consumer) == 5
    consumer.controller.autoscaler = None
    assert celery_internals.autoscale_maximum(consumer) == 0
