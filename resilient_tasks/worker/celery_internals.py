"""Every touch of something that Celery or kombu do not document, in one place.

``tests/unit/test_celery_internals.py`` fails when one of them moves.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from typing import Any

import redis
from celery import Celery
from celery import current_app as _current_app
from celery.app.trace import fast_trace_task, trace_task_ret
from celery.app.utils import find_app
from celery.bootsteps import RUN
from celery.concurrency.thread import TaskPool as ThreadPool
from celery.utils.time import maybe_iso8601
from celery.worker import state as worker_state
from celery.worker.request import Request
from celery.worker.strategy import hybrid_to_proto2
from kombu import Producer
from kombu.exceptions import OperationalError
from kombu.message import Message
from kombu.serialization import prepare_accept_content
from kombu.transport.virtual import Channel as VirtualChannel
from kombu.transport.virtual import QoS as VirtualQoS
from kombu.utils.json import dumps, loads
from redis.backoff import NoBackoff
from redis.retry import Retry

logger = logging.getLogger("resilient_tasks")

TraceResult = tuple[int, Any, float]

#: Find an app as ``celery -A`` does: ``module``, ``module:attribute``, ``package``.
app_named: Callable[[str], Celery] = find_app

#: Forget that a request waits for or occupies a pool slot.
task_ready: Callable[[Request], None] = worker_state.task_ready

#: Ids that this worker is to revoke.
revoked_ids = worker_state.revoked

#: Stamps that this worker is to revoke: values by header, the latest last.
revoked_stamps: dict[str, list[Any]] = worker_state.revoked_stamps

#: The content types that a worker with these ``accept_content`` takes.
accepted_types: Callable[[object], Any] = prepare_accept_content

#: Read a moment as Celery reads ``eta`` and ``expires``.
read_moment: Callable[[object], datetime | None] = maybe_iso8601

encode_message: Callable[[object], str] = dumps
decode_message: Callable[[str | bytes], Any] = loads


def current_app() -> Celery:
    return _current_app._get_current_object()


def import_task_modules(app: Celery) -> None:
    app.loader.import_default_modules()


def shutting_down() -> bool:
    flags = worker_state.should_stop, worker_state.should_terminate  # exit codes: 0 is one as well
    return any(flag is not None and flag is not False for flag in flags)


def tracer(app: Celery) -> Callable[..., TraceResult]:
    chosen: Callable[..., TraceResult] = fast_trace_task if app.use_fast_trace_task else trace_task_ret
    return chosen


def parts_of(message: Any) -> dict[str, Any]:
    """Return what a request is made of, whatever protocol the message is written in."""
    if isinstance(message.payload, dict):  # protocol 1
        body, headers, decoded, utc = hybrid_to_proto2(message, message.payload)
        return {"body": body, "headers": headers, "decoded": decoded, "utc": utc}
    return {"body": message.body, "headers": message.headers, "decoded": False}


def drop_header_of_amqp(request_dict: dict[str, Any], header: str) -> None:
    """Take a header out of the message's properties, where AMQP has it as well."""
    properties = request_dict["properties"]
    headers = properties.get("application_headers")
    if isinstance(headers, dict) and header in headers:
        others = {name: value for name, value in headers.items() if name != header}
        request_dict["properties"] = {**properties, "application_headers": others}


def compose(channel: Any, body: Any, sent: Mapping[str, Any]) -> Any:
    """Return the message that ``Producer.publish(body, **sent)`` would send on a channel, and send nothing."""
    delivered_by = ("retry", "retry_policy", "declare", "compression")
    others = {name: value for name, value in sent.items() if name not in delivered_by}
    message = _Composer(channel, auto_declare=False).publish(body, **others)
    message.accept = {message.content_type}
    return message


