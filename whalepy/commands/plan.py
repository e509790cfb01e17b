"""`whalepy plan`: what would this model do on these devices, and does it fit?"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from whalepy.errors import PlanError

NOTHING_FITS = 3
RECOMPUTE = ("none", "attention", "selective", "full")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def plan(
    target: Annotated[
        str, typer.Argument(help="file.py:factory, module:factory, hf:config.json, or a bundled name such as gpt2")
    ],
    cluster: Annotated[str, typer.Option("--cluster", help='A path, or a line such as "2x4090 + 2x2080Ti"')],
    batch_size: Annotated[int | None, typer.Option("--batch-size", help="Rows of the global batch")] = None,
    seq_len: Annotated[int | None, typer.Option("--seq-len", help="Ids per row, for configurations")] = None,
    replicate: Annotated[int | None, typer.Option("--replicate", help="Force this degree of replicate")] = None,
    split: Annotated[int | None, typer.Option("--split", help="Force this degree of split")] = None,
    stages: Annotated[int | None, typer.Option("--stages", help="Not there yet")] = None,
    microbatches: Annotated[int | None, typer.Option("--microbatches", help="Force this number")] = None,
    schedule: Annotated[str | None, typer.Option("--schedule", help="Not there yet")] = None,
    shares: Annotated[str | None, typer.Option("--shares", help="`equal`, or one weight per replica: 3:1")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="fp32, bf16 or fp16")] = None,
    recompute: Annotated[
        str | None, typer.Option("--recompute", help="Force: none, attention, selective or full (a forecast only)")
    ] = None,
    zero: Annotated[int | None, typer.Option("--zero", help="Force: 0 to 3, state in parts (a forecast only)")] = None,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adam, sgd, sgd-momentum, ...")] = "adamw",
    top: Annotated[int, typer.Option("--top", help="How many of the plans tried to show")] = 5,
    program: Annotated[int | None, typer.Option("--program", help="Print the program of this rank")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan, for compile(plan=...)")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the forecast as JSON; - prints it")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the forecast as a page")] = None,
    trace: Annotated[Path | None, typer.Option("--trace", help="Write the lanes as a Chrome trace")] = None,
) -> None:
    """Show the best plan for a model on a cluster: shares, memory and step time. No GPU, no weights, no processes."""
    _refuse_later(stages=stages, schedule=schedule)
    for name, value in (("batch-size", batch_size), ("seq-len", seq_len), ("microbatches", microbatches),
                        ("replicate", replicate), ("split", split), ("top", top)):  # fmt: skip
        if value is not None and value < 1:
            raise PlanError(f"--{name} must be at least 1, not {value}")
    if zero is not None and zero not in range(4):
        raise PlanError(f"--zero must be 0, 1, 2 or 3, not {zero}")
    if recompute is not None and recompute not in RECOMPUTE:
        raise PlanError(f"--recompute {recompute} is not known", fix=f"choose {', '.join(RECOMPUTE)}")
    if precision is not None and precision not in PRECISIONS:
        raise PlanError(f"--precision {precision} is not known", fix=f"choose {', '.join(PRECISIONS)}")
    from whalepy.planner.shares import parse_shares

    weights = None if shares is None else parse_shares(shares)
    from whalepy.dryrun.run import Request, run

    request = Request(
        target,
        cluster,
        batch_size,
        seq_len,
        replicate,
        split,
        microbatches,
        weights,
        precision,
        optimizer,
        top,
        zero,
        recompute,  # type: ignore[arg-type]
        keeps_plan=save is not None or program is not None,
    )
    forecast, chosen = run(request, _Progress())
    if save is not None:
        forecast = replace(forecast, plan_file=str(save))
    _write(forecast, chosen, save=save, json_file=json_file, html=html, trace=trace)
    if program is not None and chosen is not None:
        print(chosen.program(program))
    if not forecast.fits:
        raise typer.Exit(NOTHING_FITS)


def _refuse_later(**options: Any) -> None:
    for name, value in options.items():
        if value:
            raise PlanError(f"--{name} {value} is not there yet", fix=f"leave out --{name}")


class _Progress:
    """Says on a terminal what is being done; silent in a pipe."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self.shown:
            print(f"\r\x1b[2K{text}", end="" if text else "\r", file=sys.stderr, flush=True)


def _write(
    forecast: Any, chosen: Any, *, save: Path | None, json_file: Path | None, html: Path | None, trace: Path | None
) -> None:
    from whalepy.report.as_json import data
    from whalepy.report.terminal import text

    if str(json_file) == "-":
        print(json.dumps(data(forecast), indent=1))
    else:
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        print(text(forecast, width=width, color=colour, unicode=unicode))
        if json_file is not None:
            _to_file(json_file, json.dumps(data(forecast), indent=1) + "\n")
    if save is not None:
        _to_file(save, chosen.to_json() + "\n")
    if html is not None:
        from whalepy.report.page import html as page

        _to_file(html, page(forecast))
    if trace is not None:
        from whalepy.report.trace import chrome_trace

        _to_file(trace, json.dumps(chrome_trace(forecast)))


def _to_file(path: Path, text: str) -> None:
    try:
        path.write_text(text)
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}") from error
