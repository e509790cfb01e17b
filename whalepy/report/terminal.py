"""The report of a dry run for a terminal: the verdict first, then the devices, the step, and what else was tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from rich.text import Text

from whalepy.planner.forecast import DeviceForecast, Forecast
from whalepy.report import wording
from whalepy.report.bars import ASCII, UNICODE, Glyphs
from whalepy.report.checked import check, printable
from whalepy.report.lines import INDENT, NARROW, flow, labelled, rendered, spread, words
from whalepy.report.tables import alternative_lines, device_lines, step_lines

LEAST_WIDTH = 40
ASSUMPTIONS = 3
_COLORS = {"fits": "bold green", "tight": "bold yellow", "no": "bold red"}


def text(forecast: Forecast, *, width: int = 100, color: bool = False, unicode: bool = True, top: int = 5) -> str:
    """The report in lines of at most `width` columns (40 at least), the same on every call.

    `top`: how many of the plans that were tried are listed, the chosen one included. Devices beyond eight are folded
    into rows of alike ones. Without `unicode` every character is ASCII. What colour says is also said in words.
    Raises PlanError for a forecast with a figure that is not a finite number.
    """
    check(forecast)
    bare = tuple(replace(device, spans=(), memory=()) for device in forecast.devices)
    shown = printable(replace(forecast, devices=bare, modules=()), unicode=unicode)
    width = max(width, LEAST_WIDTH)
    out = rendered(_lines(shown, width, UNICODE if unicode else ASCII, top), width, color=color)
    return out if unicode else out.replace("µ", "u")


def _lines(forecast: Forecast, width: int, glyphs: Glyphs, top: int) -> Iterator[Text]:
    yield from _subject(forecast, width)
    yield Text()
    yield from _verdict(forecast, width)
    yield Text()
    yield from device_lines(forecast, width, glyphs)
    yield Text()
    yield from step_lines(forecast, width, glyphs)
    yield Text()
    yield from alternative_lines(forecast, width, top)
    yield Text()
    yield from _notes(forecast, width)


# -- what was asked, and the answer


def _subject(forecast: Forecast, width: int) -> Iterator[Text]:
    """Model, optimizer and batch; then the hardware."""
    asked = forecast.subject
    model = [Text(asked.model, "bold"), Text(wording.parameters(asked.parameters, asked.trainable))]
    training = Text(f"{wording.optimizer(asked.optimizer)}, {asked.precision}")
    yield from spread([*model, training], Text(wording.batch(asked.rows, asked.tokens)), width)
    nodes, figures = wording.plural(asked.nodes, "node"), f"figures: {asked.figures}"
    cards = wording.hardware(forecast)
    if len(nodes) + len(cards) + len(figures) + INDENT + 6 <= width:
        yield from spread([Text(nodes), Text(cards)], Text(figures, "dim"), width)
    else:
        yield from flow([Text(f"{nodes}  "), *words(cards), Text(f"({figures})", "dim")], width, gap=1, hanging=INDENT)


def _verdict(forecast: Forecast, width: int) -> Iterator[Text]:
    """Whether it fits and how fast it is, beside what equal shares give; or what is missing where."""
    said = Text(wording.VERDICTS[forecast.verdict], _COLORS[forecast.verdict])
    if not forecast.fits:
        missing = wording.out_of_memory(wording.missing_bytes(forecast))
        pieces = [said, *([Text(missing, "bold")] if missing else [])]
        yield from flow([*pieces, Text(f"a step would take {wording.seconds(forecast.step_time_s)}")], width)
        return
    figures = [
        Text(f"{wording.seconds(forecast.step_time_s)} a step", "bold"),
        Text(wording.throughput(forecast)),
        Text(f"{wording.percent(forecast.mfu)} of peak"),
    ]
    beside = INDENT if width < NARROW else INDENT + said.cell_len + 3
    yield from spread([said, *figures], Text(_tightest(forecast)), width, hanging=beside - INDENT)
    if len(forecast.devices) > 1:
        bound = Text(f"bound for these devices {wording.times(forecast.bound)}")
        yield from flow([Text(wording.gain(forecast)), bound], width, indent=beside)


def _tightest(forecast: Forecast) -> str:
    device = next(each for each in forecast.devices if each.rank == forecast.tightest)
    name, unit = wording.memory_unit([device.peak_memory_bytes])
    used, limit = device.peak_memory_bytes / unit, device.memory_capacity_bytes / unit
    return f"tightest: device {device.rank}, {used:,.1f} of {limit:,.1f} {name}"


# -- what follows from it


def _notes(forecast: Forecast, width: int) -> Iterator[Text]:
    """What each device is worth, what else would fit, how sure the figures are, and how to run the plan."""
    notes: list[tuple[str, list[Text], int]] = []
    if adds := _adds(forecast):
        notes.append(("each device adds", adds, 3))
    if more := wording.room(forecast):
        notes.append(("room left", [Text("or " * (index > 0) + part) for index, part in enumerate(more)], 1))
    for index, flags in enumerate(forecast.ways_out):
        notes.append(("" if index else "what would fit", [Text(flags, "bold")], 1))
    for index, sentence in enumerate(forecast.assumptions[:ASSUMPTIONS]):
        notes.append(("" if index else "assumed", words(sentence), 1))
    if (left := len(forecast.assumptions) - ASSUMPTIONS) > 0:
        notes.append(("", words(f"and {left} more, in --json"), 1))
    if forecast.fidelity:
        notes.append(("how sure", words(forecast.fidelity), 1))
    if command := wording.launch(forecast):
        how = Text(f"with {wording.loading(forecast)}{wording.saving(forecast)}")
        notes.append(("run it", [Text(command, "bold"), how], 5))
    elif forecast.not_runnable:
        notes.append(("run it", words(f"not yet: the runtime does not execute {', '.join(forecast.not_runnable)}"), 1))
    for label, pieces, gap in notes:
        yield from labelled(label, pieces, width, gap=gap)


def _adds(forecast: Forecast) -> list[Text]:
    """The part of the throughput that each device is worth; neighbours of equal worth together."""

    def worth(device: DeviceForecast) -> tuple[str, str]:
        return device.type, "" if device.adds is None else wording.percent(device.adds)

    pieces: list[Text] = []
    for (kind, part), group in groupby(sorted(forecast.devices, key=lambda each: each.rank), key=worth):
        ranks = [each.rank for each in group]
        if part:
            pieces.append(Text(f"{wording.ranks(ranks)} {kind} {part}{' each' if len(ranks) > 1 else ''}"))
    return pieces
