"""Signals in Celery's own style: they call your code when a breaker changes or a task is deferred or resumed.

    from resilient_tasks.signals import breaker_opened

    @breaker_opened.connect
    def page_on_call(sender, breaker, transition, **kwargs):
        ...

The sender is the app. Each transition is sent once in the whole fleet, in the process that made it: a worker, one of
its pool processes, a web process, ``celery breakers trip``. So connect receivers where all of them import, beside the
app. Receivers run one after the other in a thread of their own, never in a worker's event loop, and one that raises is
logged and affects nothing else. Calls beyond 10,000 that wait are dropped, and the log says how many.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from celery.utils.dispatch import Signal

from resilient_tasks.core.model import Transition
from resilient_tasks.monitor.events import event_type
from resilient_tasks.store.background import BackgroundQueue

__all__ = [
    "breaker_closed", "breaker_disabled", "breaker_forced_open", "breaker_half_opened", "breaker_opened",
    "breaker_shadowed", "breaker_would_open", "task_deferred", "task_resumed",
]  # fmt: skip

_OF_TRANSITIONS = {"breaker", "transition"}
_OF_TASKS = {"task_id", "task", "breaker", "since"}

#: A breaker went OPEN. Receivers of all ``breaker_`` signals get its name as ``breaker``, and the ``transition``.
breaker_opened = Signal(name="breaker_opened", providing_args=_OF_TRANSITIONS)
#: Its open time is over: it admits trials.
breaker_half_opened = Signal(name="breaker_half_opened", providing_args=_OF_TRANSITIONS)
#: It admits calls again, because its trials succeeded or an operator has reset it.
breaker_closed = Signal(name="breaker_closed", providing_args=_OF_TRANSITIONS)
#: An operator has isolated it.
breaker_forced_open = Signal(name="breaker_forced_open", providing_args=_OF_TRANSITIONS)
#: An operator has disabled it.
breaker_disabled = Signal(name="breaker_disabled", providing_args=_OF_TRANSITIONS)
#: An operator lets it admit all calls and report when it would have opened.
breaker_shadowed = Signal(name="breaker_shadowed", providing_args=_OF_TRANSITIONS)
#: It would have opened, were it not in SHADOW.
breaker_would_open = Signal(name="breaker_would_open", providing_args=_OF_TRANSITIONS)

#: A task was deferred: ``task_id``, ``task`` (its name), ``breaker``, ``since`` (seconds), ``reason``.
task_deferred = Signal(name="task_deferred", providing_args=_OF_TASKS | {"reason"})
#: A task went back to the queue that it came from; ``since``: seconds since the epoch when it was deferred first.
task_resumed = Signal(name="task_resumed", providing_args=_OF_TASKS)

_OF_EVENT = {
    name.replace("_", "-"): signal
    for name, signal in list(globals().items())
    if name.startswith("breaker_") and isinstance(signal, Signal)
}

_background = BackgroundQueue("signals", most_waiting=10_000)


def notify(signal: Signal, sender: Any, **fields: Any) -> None:
    """Have the receivers of a signal called soon, by another thread; costs nothing where there are none."""
    if signal.has_listeners(sender):
        _background.submit(partial(signal.send, sender=sender, **fields))


def notify_of_transition(sender: Any, transition: Transition) -> None:
    """Send the signal of a transition."""
    notify(_OF_EVENT[event_type(transition)], sender, breaker=transition.name, transition=transition)
