"""`whalepy devices`: the known device types, what is known of each, and which torch wheels serve it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whalepy.hardware.profiles import DeviceProfile, known_profiles, profile
from whalepy.hardware.wheels import builds_for, torch_release

MARK = {"?": "?", "memory": "*", "estimated": "~", "assumed": "~"}
LEGEND = "~ estimated or assumed   ? sources disagree   * not looked up   - no units for it   unmarked: data sheets"
WHEELS = "wheels: official builds of torch {torch} with kernels for the device; none: build torch from source"
GIB, GIGA, TERA = 2.0**30, 1e9, 1e12

# Heading, field of DeviceProfile, unit.
FIGURES: tuple[tuple[str, str, float], ...] = (
    ("GiB", "memory_bytes", GIB),
    ("GB/s", "memory_bandwidth", GIGA),
    ("fp32", "fp32", TERA),
    ("tf32", "tf32", TERA),
    ("fp16", "fp16", TERA),
    ("bf16", "bf16", TERA),
    ("fp8", "fp8", TERA),
    ("link GB/s", "link_bandwidth", GIGA),
)


def devices(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these types, as in a cluster spec: 3090, A100-80GB")
    ] = None,
) -> None:
    """List the known device types: memory torch can use, bandwidth, dense peak TFLOP/s by dtype, torch wheels."""
    chosen = tuple(dict.fromkeys(map(profile, names))) if names else known_profiles()
    release = torch_release()
    # The table is as wide as its words: cut off at a terminal's edge rather than wrapped, whole in a pipe.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    console.print(device_table(chosen, release))
    console.print(LEGEND, style="dim")
    console.print(WHEELS.format(torch=release), style="dim")


def device_table(profiles: tuple[DeviceProfile, ...], torch: str) -> Table:
    """One row per profile, in the given order; wheels are those of this torch release."""
    table = Table(box=None, header_style="bold")
    table.add_column("type", no_wrap=True)
    table.add_column("compute capability", overflow="fold", max_width=10)
    for heading, _, _ in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column(f"torch {torch} wheels", no_wrap=True)
    table.add_column("link", no_wrap=True)
    for row in profiles:
        figures = (_figure(row, field, unit) for _, field, unit in FIGURES)
        table.add_row(row.name, _capability(row), *figures, " ".join(builds_for(row, torch)) or "none", row.link)
    return table


def _capability(row: DeviceProfile) -> str:
    return (row.compute_capability or "-") + _mark(row, "compute_capability")


def _figure(row: DeviceProfile, field: str, unit: float) -> str:
    """Three digits and the mark of its standing, or "-" for zero."""
    value = getattr(row, field) / unit
    text = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return text + _mark(row, field) if value else "-"


def _mark(row: DeviceProfile, field: str) -> str:
    return MARK.get(dict(row.marks).get(field, ""), "")
