"""The `whalepy` command. A user's mistake exits with 2 and its text, without a traceback; torch is not imported."""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from whalepy.errors import WhaleError
from whalepy.hardware.profiles import DeviceProfile, known_profiles, profile

BAD_INPUT = 2
MARK = {"?": "?", "memory": "*", "estimated": "~", "assumed": "~"}
LEGEND = "~ estimated or assumed   ? sources disagree   * not looked up   - no units for it   unmarked: data sheets"
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

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


def main() -> None:
    """Run the command; exits with 2 on a WhaleError, whose text it prints."""
    try:
        app(prog_name="whalepy")
    except WhaleError as error:
        print(f"whalepy: {error}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"whalepy {version('whalepy')}")
        raise typer.Exit


@app.callback()
def common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Annotate a local PyTorch model, compile it, train it balanced over the devices you really have."""


@app.command()
def devices(
    names: Annotated[
        list[str] | None, typer.Argument(help="Only these types, as in a cluster spec: 3090, A100-80GB")
    ] = None,
) -> None:
    """List the known device types: memory torch can use, bandwidth, and dense peak TFLOP/s by dtype."""
    chosen = tuple(dict.fromkeys(map(profile, names))) if names else known_profiles()
    # The table is as wide as its words: cut off at a terminal's edge rather than wrapped, whole in a pipe.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(device_table(chosen))
    console.print(LEGEND, style="dim")


def device_table(profiles: tuple[DeviceProfile, ...]) -> Table:
    """One row per profile, in the given order."""
    table = Table(box=None, header_style="bold")
    table.add_column("type", no_wrap=True)
    table.add_column("compute capability", overflow="fold", max_width=10)
    for heading, _, _ in FIGURES:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("link", no_wrap=True)
    for row in profiles:
        table.add_row(row.name, _capability(row), *(_figure(row, field, unit) for _, field, unit in FIGURES), row.link)
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
