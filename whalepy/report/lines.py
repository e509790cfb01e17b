"""Styled lines that fit a width: pieces that flow, a piece at the right edge, labelled text."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, RenderableType
from rich.text import Text

INDENT = 2
NARROW = 60  # columns; below, labels stand above their text and bars are left out


def words(text: str, style: str = "") -> list[Text]:
    """One piece per word: text that may break at every space."""
    return [Text(word, style) for word in text.split()]


def flow(pieces: Iterable[Text], width: int, *, gap: int = 3, indent: int = INDENT, hanging: int = 0) -> Iterator[Text]:
    """Lines of at most `width` columns; a piece is broken only where it is wider than a line.

    The first line starts at `indent`, the others `hanging` further in.
    """
    line, empty = Text(" " * indent), True
    for piece in pieces:
        if not empty and line.cell_len + gap + piece.cell_len > width:
            yield line
            line, empty = Text(" " * (indent + hanging)), True
        if not empty:
            line.append(" " * gap)
        if line.cell_len + piece.cell_len > width:
            *lines, piece = _cut(piece, width - indent - hanging)
            for part in lines:
                yield line.append_text(part)
                line = Text(" " * (indent + hanging))
        line.append_text(piece)
        empty = False
    if not empty:
        yield line


def _cut(piece: Text, width: int) -> Sequence[Text]:
    """The piece in parts of at most `width` columns."""
    console = Console(file=io.StringIO(), width=max(width, 1))
    return list(piece.wrap(console, max(width, 1), overflow="fold"))


def spread(left: Sequence[Text], right: Text, width: int, *, hanging: int = 0) -> Iterator[Text]:
    """The pieces in one line with `right` at its end; where that is too wide, all of them flow."""
    line = next(flow(left, 10**6), Text(" " * INDENT))
    space = width - line.cell_len - right.cell_len
    if space < 3:
        yield from flow([*left, right], width, hanging=hanging)
        return
    line.append(" " * space)
    yield line.append_text(right)


def labelled(label: str, pieces: Sequence[Text], width: int, *, gap: int = 1, column: int = 17) -> Iterator[Text]:
    """`label            text ...`: the text in its own column, or below the label on a narrow terminal."""
    if width < NARROW:
        if label:
            yield Text(" " * INDENT).append(label, "dim")
        yield from flow(pieces, width, gap=gap, indent=2 * INDENT)
        return
    start = INDENT + column
    for index, line in enumerate(flow(pieces, width, gap=gap, indent=start)):
        first = Text(" " * INDENT).append(label.ljust(column), "dim")
        yield first.append_text(line[start:]) if index == 0 else line


def rendered(parts: Iterable[RenderableType], width: int, *, color: bool) -> str:
    """The parts as text without trailing blanks; styles become escape codes only with `color`."""
    console = Console(
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        force_interactive=False,
        force_jupyter=False,
        color_system="standard" if color else None,
        no_color=not color,
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    with console.capture() as captured:
        for part in parts:
            console.print(part, no_wrap=isinstance(part, Text) or None, overflow="ignore", crop=False)
    return "\n".join(line.rstrip() for line in captured.get().splitlines())


def table(rows: Sequence[Sequence[Text]], *, right: Sequence[int] = (), indent: int = INDENT) -> list[Text]:
    """One line per row, columns two blanks apart and as wide as their widest cell; an empty column takes no room.

    `right`: the columns whose cells stand at the right edge. Every row has the same number of cells.
    """
    widths = [max(cell.cell_len for cell in column) for column in zip(*rows, strict=True)]
    lines: list[Text] = []
    for row in rows:
        line = Text(" " * indent)
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            blanks = " " * (width - cell.cell_len)
            if width:
                line.append("  " if line.cell_len > indent else "")
                line.append_text(Text(blanks) + cell if column in right else cell + Text(blanks))
        line.rstrip()
        lines.append(line)
    return lines


def widest(lines: Iterable[Text]) -> int:
    """Columns that the lines need."""
    return max((line.cell_len for line in lines), default=0)
