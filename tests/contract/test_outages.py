"""The store itself is unavailable, frozen, emptied, restarted, or no store at all."""

from __future__ import annotations

import http.server
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis

from resilient_tasks.core.model import Calls, Grant, Outcome, Snapshot, State, Verb
from resilient_tasks.errors import ConfigurationError, StoreError
from resilient_tasks.policy import BreakerPolicy
from resilient_tasks.store.base import Evidence, Spec
from resilient_tasks.store.redis import RedisStore
from tests.support.servers import Cluster, start_cluster_node
from workers.processes import Server, free_port, start_valkey, wait_until

PAYMENTS = Spec("payments", BreakerPolicy(minimum_calls=5, trial_calls=1, open_duration=60.0))
FAILURES = (Calls(Outcome.FAILURE, 5),)
TIMEOUT = 30.0  # s; far below redis-py's defaults (ten tries of five seconds), far above a noisy machine's hiccups


def new_store(url: str, *, timeout: float = 20.0, **options: Any) -> RedisStore:
    return RedisStore(url, namespace="test", timeout=timeout, **options)


def opened(store: RedisStore) -> int:
    answer = store.record(PAYMENTS, Evidence(store.read([PAYMENTS])[0].epoch, FAILURES))
    assert answer.snapshot.state is State.OPEN
    return answer.snapshot.epoch


