"""Which exceptions an exception wraps, wherever a client keeps them."""

from __future__ import annotations

from typing import Any

import pytest

from resilient_tasks.core.answer import unwrapped


def holding(**attributes: object) -> Exception:
    error = Exception("outer")
    vars(error).update(attributes)
    return error


def raised(outer: BaseException, *, inside: BaseException, cause: Any = ...) -> BaseException:
    try:
        try:
            raise inside
        except type(inside):
            if cause is ...:
                raise outer  # noqa: B904 - what is tried here
            raise outer from cause
    except BaseException as exc:
        return exc


INNER = ConnectionError("inner")
SLOTTED: Any = type("SlottedError", (Exception,), {"reason": property(lambda _: INNER)})
GROUP: Any = type("BaseExceptionGroup", (Exception,), {"exceptions": (ValueError(), INNER)})


@pytest.mark.parametrize(
    "outer",
    [
        raised(RuntimeError(), inside=ValueError(), cause=INNER),
        raised(RuntimeError(), inside=INNER),
        raised(RuntimeError(), inside=raised(KeyError(), inside=INNER)),
        Exception("failed", INNER),
        Exception(["a", INNER]),
        holding(orig=INNER),
        holding(whatever_it_is_called=INNER),
        holding(errors={"10.0.0.1": INNER}),
        holding(errors=[("10.0.0.1",), INNER]),
        SLOTTED(),
        GROUP(),
    ],
    ids=repr,
)
def test_it_is_found_wherever_it_is_kept(outer: BaseException) -> None:
    found = list(unwrapped(outer))
    assert found[0] is outer
    assert found.count(INNER) == 1


def test_what_is_suppressed_is_not_wrapped() -> None:
    outer = raised(RuntimeError(), inside=INNER, cause=None)
    assert list(unwrapped(outer)) == [outer]
    cause = ValueError()
    other = raised(RuntimeError(), inside=INNER, cause=cause)
    assert list(unwrapped(other)) == [other, cause]


def test_circles_and_long_chains_end() -> None:
    first, second = RuntimeError(), RuntimeError()
    first.__cause__, second.__cause__ = second, first
    assert list(unwrapped(first)) == [first, second]
    assert len(list(unwrapped(Exception([ValueError() for _ in range(1000)])))) == 50


def test_one_that_is_not_opened_keeps_what_it_wraps() -> None:
    middle = holding(reason=INNER)
    outer = holding(reason=middle)
    assert list(unwrapped(outer, opens=lambda exc: exc is outer)) == [outer, middle]


def test_an_attribute_that_raises_hides_nothing_else() -> None:
    nasty: Any = type("NastyError", (Exception,), {"reason": property(lambda _: 1 / 0)})
    assert list(unwrapped(nasty(INNER)))[1:] == [INNER]
