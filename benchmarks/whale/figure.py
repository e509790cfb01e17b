"""A figure of Whale's evaluation as a table: what the paper has, what the dry run says, what was measured here.

The paper: Jia et al., Whale, USENIX ATC 2022, https://www.usenix.org/conference/atc22/presentation/jia-xianyan. Several
of its figures are read off its plots, and it gives no batch sizes. The last figures are numbered as in the paper
(17 and 18 mixed types of device, 19 M6-10B); the others are counted in the order of its evaluation.
Predictions are those of `whalepy plan`: data sheets of the devices, no figure of the paper goes into them.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "results"
ASSUMED = (
    "nodes of 8 V100-SXM2-32GB (NVLink) or P100-PCIE-16GB, 50 Gbit/s between nodes, figures of data sheets",
    "float32 and Adam where nothing else is said; gradients reduced during the backward pass, of pipelines after it",
)
NOT_HERE = "no GPU here: measured cells are those of CPU ranks on this machine, where there are any"


@dataclass(frozen=True)
class Row:
    """One bar or point; None where there is no figure."""

    name: str
    paper: float | None = None
    predicted: float | None = None
    measured: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Figure:
    """What is shown, in which unit, and what was assumed beside what the paper says."""

    number: int
    title: str
    unit: str
    assumptions: tuple[str, ...]
    rows: Callable[[bool], Iterable[Row]]
    """Given whether to take a few layers in place of each model."""


def text_of(figure: Figure, rows: Sequence[Row]) -> str:
    """The table, and what it rests on."""
    width = max(len(row.name) for row in rows)
    head = f"{'':{width}}  {'paper':>9} {'predicted':>9} {'measured':>9}"
    lines = [f"Figure {figure.number}: {figure.title} ({figure.unit})", head]
    for row in rows:
        cells = " ".join(f"{_cell(value):>9}" for value in (row.paper, row.predicted, row.measured))
        lines.append(f"{row.name:{width}}  {cells}{'  ' + row.note if row.note else ''}")
    return "\n".join([*lines, *(f"assumed: {one}" for one in (*ASSUMED, *figure.assumptions)), NOT_HERE])


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def data_of(figure: Figure, rows: Sequence[Row]) -> dict[str, Any]:
    """The same as data, with the date and the command."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.whale.figure_{figure.number:02}",
        "figure": figure.number,
        "title": figure.title,
        "unit": figure.unit,
        "assumed": [*ASSUMED, *figure.assumptions],
        "rows": [asdict(row) for row in rows],
    }


def show(figure: Figure, arguments: Sequence[str] | None = None) -> None:
    """Print the figure; `--results` writes it to a dated file."""
    parser = argparse.ArgumentParser(description=f"Figure {figure.number} of Whale: {figure.title}")
    parser.add_argument("--results", action="store_true", help="write it to benchmarks/results")
    parser.add_argument("--small", action="store_true", help="a few layers: tries the script and says nothing")
    options = parser.parse_args(arguments)
    rows = tuple(figure.rows(options.small))
    if options.small:  # the paper's figures are not those of a few layers
        rows = tuple(replace(row, paper=None) for row in rows)
    print(text_of(figure, rows), flush=True)
    if options.results and not options.small:
        name = f"{datetime.date.today().isoformat()}-whale-figure-{figure.number:02}.json"
        (RESULTS / name).write_text(json.dumps(data_of(figure, rows), indent=1) + "\n")


def measured_in(name: str) -> dict[str, Any] | None:
    """The newest results of another benchmark, `DATE-name.json`."""
    found = sorted(path for path in RESULTS.glob(f"*-{name}.json") if path.name[11:] == f"{name}.json")
    return json.loads(found[-1].read_text()) if found else None