@contextmanager
def takes_less_than(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


# --- what the server forgets ------------------------------------------------------------------------


def test_flushed_scripts_are_loaded_again(server: Server, shared_store: RedisStore) -> None:
    opened(shared_store)
    with redis.Redis.from_url(server.url()) as client:
        for use in (
            lambda: shared_store.read([PAYMENTS, Spec("mail")]),
            lambda: shared_store.acquire(PAYMENTS, "a", lease=1),
            lambda: shared_store.advance(PAYMENTS),
            lambda: shared_store.ledger.add_deferred("payments", "task"),
        ):
            client.script_flush()
            use()
    assert shared_store.read([PAYMENTS])[0].state is State.OPEN


def test_an_emptied_store_starts_afresh_and_matches_no_stale_outcome(server: Server, shared_store: RedisStore) -> None:
    stale = opened(shared_store)
    with redis.Redis.from_url(server.url()) as client:
        client.flushall()
    assert shared_store.read([PAYMENTS])[0].epoch == 0

    answer = shared_store.record(PAYMENTS, Evidence(stale, FAILURES))

    assert (answer.snapshot.state, answer.snapshot.calls) == (State.CLOSED, 0)
    assert answer.snapshot.epoch > stale
    assert answer.snapshot.version > stale
    assert opened(shared_store) > answer.snapshot.epoch


def permit(store: RedisStore, spec: Spec) -> Grant | None:
    grant = store.acquire(spec, "a", lease=60)
    return grant if grant.trial else None


def test_a_permit_of_an_emptied_store_settles_nothing(server: Server, shared_store: RedisStore) -> None:
    soon = Spec("soon", BreakerPolicy(trial_calls=1, open_duration=0.001))
    shared_store.command(soon, Verb.TRIP)
    grant = wait_until(lambda: permit(shared_store, soon), what="a permit")
    assert grant is not None
    with redis.Redis.from_url(server.url()) as client:
        client.flushall()
    assert shared_store.renew("soon", ["a"], lease=60) == [False]
    answer = shared_store.settle(soon, "a", Outcome.FAILURE, Evidence(grant.snapshot.epoch, ()))
    assert (answer.snapshot.state, answer.snapshot.total_failures) == (State.CLOSED, 0)


def test_state_survives_a_restart_of_a_persistent_server(tmp_path: Path) -> None:
    server = start_valkey(tmp_path, persistent=True)
    store = new_store(server.url(), cooldown=0.05)
    epoch = opened(store)
    server.program.kill()
    with pytest.raises(StoreError):
        store.read([PAYMENTS])
    server = start_valkey(tmp_path, port=server.port, persistent=True)
    try:
        snapshot = wait_until(lambda: reads(store), what="the store to be back")
    finally:
        store.close()
        server.stop()
    assert snapshot is not None
    assert (snapshot.state, snapshot.epoch) == (State.OPEN, epoch)


def reads(store: RedisStore) -> Snapshot | None:
    try:
        return store.read([PAYMENTS])[0]
    except StoreError:
        return None


# --- a server that is unavailable ----------------------------------------------------------------------------


def test_a_refused_connection_is_reported_at_once() -> None:
    port = free_port()
    store = new_store(f"redis://127.0.0.1:{port}/0")
    with (
        takes_less_than(TIMEOUT),
        pytest.raises(StoreError, match=rf"store 127\.0\.0\.1:{port}/0 is unavailable: .*refused"),
    ):
        store.read([PAYMENTS])


@pytest.mark.timeout(60)
def test_a_frozen_server_delays_one_call_by_its_time_limit_and_the_next_not_at_all(own_server: Server) -> None:
    opened(new_store(own_server.url()))
    store = new_store(own_server.url(), timeout=0.3, cooldown=30.0)
    own_server.program.freeze()
    try:
        with takes_less_than(TIMEOUT), pytest.raises(StoreError, match="is unavailable"):
            store.read([PAYMENTS])
        with takes_less_than(TIMEOUT):
            for _ in range(200):
                with pytest.raises(StoreError, match="tried a moment ago"):
                    store.acquire(PAYMENTS, "a", lease=1)
    finally:
        own_server.program.thaw()


def test_many_threads_meet_a_frozen_server_once(own_server: Server) -> None:
    """Together they wait about one time limit, not one each."""
    store = new_store(own_server.url(), timeout=0.3, cooldown=30.0)
    own_server.program.freeze()
    try:
        with takes_less_than(TIMEOUT), ThreadPoolExecutor(20) as pool:
            assert not any(pool.map(lambda _: reads(store), range(4000)))
    finally:
        own_server.program.thaw()


def test_one_caller_per_cooldown_tries_again(own_server: Server) -> None:
    store = new_store(own_server.url(), timeout=3.0, cooldown=0.5)
    opened(store)
    own_server.program.freeze()
    try:
        assert reads(store) is None
    finally:
        own_server.program.thaw()
    wait_until(lambda: reads(store), timeout=TIMEOUT, what="the store to be tried again")
    for _ in range(20):
        assert store.read([PAYMENTS])[0].state is State.OPEN


def test_a_listener_learns_that_the_server_went_away(own_server: Server) -> None:
    store = new_store(own_server.url(), cooldown=0.05)
    changes = store.changes(timeout=TIMEOUT)
    assert next(changes) is None
    own_server.program.kill()
    with takes_less_than(TIMEOUT), pytest.raises(StoreError):
        next(changes)


def test_closing_a_store_is_not_for_ever(shared_store: RedisStore) -> None:
    opened(shared_store)
    shared_store.close()
    assert shared_store.read([PAYMENTS])[0].state is State.OPEN


def test_a_full_server_answers_with_an_error_and_stays_readable(own_server: Server) -> None:
    store = new_store(own_server.url())
    epoch = opened(store)
    with redis.Redis.from_url(own_server.url()) as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
        with pytest.raises(StoreError, match=r"answered with an error: .*maxmemory"):
            store.put("fallback", "key", b"x" * 1000, ttl=60)
        client.config_set("maxmemory", "0")
    assert store.read([PAYMENTS])[0].epoch == epoch


# --- what is no store at all --------------------------------------------------------------------------


class Hello(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def web_server() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def line_server(answer: Callable[[bytes], bytes]) -> Iterator[int]:
    """Answer every chunk of bytes, on every connection, until the client leaves."""
    listener = socket.create_server(("127.0.0.1", 0))

    def talk(connection: socket.socket) -> None:
        with closing(connection), suppress(OSError):
            while chunk := connection.recv(65536):
                connection.sendall(answer(chunk))

    def listen() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def test_ping_returns_the_servers_time(shared_store: RedisStore) -> None:
    assert shared_store.ping() == pytest.approx(time.time(), abs=60)


def without_scripting(chunk: bytes) -> bytes:
    """Answer each of the commands that a client has sent."""
    commands = chunk.split(b"\r\n*") if chunk else []
    return b"".join(b"-ERR unknown command\r\n" if b"EVAL" in command else b"+OK\r\n" for command in commands)


@pytest.mark.parametrize(
    ("start", "timeout", "complaint"),
    [
        (web_server, 20.0, "must be a Redis"),
        (partial(line_server, lambda _: b""), 0.2, "is unavailable"),
        (partial(line_server, without_scripting), 20.0, "must run Lua scripts"),
    ],
    ids=["a web server", "a silent server", "a server without scripting"],
)
def test_another_server_is_no_store(
    start: Callable[[], AbstractContextManager[int]], timeout: float, complaint: str
) -> None:
    with start() as port:
        store = new_store(f"redis://127.0.0.1:{port}/0", timeout=timeout)
        with takes_less_than(TIMEOUT), pytest.raises(StoreError, match=f"127.0.0.1:{port}/0 .*{complaint}"):
            store.ping()
        store.close()


def test_all_keys_of_a_breaker_share_a_slot_and_are_declared(tmp_path: Path) -> None:
    """A server in cluster mode refuses a script that touches several slots."""
    server = start_cluster_node(tmp_path)
    try:
        with redis.Redis.from_url(server.url()) as client:
            client.execute_command("CLUSTER ADDSLOTSRANGE 0 16383")
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "ok", what="the cluster")
        store = new_store(server.url())
        store.ledger.add_deferred("payments", "task", deadline=1.0)
        opened(store)
        store.command(PAYMENTS, Verb.RESET)
        store.ledger.remove_deferred("payments", ["task"])
        store.ledger.clear_deferred("payments")
        store.ledger.resumed("payments", 1)
        assert [s.name for s in store.read([PAYMENTS, Spec("mail"), Spec("geocoder")])] == [
            "payments",
            "mail",
            "geocoder",
        ]
        store.close()
    finally:
        server.stop()


# --- URLs and passwords -------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["amqp", "memcached", "http", "redis?"])
def test_other_schemes_are_refused_by_name(scheme: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        new_store(f"{scheme}://user:hunter2@localhost/0")
    assert repr(scheme) in str(error.value)
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "url",
    [
        "redis://:hunter2@localhost:no-port/0",
        "redis://:hun/ter2@localhost:99999999/0",
        "redis://:hunter2@[::1/0",
        "redis://:hunter2@localhost/0?socket_timeout=hunter2",
        "redis://:hunter2@localhost/0?no_such_option=1",
        "localhost:6379",
        "",
    ],
)
def test_urls_of_no_use_are_refused_without_quoting_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        new_store(url)
    assert "ter2" not in str(error.value)
    assert error.value.__cause__ is None


@pytest.mark.parametrize("namespace", ["", "{x}", "a\nb"])
def test_namespaces_that_no_key_could_hold_are_refused(namespace: str) -> None:
    with pytest.raises(ConfigurationError, match="namespace"):
        RedisStore("redis://localhost", namespace=namespace)


def test_every_way_to_the_same_server(tmp_path: Path) -> None:
    path = tmp_path / "s"
    server = start_valkey(tmp_path, config={"unixsocket": str(path), "requirepass": "hunter 2"})
    try:
        for url in (
            f"redis://:hunter%202@127.0.0.1:{server.port}/1",
            f"valkey://default:hunter%202@127.0.0.1:{server.port}/1",
            f"unix://default:hunter%202@{path}?db=1",
        ):
            store = new_store(url)
            if "payments" not in {s.name for s in store.read([PAYMENTS]) if s.epoch}:
                opened(store)
            assert store.read([PAYMENTS])[0].state is State.OPEN
            assert "hunter" not in repr(store)
            store.close()
    finally:
        server.stop()


@pytest.mark.parametrize("scheme", ["rediss", "valkeys"])
@pytest.mark.parametrize("option", ["CERT_NONE", "none"])
def test_encrypted_schemes_speak_tls(scheme: str, option: str) -> None:
    """Celery's spelling of the option is understood too."""
    received: list[bytes] = []

    def answer(chunk: bytes) -> bytes:
        received.append(chunk)
        return b"no TLS here\r\n"

    with line_server(answer) as port:
        store = new_store(f"{scheme}://127.0.0.1:{port}/0?ssl_cert_reqs={option}")
        with pytest.raises(StoreError, match=r"is unavailable: .*SSL"):
            store.read([PAYMENTS])
    assert received[0].startswith(b"\x16\x03"), "a TLS handshake"


def test_a_wrong_password_is_not_repeated(tmp_path: Path) -> None:
    server = start_valkey(tmp_path, config={"requirepass": "right"})
    try:
        store = new_store(f"redis://:hunter2@127.0.0.1:{server.port}/0")
        with pytest.raises(StoreError, match="refuses the credentials") as error:
            store.ping()
        store.close()
    finally:
        server.stop()
    assert "hunter2" not in str(error.value)


def test_a_server_that_repeats_the_password_is_not_quoted() -> None:
    with line_server(
        lambda chunk: b"-ERR unknown command, args beginning with: " + chunk.split()[-1] + b"\r\n"
    ) as port:
        store = new_store(f"redis://:hunter%202@127.0.0.1:{port}/0")
        with pytest.raises(StoreError) as error:
            store.ping()
        store.close()
    assert "hunter" not in str(error.value)
    assert "hunter" not in repr(error.value.__cause__)


def test_a_node_of_a_cluster_is_no_server(running_cluster: Cluster) -> None:
    store = new_store(running_cluster.nodes[0].url())
    with pytest.raises(ConfigurationError, match=r"a node of a cluster: allowed is redis\+cluster://"):
        store.check()
    store.close()
    new_store(running_cluster.url()).check()


def test_a_server_is_no_cluster(server: Server) -> None:
    store = new_store(f"redis+cluster://127.0.0.1:{server.port}")
    with pytest.raises(ConfigurationError, match="Cluster mode is not enabled"):
        store.check()
