"""The tables of the terminal report: the devices, where the step goes, and the plans that were tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.text import Text

from whalepy.planner.forecast import Alternative, Forecast
from whalepy.report import wording
from whalepy.report.bars import Glyphs, filled, lengths
from whalepy.report.folding import Row, folded
from whalepy.report.lines import INDENT, NARROW, flow, labelled, table, widest

BARS = range(20, 3, -1)  # lengths of a bar in characters, best first

LEAST_STRATEGY, LEAST_SAID = 28, 20  # columns; where less is left, the figures of a plan stand below its name
FULL, HIGH = 1.0, 0.9  # parts of a device's memory from which its bar is red, yellow


# -- the devices


def device_lines(forecast: Forecast, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """A heading and a row per device, or per group of alike ones; bars as long as the width allows.

    Where there is no room beside a row, its mark, then its figures, stand below it.
    """
    rows = folded(forecast)
    marks = [Text(), *(_mark(forecast, row) for row in rows)]
    tables = (_device_table(forecast, rows, bar, glyphs) for bar in (BARS if width >= NARROW else ()))
    fitting = (pieces for pieces in tables if _width(pieces) + INDENT + widest(marks) <= width)
    for pieces, mark in zip(next(fitting, None) or _device_table(forecast, rows, 0, glyphs), marks, strict=True):
        yield from flow([*pieces, mark] if mark else pieces, width, gap=2, indent=0, hanging=2 * INDENT)


def _width(rows: Sequence[Sequence[Text]]) -> int:
    return sum(widest(column) + INDENT for column in zip(*rows, strict=True)) - INDENT


def _device_table(forecast: Forecast, rows: Sequence[Row], bar: int, glyphs: Glyphs) -> list[list[Text]]:
    """Per row what it is about, its memory and its busy time, each as wide as its column; the heading first."""
    unit, size = wording.memory_unit(each.peak_memory_bytes for each in forecast.devices)
    staged = len(forecast.stages) > 1
    named = [[Text(head, "dim") for head in ("", "device", "stage" if staged else "", "rows")]]
    for row in rows:
        stages = Text(wording.ranks({each.stage for each in row.devices}) if staged else "")
        named.append([Text(row.ranks), Text(row.type), stages, Text(_range(*row.batch_shares))])
    memory = _gauges([_memory_bar(row, bar, glyphs) for row in rows], [_memory(row, size) for row in rows])
    busy = _gauges(
        [Text(filled(row.busiest.busy_s / forecast.step_time_s, bar, glyphs), "cyan") for row in rows],
        [_busy(row, forecast.step_time_s) for row in rows],
    )
    left = table(named, right=(2, 3))
    used = [Text(f"memory ({unit})", "dim"), *memory]
    return [list(row) for row in zip(left, _padded(used), [Text("busy", "dim"), *busy], strict=True)]


def _gauges(bars: Sequence[Text], figures: Sequence[str]) -> list[Text]:
    """Each bar with its figure, the figures right-aligned."""
    width = max(map(len, figures))
    return [
        bar.append(" " * min(bar.cell_len, 2)).append(figure.rjust(width))
        for bar, figure in zip(bars, figures, strict=True)
    ]


def _padded(column: Sequence[Text]) -> list[Text]:
    width = widest(column)
    return [cell + " " * (width - cell.cell_len) for cell in column]


def _range(least: float, most: float) -> str:
    return f"{least:,}" if least == most else f"{least:,}-{most:,}"


def _memory_bar(row: Row, bar: int, glyphs: Glyphs) -> Text:
    device = row.tightest
    part = device.peak_memory_bytes / max(device.memory_capacity_bytes, 1)
    return Text(filled(part, bar, glyphs), "red" if part > FULL else "yellow" if part > HIGH else "green")


def _memory(row: Row, unit: int) -> str:
    """The peak of the tightest device of the row, and what it has."""
    device = row.tightest
    return f"{device.peak_memory_bytes / unit:,.1f} / {device.memory_capacity_bytes / unit:,.1f}"


def _busy(row: Row, step: float) -> str:
    parts = [round(100 * each.busy_s / step) for each in row.devices]
    return f"{_range(min(parts), max(parts))} %"


def _mark(forecast: Forecast, row: Row) -> Text:
    """What is special about a device of the row, with its rank where the row shows several."""
    missing = {rank: lack for rank, lack in wording.missing_bytes(forecast).items() if row.holds(rank)}
    parts: list[str] = [f"lacks {wording.memory(max(missing.values()))}"] if missing else []
    for name, rank in (("bottleneck", forecast.bottleneck), ("tightest", forecast.tightest)):
        if row.holds(rank) and len(forecast.devices) > 1 and not (missing and name == "tightest"):
            parts.append(name if len(row.devices) == 1 else f"{name}: {rank}")
    return Text("<- " + ", ".join(parts) if parts else "", "bold red" if missing else "bold")


# -- the step


def step_lines(forecast: Forecast, width: int, glyphs: Glyphs) -> Iterator[Text]:
    """The step of the bottleneck as one bar of its parts, and what each part is."""
    parts = forecast.breakdown
    figures = (
        (glyphs.compute, "compute", parts.compute_s, "green", ""),
        (glyphs.gradient, "gradients", parts.gradient_s, "yellow", _hidden(forecast)),
        (glyphs.bridge, "bridges", parts.bridge_s, "cyan", ""),
        (glyphs.bubble, "bubble", parts.bubble_s, "magenta", ""),
    )
    column = 0 if width < NARROW else 6
    bar = Text()
    for (glyph, _, _, style, _), length in zip(figures, lengths([f[2] for f in figures], width - 12), strict=True):
        bar.append(glyph * length, style)
    legend = [
        Text(glyph, style).append(f" {name} {wording.seconds(value)}{more}", "default")
        for glyph, name, value, style, more in figures
        if value > 0 or more
    ]
    yield from labelled("step", [bar], width, column=column)
    yield from flow(legend, width, indent=INDENT + column, hanging=0)
    if several := wording.microbatches(forecast):
        yield from flow([Text(several)], width, indent=INDENT + column)


def _hidden(forecast: Forecast) -> str:
    """How much of the gradient collectives runs under computation."""
    part = wording.hidden(forecast)
    return "" if part is None else f" ({wording.percent(part)} hidden)"


# -- what was tried


def alternative_lines(forecast: Forecast, width: int, top: int) -> Iterator[Text]:
    """The plan and those it was measured against, best first: a line each, or two where that is too wide."""
    shown, left = forecast.alternatives[:top], len(forecast.alternatives) - top
    if not shown:
        return
    unit, size = wording.memory_unit(each.peak_memory_bytes for each in shown)
    heads = [Text(head, "dim") for head in ("", "strategy", "step", f"peak ({unit})", "against this plan")]
    rows = [_alternative(forecast, each, index == 0, size) for index, each in enumerate(shown)]
    marks, _, steps, peaks, _ = zip(heads, *rows, strict=True)
    space = width - INDENT - sum(widest(column) + INDENT for column in (marks, steps, peaks)) - INDENT
    if columns := _columns([(row[1], row[4]) for row in (heads, *rows)], space):
        yield from table([heads, *(line for row in rows for line in _folded(row, *columns))], right=(2, 3))
    else:
        yield from (line for row in rows for line in _stacked(row, unit, width))
    if left > 0:
        yield Text(" " * INDENT).append(f"and {left:,} more, in --json", "dim")


def _alternative(forecast: Forecast, other: Alternative, best: bool, unit: int) -> list[Text]:
    peak = f"{other.peak_memory_bytes / unit:,.1f}/{other.memory_capacity_bytes / unit:,.1f}"
    said = wording.beside_itself(other, brief=True) if best else wording.against(forecast, other, brief=True)
    step = "-" if other.verdict == "no" else wording.seconds(other.step_time_s)
    return [Text(">" if best else ""), Text(other.strategy, "bold" if best else ""), Text(step), Text(peak), Text(said)]


def _columns(cells: Sequence[tuple[Text, Text]], space: int) -> tuple[int, int] | None:
    """Columns for the strategies and for what is said of them, with the fewest lines; None where there is no room."""
    first, last = (max(cell.cell_len for cell in column) for column in zip(*cells, strict=True))
    if first + last <= space:
        return first, last
    widths = [(space - said, said) for said in range(min(last, LEAST_SAID), last + 1)]
    widths = [each for each in widths if each[0] >= min(first, LEAST_STRATEGY)]

    def lines(each: tuple[int, int]) -> int:
        return sum(max(len(_wrapped(cell, wide)) for cell, wide in zip(row, each, strict=True)) for row in cells)

    return min(widths, key=lines, default=None)


def _wrapped(cell: Text, space: int) -> Sequence[Text]:
    return list(flow(cell.split(" "), space, gap=1, indent=0)) or [Text()]


def _folded(row: Sequence[Text], strategies: int, said: int) -> Iterator[Sequence[Text]]:
    """The row with its strategy and what is said of it in lines of so many columns."""
    left, right = _wrapped(row[1], strategies), _wrapped(row[4], said)
    for k in range(max(len(left), len(right))):
        first, last = (lines[k] if k < len(lines) else Text() for lines in (left, right))
        yield [row[0], first, *row[2:4], last] if k == 0 else [Text(), first, Text(), Text(), last]


def _stacked(row: Sequence[Text], unit: str, width: int) -> Iterator[Text]:
    """The strategy, and its figures below it."""
    mark, strategy, step, peak, said = row
    yield from flow([Text(mark.plain or " "), *strategy.split(" ")], width, gap=1, hanging=2)
    named = [step if step.plain != "-" else Text(), Text(f"peak {peak} {unit}"), said]
    yield from flow([piece for piece in named if piece.plain], width, indent=INDENT + 4)
