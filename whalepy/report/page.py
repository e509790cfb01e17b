"""The report of a dry run as one page: no script, and nothing that it would have to fetch."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from whalepy.planner.forecast import Forecast
from whalepy.report import wording
from whalepy.report.checked import check, printable
from whalepy.report.folding import Row, folded
from whalepy.report.shapes import HEIGHT, WIDTH, curve, drawing, scatter
from whalepy.report.tree import tree

LANES = 16  # rows of devices; more are folded further
HOLDERS = 5  # of memory, named per device
DOTS = 1000
LISTED = 40  # plans in the table below the dots
MODULES = 1000


def html(forecast: Forecast) -> str:
    """The page as text: verdict, lanes, memory, model, devices, links, plans, annotations and assumptions.

    Below 1 MB for thousands of devices, spans, plans and modules: alike devices share a lane, near spans are drawn as
    one, long lists end with a count. Only types of devices have no limit: each has a lane.
    Raises PlanError for a forecast with a figure that is not a finite number.
    """
    check(forecast)
    rows = folded(forecast, most=LANES)
    return (
        _environment()
        .get_template("page.html.jinja")
        .render(
            forecast=forecast,
            subject=forecast.subject,
            rows=[(row, drawing(row.busiest, forecast.step_time_s)) for row in rows],
            memories=[_memory(row, forecast) for row in rows],
            model=tree(forecast.modules, forecast.subject.model, most=MODULES),
            modules_left=max(len(forecast.modules) - MODULES, 0),
            scatter=scatter(forecast, most=DOTS),
            dots_left=max(len(forecast.alternatives) - DOTS, 0),
            listed=forecast.alternatives[:LISTED],
            plans_left=max(len(forecast.alternatives) - LISTED, 0),
            quarters=[forecast.step_time_s * k / 4 for k in range(5)],
            size=(WIDTH, HEIGHT),
            w=wording,
        )
    )


def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("whalepy", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value, breaks=True) if type(value) is str else value,
    )


def _memory(row: Row, forecast: Forecast) -> dict[str, Any]:
    """The tightest device of a row: its course, and what it holds at its peak, the rest in one sum."""
    device = row.tightest
    named = [(held.name, held.bytes) for held in device.held[:HOLDERS]]
    rest = device.peak_memory_bytes - sum(size for _, size in named)
    if len(device.held) > HOLDERS and rest > 0:
        named.append((wording.plural(len(device.held) - HOLDERS, "other"), rest))
    return {"row": row, "device": device, "curve": curve(device, forecast.step_time_s), "held": named}