class _Composer(Producer):
    """Composes messages instead of publishing them."""

    def _publish(self, *args: Any) -> Any:
        body, priority, content_type, content_encoding, headers, properties, routing_key, _, _, exchange, *_ = args
        channel, headers = self.channel, dict(headers)
        if is_emulated(channel):
            payload = channel.prepare_message(body, priority, content_type, content_encoding, headers, properties)
            channel._inplace_augment_message(payload, exchange, routing_key)
            return channel.Message(payload, channel)
        return Message(
            body,
            content_type=content_type,
            content_encoding=content_encoding,
            delivery_info={"exchange": exchange, "routing_key": routing_key},
            properties={**properties, "priority": priority},
            headers=headers,
            channel=channel,
        )


def broker_errors(connection: Any) -> tuple[type[Exception], ...]:
    """Return what a broker that is unavailable, or refuses something, raises; a ``KeyError`` may be any bug."""
    errors = *connection.connection_errors, *connection.channel_errors, OperationalError, OSError
    return tuple(error for error in errors if error is not KeyError)


def call_errbacks(backend: Any, context: Any, error: Exception) -> None:
    """Call the error callbacks of a task as its result backend does when it writes a FAILURE."""
    backend._call_task_errbacks(context, error, None)


def no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def is_emulated(channel: Any) -> bool:
    return isinstance(channel, VirtualChannel)


def plain_client(channel: Any) -> redis.Redis:
    """Return a client on the channel's own connections that adds no key prefix and tries nothing twice."""
    pool = channel.pool
    if "retry" not in pool.connection_kwargs:
        pool.connection_kwargs["retry"] = no_retry()
        pool.disconnect()
    return redis.Redis(connection_pool=pool)


def list_key(channel: Any, queue: str, priority: int = 0) -> str:
    return str(channel.global_keyprefix + channel._q_for_pri(queue, priority))


def queue_size(channel: Any, queue: str) -> int:
    return int(channel._size(queue))


def message_priority(channel: Any, raw: Mapping[str, Any]) -> int:
    return int(channel._get_message_priority(raw, reverse=False))


def unacked_keys(channel: Any) -> tuple[str, str]:
    return channel.global_keyprefix + channel.unacked_key, channel.global_keyprefix + channel.unacked_index_key


def emulates_acks(channel: Any) -> bool:
    return bool(channel.ack_emulation)


def forget_delivery(message: Any) -> None:
    """Acknowledge locally a message that a script has already taken out of the unacked hash."""
    VirtualQoS.ack(message.channel.qos, message.delivery_tag)
    message._state = "ACK"


def new_delivery_tag(channel: Any) -> str:
    return str(channel._next_delivery_tag())


def reserved_requests() -> list[Request]:
    return list(worker_state.reserved_requests)


def pause_queue(task_consumer: Any, queue: str) -> str | None:
    """Stop consuming a queue that still counts as one of the consumer's; return the tag, None if it is not consumed.

    Call it in the consumer's event loop. Where consuming is emulated, one more message may be on its way: it
    finds its callback and is handled like any other, instead of being thrown to the wrong end of its queue.
    """
    tag = task_consumer._active_tags.get(queue)
    if tag is None:
        return None
    channel = task_consumer.channel
    callbacks = channel.connection._callbacks if isinstance(channel, VirtualChannel) else {}
    callback = callbacks.get(queue)
    channel.basic_cancel(tag)
    if callback is not None:
        callbacks[queue] = callback
    return str(tag)


def unpause_queue(task_consumer: Any, queue: str, tag: str) -> bool:
    """Consume a paused queue again; False if its consumer was cancelled, or replaced, meanwhile."""
    if task_consumer._active_tags.get(queue) != tag:
        return False
    del task_consumer._active_tags[queue]
    task_consumer._basic_consume(
        task_consumer._queues[queue], consumer_tag=tag, no_ack=task_consumer.no_ack, nowait=False
    )
    return True


def filter_messages(consumer: Any, takes: Callable[[Any], bool]) -> None:
    """Let a worker's consumer handle only those task messages of which ``takes`` is true."""
    create = consumer.create_task_handler

    def create_filtered(*args: Any, **kwargs: Any) -> Callable[[Any], None]:
        handle = create(*args, **kwargs)

        def on_task_received(message: Any) -> None:
            if takes(message):
                handle(message)

        return on_task_received

    consumer.create_task_handler = create_filtered


