"""`whalepy plan`: what would this model do on these devices, and does it fit?"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from whalepy.errors import PlanError

NOTHING_FITS = 3
MOST_ROWS = 1_000_000
"""More than anyone trains with at once; rows are dealt out one by one."""
RECOMPUTE = ("none", "attention", "selective", "full")
BALANCES = ("exact", "whale", "equal")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def plan(
    target: Annotated[
        str,
        typer.Argument(
            help="What to train: file.py:factory or module:factory (a factory returns the model and one batch), "
            "hf:config.json, layers:FILE (what each layer costs), or a bundled name: gpt2, gpt2-medium, gpt2-xl, "
            "bert-base, bert-large, t5-large, llama-3.2-1b, llama-3.1-8b, vit-base, resnet-50"
        ),
    ],
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster",
            help="The devices: a YAML or JSON file, or a line: 2x4090 + 2x2080Ti (one node), "
            "4x8xA100-SXM4-80GB @ 100Gbit/s (four nodes). `whalepy devices` lists the types",
        ),
    ],
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows of the global batch. Default: the factory's; 8 otherwise")
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option("--seq-len", help="Ids per row, for configurations. Default: 512, or all positions if fewer"),
    ] = None,
    replicate: Annotated[
        int | None, typer.Option("--replicate", help="Force this degree of replicate. Default: chosen")
    ] = None,
    split: Annotated[int | None, typer.Option("--split", help="Force this degree of split. Default: chosen")] = None,
    stages: Annotated[
        int | None,
        typer.Option("--stages", help="Cut the blocks into so many stages. Default: chosen, or as annotated"),
    ] = None,
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="Devices of each stage: 6,2x2 gives the first six parts of the rows, the second two, each split by "
            "two; 3*4 is 4,4,4. Default: chosen",
        ),
    ] = None,
    microbatches: Annotated[
        int | None,
        typer.Option(
            "--microbatches",
            help="Force this number. Default: chosen with the stages, 4 per annotated stage; else 1, more where 1 "
            "does not fit",
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="Of stages: 1f1b, gpipe, zero-bubble, or interleaved:2 (2 stages per device)"),
    ] = None,
    shares: Annotated[
        str | None,
        typer.Option("--shares", help="`equal`, or a weight per replica: 3:1. Default: the fastest that fit"),
    ] = None,
    balance: Annotated[
        str | None,
        typer.Option(
            "--balance",
            help="How rows and stages are shared out: exact (by seconds, within memory), whale (by FLOP rates, then by "
            "memory: Whale's algorithm) or equal. Default: exact",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="fp32; bf16 or fp16 mixed (a forecast only). Default: the model's own types"),
    ] = None,
    recompute: Annotated[
        str | None,
        typer.Option(
            "--recompute",
            help="Force none, attention, selective or full (a forecast only). Default: none, more where that does "
            "not fit",
        ),
    ] = None,
    zero: Annotated[
        int | None,
        typer.Option(
            "--zero",
            help="Force 0 to 3: keep optimizer state (1), gradients (2), parameters (3) in parts over the replicas "
            "(a forecast only). Default: 0, more where it does not fit",
        ),
    ] = None,
    optimizer: Annotated[
        str, typer.Option("--optimizer", help="adamw, adam, sgd, sgd-momentum, adagrad or rmsprop")
    ] = "adamw",
    top: Annotated[int, typer.Option("--top", help="How many of the plans tried to print; --json has all")] = 5,
    program: Annotated[int | None, typer.Option("--program", help="Print the program of this rank as well")] = None,
    save: Annotated[Path | None, typer.Option("--save", help="Write the plan, for compile(plan=FILE)")] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="Cost this saved plan anew, in place of looking for the best")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the forecast as JSON; - prints it, and nothing else")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the forecast as one page, to open or send")] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write the step as a Chrome trace, for ui.perfetto.dev")
    ] = None,
) -> None:
    """Show the best plan for a model on a cluster: shares, memory and step time. No GPU, no weights, no processes.

    Exits with 0 if it fits, 3 if nothing does, 2 for a mistake in what was asked.
    """
    for name, value in (("batch-size", batch_size), ("seq-len", seq_len), ("microbatches", microbatches),
                        ("replicate", replicate), ("split", split), ("stages", stages), ("top", top)):  # fmt: skip
        if value is not None and value < 1:
            raise PlanError(f"--{name} must be at least 1, not {value}")
    if batch_size is not None and batch_size > MOST_ROWS:
        raise PlanError(f"--batch-size must be at most {MOST_ROWS:,}, not {batch_size:,}")
    if zero is not None and zero not in range(4):
        raise PlanError(f"--zero must be 0, 1, 2 or 3, not {zero}")
    _known("recompute", recompute, RECOMPUTE)
    _known("precision", precision, PRECISIONS)
    _known("balance", balance, BALANCES)
    if (balance is not None and plan_file is not None) or (balance not in (None, "exact") and shares is not None):
        other = "--plan" if plan_file is not None else "--shares"
        raise PlanError(f"--balance and {other} cannot both decide", fix=f"leave out --balance, or {other}")
    if widths is not None:
        others = (("--stages", stages), ("--replicate", replicate), ("--split", split), ("--shares", shares))
        for other in (name for name, value in (*others, ("--balance", balance)) if value is not None):
            raise PlanError(f"--widths and {other} cannot both decide", fix=f"leave out --widths, or {other}")
    if program is not None and str(json_file) == "-":
        raise PlanError("--program and --json - both print", fix="write the JSON to a file: --json FILE")
    if plan_file is not None and target.startswith("layers:"):
        raise PlanError("--plan needs the model itself: layers without code have no saved plan", fix="leave out --plan")
    files = Files(save, json_file, html, trace)
    files.check()
    from whalepy.planner.form import parse_widths
    from whalepy.planner.schedule.kinds import parse_kind
    from whalepy.planner.shares import parse_shares

    schedule = None if schedule is None else str(parse_kind(schedule))

    weights = None if shares is None else parse_shares(shares)
    from whalepy.dryrun.progress import OnTerminal

    progress = OnTerminal()
    try:
        progress("importing torch")
        from whalepy.dryrun.run import Request, run
        from whalepy.dryrun.run_described import PREFIX, run_described

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
            plan=None if plan_file is None else str(plan_file),
            stages=stages,
            widths=None if widths is None else parse_widths(widths),
            schedule=schedule,
            balance=balance or "exact",  # type: ignore[arg-type]
        )
        forecast, chosen = (run_described if target.startswith(PREFIX) else run)(request, progress)
    finally:
        progress("")
    if save is not None or plan_file is not None:
        forecast = replace(forecast, plan_file=str(save or plan_file))
    code = None if program is None or chosen is None else chosen.program(program)
    _print(forecast, top=top, as_json=str(json_file) == "-")
    files.write(forecast, chosen)
    if code is not None:
        print(code)
    if not forecast.fits:
        raise typer.Exit(NOTHING_FITS)


def _known(option: str, value: str | None, known: Iterable[str]) -> None:
    if value is not None and value not in known:
        raise PlanError(f"--{option} {value} is not known", fix=f"choose {', '.join(known)}")


def _print(forecast: Any, *, top: int, as_json: bool) -> None:
    from whalepy.report.as_json import data
    from whalepy.report.terminal import text

    if as_json:
        print(json.dumps(data(forecast), indent=1))
        return
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(text(forecast, width=width, color=colour, unicode=unicode, top=top))


@dataclass(frozen=True)
class Files:
    """What is written, and where."""

    save: Path | None
    json_file: Path | None
    html: Path | None
    trace: Path | None

    def check(self) -> None:
        """PlanError: a file that cannot be written, told before minutes are spent on what it would hold."""
        for path in (self.save, self.json_file, self.html, self.trace):
            if path is None or str(path) == "-":
                continue
            if path.is_dir():
                raise PlanError(f"{path} cannot be written: it is a folder", fix="give the name of a file")
            if not path.parent.is_dir():
                raise PlanError(f"{path} cannot be written: there is no folder {path.parent}")

    def write(self, forecast: Any, chosen: Any) -> None:
        """The plan, and the forecast in each form that was asked for."""
        if self.save is not None:
            _to_file(self.save, chosen.to_json() + "\n")
        if self.json_file is not None and str(self.json_file) != "-":
            from whalepy.report.as_json import data

            _to_file(self.json_file, json.dumps(data(forecast), indent=1) + "\n")
        if self.html is not None:
            from whalepy.report.page import html

            _to_file(self.html, html(forecast))
        if self.trace is not None:
            from whalepy.report.trace import chrome_trace

            _to_file(self.trace, json.dumps(chrome_trace(forecast), separators=(",", ":")))


def _to_file(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path} cannot be written: {error.strerror}") from error
