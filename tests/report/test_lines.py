"""Lines that fit: nothing too wide, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from rich.text import Text

from whalepy.report.lines import flow, labelled, rendered, spread, table, widest, words

word = st.text(alphabet="ab-界é", min_size=1, max_size=60)


@example(["a" * 30], 12, 0, 4, 1)  # broken, and every part but the first further in
@example(["a" * 30, "界" * 9, "b"], 13, 2, 2, 3)
@given(st.lists(word, max_size=12), st.integers(12, 50), st.integers(0, 4), st.integers(0, 4), st.integers(1, 5))
def test_flow(pieces: list[str], width: int, indent: int, hanging: int, gap: int) -> None:
    lines = list(flow(map(Text, pieces), width, gap=gap, indent=indent, hanging=hanging))
    assert widest(lines) <= width
    assert "".join(line.plain for line in lines).replace(" ", "") == "".join(pieces)
    assert all(line.plain.startswith(" " * indent) for line in lines)
    assert bool(lines) == bool(pieces)


@given(st.lists(word, min_size=1, max_size=5), word, st.integers(20, 200))
def test_spread(left: list[str], right: str, width: int) -> None:
    lines = list(spread(list(map(Text, left)), Text(right), width))
    assert widest(lines) <= width
    assert "".join(line.plain for line in lines).replace(" ", "") == "".join([*left, right])
    if len(lines) == 1 and lines[0].cell_len == width:
        assert lines[0].plain.endswith(right)


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (60, "  room left        batch 64 -> 72"),
        (59, "  room left\n    batch 64 -> 72"),  # below the label
    ],
)
def test_labelled(width: int, shown: str) -> None:
    assert rendered(labelled("room left", words("batch 64 -> 72"), width), width, color=False) == shown


def test_a_label_stands_once() -> None:
    lines = labelled("label", words("one two three " * 8), 60)
    assert [line.plain[:8].strip() for line in lines] == ["label", "", ""]


def test_a_table() -> None:
    rows = [["a", "", "1", "end"], ["bcd", "", "234", ""]]
    found = table([[Text(cell) for cell in row] for row in rows], right=(2,))
    assert [line.plain for line in found] == ["  a      1  end", "  bcd  234"]  # the empty column takes no room