def discards_unaccepted(pool: Any) -> bool:
    """Whether a pool throws away, when the connection is lost, what none of its processes has accepted yet."""
    return hasattr(getattr(pool, "_pool", None), "flush")  # that of prefork


def queue_of(task_consumer: Any, message: Any) -> str:
    info = message.delivery_info or {}
    tag = info.get("consumer_tag")
    for name, active in getattr(task_consumer, "_active_tags", {}).items():
        if tag is not None and active == tag:
            return str(name)
    consumed = [queue.name for queue in task_consumer.queues]
    exchange, routing_key = info.get("exchange") or "", info.get("routing_key") or ""
    if not (isinstance(exchange, str) and isinstance(routing_key, str)):  # forged
        return str(consumed[0])
    if not exchange:
        return routing_key
    routed = [name for name in message.channel._lookup(exchange, routing_key) if name in consumed]
    return str(routed[0] if routed else consumed[0])


def pool_name(pool: Any) -> str:
    return type(pool).__module__.rpartition(".")[2].replace("thread", "threads")


def is_running(consumer: Any) -> bool:
    """Whether a worker's consumer takes tasks: not before it has connected, nor once it is to stop."""
    return bool(consumer.blueprint.state == RUN and consumer.pool.active and not shutting_down())


def queues_inside(pool: Any) -> bool:
    """Whether a pool accepts any number of tasks and lets them wait inside for one of its threads."""
    return isinstance(pool, ThreadPool)


def can_grow(pool: Any) -> bool:
    return queues_inside(pool) or hasattr(pool, "grow")


def autoscale_maximum(consumer: Any) -> float:
    """Return the size up to which ``--autoscale`` lets the pool grow by itself; 0 if it does not."""
    autoscaler = getattr(consumer.controller, "autoscaler", None)
    return 0 if autoscaler is None else float(autoscaler.max_concurrency)


def add_slot(pool: Any) -> None:
    """Give a running pool one slot more, which takes a task at once; call it in the consumer's event loop."""
    if queues_inside(pool):
        executor = pool.executor
        with executor._shutdown_lock:
            executor._max_workers += 1
            executor._adjust_thread_count()
        pool.limit += 1
    elif discards_unaccepted(pool):
        _fork_one_more(pool._pool)
    else:
        pool.grow(1)
        # Celery 5.6 raises the number of gevent's semaphore and wakes no waiter
        semaphore = getattr(getattr(pool, "_pool", None), "_semaphore", None)
        if semaphore is not None and semaphore.acquire(blocking=False):
            semaphore.release()


def _fork_one_more(pool: Any) -> None:
    """``grow`` raises a number only, and the process is forked up to 5 s later; its semaphore lets two tasks in."""
    pool._processes += 1
    try:
        pool.on_grow(1)
        pool.maintain_pool()
    except BaseException:
        pool._processes -= 1
        raise
    if pool._putlock is not None:
        pool._putlock.initial_value += 1
        pool._putlock.release()


def remove_slot(pool: Any) -> bool:
    """Take one slot back from a running pool, in the consumer's event loop; False: all have something to do."""
    if queues_inside(pool):
        return _end_one_thread(pool)
    if discards_unaccepted(pool):
        return _end_one_process(pool._pool)
    if pool.is_green and pool._pool.free_count() < 1:
        return False
    try:
        pool.shrink(1)
    except ValueError:  # all processes are busy
        return False
    return True


def _end_one_process(pool: Any) -> bool:
    """``shrink`` takes a process for idle to which a task was written that it has not accepted yet, and kills it."""
    for process in list(pool._pool):
        is_up = process.inqW_fd in pool._all_inqueues
        if is_up and process.inqW_fd not in pool._busy_workers and not pool._worker_active(process):
            pool._processes -= 1
            if pool._putlock is not None:
                pool._putlock.shrink()
            process.terminate_controlled()
            pool.on_shrink(1)
            return True
    return False


