"""Messages that no program should send, for Hypothesis to choose from.

Left out is what ends a worker as a message of an *unguarded* task, which is Celery's alone.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from hypothesis import strategies as st

from resilient_tasks.worker.envelope import HEADER, Envelope

GUARDED = [f"tests.integration.shop.{name}" for name in ("charge", "describe", "balance", "nickname", "strict")]
HEADERS = [
    "id", "retries", "eta", "expires", "timelimit", "group", "group_index", "root_id", "parent_id", "lang", "shadow",
    "meth", "argsrepr", "kwargsrepr", "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps",
    "compression",
]  # fmt: skip
EMBEDDED = ["callbacks", "errbacks", "chain", "chord"]

texts = st.text(max_size=8) | st.sampled_from(
    ["", "payments", "unknown", "unacked", "resilient.control", "\x00", "\udcff", "x" * 10_000]
)
numbers = st.integers() | st.floats() | st.sampled_from([0, 1.5, 10**400, 2**63, float("inf"), float("nan")])
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=3,
)
moments = st.sampled_from(
    ["2020-01-01T00:00:00", "9999-12-31T23:59:59-14:00", "0001-01-01T00:00:00+14:00", "2020-99-99"]
)
envelopes = values | st.dictionaries(st.sampled_from(list(Envelope.__dataclass_fields__)), values, max_size=3)
ids = st.uuids().map(str)


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


signatures = st.dictionaries(st.sampled_from(["task", "args", "kwargs", "options", "subtask_type"]), values, max_size=3)
embedded = st.dictionaries(
    st.sampled_from(EMBEDDED) | texts, values | signatures | st.lists(signatures, max_size=2), max_size=2
)
calls = st.tuples(st.lists(values, max_size=2), st.dictionaries(texts, values, max_size=2), embedded | st.none()).map(
    list
)
bodies = st.just(_json([[1], {}, {}])) | calls.map(_json) | values.map(_json) | st.binary(max_size=20)
strange = st.dictionaries(st.sampled_from(HEADERS) | texts, values | moments, max_size=3)


@st.composite
def headers(draw: st.DrawFn) -> dict[str, Any]:
    """Return the headers of a guarded task, or of an unknown one."""
    task = draw(st.sampled_from(GUARDED) | values)
    usual = {"lang": "py", "task": task, "id": draw(ids), "retries": 0}
    return {**usual, **draw(strange), HEADER: draw(envelopes)}


@st.composite
def of_protocol_1(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """Return the headers and body of an old message."""
    usual = {"task": draw(st.sampled_from(GUARDED)), "id": draw(ids), "args": [1], "kwargs": {}}
    changed = draw(
        st.dictionaries(st.sampled_from([*HEADERS, *EMBEDDED, "args", "kwargs", "utc", "taskset"]), values, max_size=3)
    )
    return {HEADER: draw(envelopes)}, _json({**usual, **changed})


@st.composite
def raw_messages(draw: st.DrawFn) -> str:
    """Return a message as it lies in Redis."""
    its_headers, body = draw(st.tuples(headers(), bodies) | of_protocol_1())
    return json.dumps({
        "body": base64.b64encode(body).decode(),
        "content-type": draw(st.just("application/json") | texts),
        "content-encoding": draw(st.sampled_from(["utf-8", "binary"]) | texts),
        "headers": its_headers,
        "properties": {
            "correlation_id": draw(values), "reply_to": draw(values), "delivery_mode": 2, "priority": draw(values),
            "delivery_info": {"exchange": draw(st.just("") | values), "routing_key": draw(st.just("celery") | values)},
            "body_encoding": "base64", "delivery_tag": str(draw(st.uuids(version=4))),
        },
    })  # fmt: skip


@st.composite
def damaged_messages(draw: st.DrawFn) -> str:
    """Return what was a message once, with one part of its envelope replaced or missing."""
    envelope = json.loads(draw(raw_messages()))
    damaged = draw(st.sampled_from([envelope, envelope["properties"], envelope["properties"]["delivery_info"]]))
    name = draw(st.sampled_from(sorted(damaged)))
    damaged[name] = draw(values)
    if draw(st.booleans()):
        del damaged[name]
    return json.dumps(envelope)


garbage = st.text(max_size=20) | values.map(json.dumps)


@st.composite
def published_messages(draw: st.DrawFn) -> dict[str, Any]:
    """Return arguments of ``Producer.publish``."""
    return {
        "body": json.loads(draw(calls.map(_json) | values.map(_json))),
        "headers": json.loads(json.dumps(draw(headers()))),
        "serializer": draw(st.sampled_from(["json", "yaml"])),
        "compression": draw(st.sampled_from([None, "gzip", "bzip2"])),
        "priority": draw(st.integers(0, 9)),
        "correlation_id": draw(texts),
    }
