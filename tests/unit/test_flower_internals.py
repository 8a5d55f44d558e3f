"""What our pages take for granted of Flower and Flower does not document: a release that moves it fails here."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import flower
import pytest
from celery.events import EventReceiver
from celery.events.state import State
from flower import command
from flower.api import BaseApiHandler
from flower.app import Flower
from flower.urls import handlers, settings
from flower.views import BaseHandler
from tornado import template, web

from resilient_tasks.flower import flower_internals
from resilient_tasks.flower.application import FlowerWithBreakers

THEIRS = Path(flower.__file__).parent


def test_the_command_makes_whatever_flower_the_module_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "Flower", Flower)
    importlib.reload(importlib.import_module("resilient_tasks.flower.install"))
    assert command.Flower is FlowerWithBreakers
    assert "Flower(capp=app, options=options, **settings)" in inspect.getsource(command.flower.callback)
    assert settings["template_path"] == str(THEIRS / "templates")


def test_events_are_received_by_what_flowers_module_names() -> None:
    assert "recv = EventReceiver(conn," in inspect.getsource(flower_internals.events.Events.run)
    received = inspect.getsource(EventReceiver._receive)
    assert "isinstance(body, list)" in received
    assert "callbacks=[self._receive]" in inspect.getsource(EventReceiver.get_consumers)


def test_flower_remembers_how_long_tasks_ran() -> None:
    source = inspect.getsource(flower_internals.events.PrometheusMetrics)
    assert re.search(
        rf"Histogram\(\s*'{flower_internals.RUN_TIMES}',\s*\"Task runtime\",\s*\['worker', 'task'\]", source
    )
    assert issubclass(flower_internals.events.EventsState, State)


def test_the_navigation_gets_one_item_at_the_end_of_its_first_list() -> None:
    navigation = flower_internals.Templates(settings["template_path"])._navigation()
    before, item, after = navigation.partition("reverse_url('breakers')")
    assert item
    assert before.count("</ul>") == 0
    assert "reverse_url('broker')" in before
    assert "app-nav-secondary" in after


def test_our_templates_find_flowers() -> None:
    templates = flower_internals.Templates(settings["template_path"])
    for name in ("breakers/list.html", "breakers/one.html", "breakers/act.html"):
        assert isinstance(templates.load(name), template.Template)
    base = (THEIRS / "templates" / "base.html").read_text()
    for block in ("title", "navbar", "container", "extra_scripts"):
        assert f"{{% block {block} %}}" in base or block == "title"  # the title came with 2.2
    for wanted in ('id="url_prefix"', 'id="toast-container"', "bootstrap.bundle.min.js"):
        assert wanted in base


def test_flower_has_threads_and_its_event_loop_at_hand_before_it_starts() -> None:
    source = inspect.getsource(Flower.__init__)
    assert "self.executor = self.pool_executor_cls(" in source
    assert "self.io_loop = io_loop or" in source


def test_the_classes_that_our_pages_wear_exist() -> None:
    style = (THEIRS / "static" / "css" / "flower.css").read_text()
    for name in ("page-section", "page-header", "metric-grid", "metric-card-danger", "broker-table", "detail-list"):
        assert f".{name}" in style
    for name in ("worker-panel", "worker-panel-title", "worker-detail-header", "refresh-status", "status-dot-live"):
        assert f".{name}" in style
    for variable in ("--flower-text-muted", "--flower-success", "--flower-warning", "--flower-danger"):
        assert f"{variable}:" in style


def test_a_prefix_is_put_before_a_handler_with_its_name_and_arguments() -> None:
    handler = web.url(r"/breakers/([^/]+)", web.RequestHandler, {"service": 1}, name="one")
    [moved] = flower_internals.prefixed([handler], SimpleNamespace(url_prefix="ops"))
    assert moved.regex.pattern == r"/ops/breakers/([^/]+)$"
    assert (moved.kwargs, moved.name) == ({"service": 1}, "one")
    assert flower_internals.prefixed([handler], SimpleNamespace(url_prefix=None)) == [handler]


def test_flower_asks_for_queues_by_a_method() -> None:
    for handler in (flower_internals.BrokerView, flower_internals.GetQueueLengths):
        assert "self.get_active_queue_names()" in inspect.getsource(handler.get)
    assert callable(BaseHandler.get_active_queue_names)
    served = {handler.regex.pattern.rstrip("$") for handler in handlers if isinstance(handler, web.url)}
    assert "/broker" in served


def test_the_api_is_closed_in_prepare() -> None:
    options = SimpleNamespace(basic_auth=None, auth=None)
    handler = SimpleNamespace(application=SimpleNamespace(options=options), unauthenticated_api=False)
    assert not flower_internals.api_is_open(handler)
    options.basic_auth = ["ann:secret"]
    assert flower_internals.api_is_open(handler)
    assert issubclass(BaseApiHandler, BaseHandler)


@pytest.mark.parametrize(
    ("current", "header", "user"),
    [
        ("ann@example.com", "", "ann@example.com"),
        (True, "Basic YW5uOnNlY3JldA==", "ann"),
        (True, "Basic Oms=", "flower"),
        (True, "Basic !", "flower"),
        (True, "", "flower"),
    ],
)
def test_the_user_is_who_has_logged_in(current: object, header: str, user: str) -> None:
    handler = SimpleNamespace(
        current_user=current,
        application=SimpleNamespace(options=SimpleNamespace(basic_auth=["ann:secret"])),
        request=SimpleNamespace(headers={"Authorization": header}),
    )
    assert flower_internals.user_of(handler) == user


def test_without_a_login_flower_knows_no_user() -> None:
    assert "return True" in inspect.getsource(BaseHandler.get_current_user)


def test_flowers_own_arguments_are_written_as_html() -> None:
    assert "xhtml_escape" in inspect.getsource(BaseHandler.get_argument)
