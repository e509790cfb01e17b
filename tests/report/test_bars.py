"""Bars of characters."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalepy.report.bars import ASCII, UNICODE, filled, lengths


@pytest.mark.parametrize(
    ("part", "shown"),
    [
        (0.0, "░░░░"),
        (0.5, "██░░"),
        (0.53, "██▏░"),
        (1.0, "████"),
        (1.7, "████"),  # more than there is
        (1e-9, "▏░░░"),  # a little is not nothing
        (1 - 1e-9, "███▉"),  # nearly full is not full
    ],
)
def test_a_filled_bar(part: float, shown: str) -> None:
    assert filled(part, 4, UNICODE) == shown


def test_in_ascii_and_without_room() -> None:
    assert filled(0.5, 4, ASCII) == "##.."
    assert filled(0.99, 4, ASCII) == "###."
    assert filled(0.5, 0, ASCII) == ""


@given(st.floats(0, 2), st.integers(1, 40))
def test_a_bar_is_as_long_as_asked(part: float, width: int) -> None:
    assert len(filled(part, width, UNICODE)) == len(filled(part, width, ASCII)) == width


def test_the_parts_of_a_whole() -> None:
    assert lengths([3.0, 1.0, 0.0], 8) == (6, 2, 0)
    assert lengths([1e6, 1.0, 0.0], 8) == (7, 1, 0)  # nothing disappears
    assert lengths([0.0, 0.0], 8) == (0, 0)
    assert sum(lengths([1.0, 1.0, 1.0], 2)) == 2  # fewer characters than parts