def _end_one_thread(pool: Any) -> bool:
    executor = pool.executor
    if not executor._idle_semaphore.acquire(blocking=False):
        return False
    executor._max_workers -= 1
    pool.limit -= 1
    executor._work_queue.put(_LastItem(executor))
    return True


class _ThreadEndsError(BaseException):
    """Ends a thread of an executor, which has no other way to have fewer."""


class _LastItem:
    """The last work item of one thread."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor

    def run(self, *_: Any) -> None:
        self._executor._threads.discard(threading.current_thread())
        raise _ThreadEndsError


logging.getLogger("concurrent.futures").addFilter(
    lambda record: record.exc_info is None or record.exc_info[0] is not _ThreadEndsError
)


def change_prefetch(consumer: Any, slots: int) -> None:
    """Let a worker prefetch for so many slots more, or fewer, as Celery's ``pool_grow`` and ``pool_shrink`` do."""
    if consumer.initial_prefetch_count:
        consumer.initial_prefetch_count += slots * consumer.prefetch_multiplier
        if consumer.qos is not None:
            consumer._update_qos_eventually(slots)


def submit(consumer: Any, request: Request) -> None:
    """Hand a request to the pool, from any of a worker's threads: at once, or when the pool has a slot for it."""
    if consumer.pool.is_green:  # a greenlet that has just run a task would wait for its own slot
        consumer.timer.call_after(0, consumer.on_task_request, (request,))
    else:
        consumer.on_task_request(request)


#: Events in one message.
MOST_EVENTS = 500


class Events:
    """Sends events from one thread on a connection of its own, best-effort.

    With a worker's consumer they are sent as far as it sends any, under its name; without one this process is no
    worker, and they are sent under the name of the worker that has reported the task as deferred.
    """

    def __init__(self, app: Celery, consumer: Any = None) -> None:
        self._app, self._consumer = app, consumer
        self.hostname: str = consumer.hostname if consumer else socket.gethostname()
        self._connection: Any = None
        self._dispatchers: dict[str, Any] = {}
        self._errors = broker_errors(app.connection_for_write())

    def dispatcher(self, reported_by: str) -> Any:
        """Return the event dispatcher for a task that a worker has reported as deferred; None if none is to be used."""
        name, groups = reported_by, None
        if self._consumer is not None:
            own = self._consumer.event_dispatcher
            name, groups = (self.hostname, own.groups) if own is not None and own.enabled else ("", None)
        if name and name not in self._dispatchers:
            self._connection = self._connection or self._app.connection_for_write()
            self._dispatchers[name] = self._app.events.Dispatcher(
                self._connection, hostname=name, buffer_while_offline=False, groups=groups,
                buffer_group={"task"}, buffer_limit=MOST_EVENTS,
            )  # fmt: skip
        return self._dispatchers.get(name)

    def send(self, kind: str, reported_by: str, *, in_bulk: bool = False, **fields: Any) -> None:
        with self._best_effort(kind):
            dispatcher = self.dispatcher(reported_by)
            if dispatcher is not None:
                dispatcher.send(kind, **fields)
        if not in_bulk:
            self.flush()

    def flush(self) -> None:
        """Send what was to be sent in bulk, each worker's in one message, as Celery's own workers do."""
        with self._best_effort("task-multi"):
            for dispatcher in self._dispatchers.values():
                dispatcher.flush(errors=False)

    @contextmanager
    def _best_effort(self, kind: str) -> Iterator[None]:
        try:
            yield
        except self._errors as exc:  # the task comes first
            logger.warning("event %s was not sent: %s", kind, type(exc).__name__)
            self.close()

    def close(self) -> None:
        connection, self._connection = self._connection, None
        dispatchers, self._dispatchers = self._dispatchers, {}
        for closing in (*dispatchers.values(), *filter(None, [connection])):
            with suppress(*self._errors):
                closing.close()
