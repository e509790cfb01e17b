"""Predicted by the dry run against published, row by row.

    python -m benchmarks.fidelity [--table NAME]... [--only TEXT] [--sheet] [--processes N] [--results FILE]

Every row of `benchmarks/published/` whose configuration the dry run can express is forecast with the settings its
publisher states; nothing is fitted to a row. The fractions of their peaks that devices reach (hardware/efficiency.py)
were set on the first, third, fifth ... timed row of each table: "held out" are the others. The scales of types
(hardware/scales.csv, left out with `--sheet`) were set on all rows of BERT and language models of these types.

Table `sailor_gh200_layers` is forecast from published profiles of the layers, with constants set on half of its runs.

A ratio is predicted over published, of step times and of memory; the rank correlation (Spearman) is of the quantity as
published. Rows that were published as out of memory must not be called `fits`, rows that ran not `no`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.published import activations, layered
from benchmarks.published.fused_loss import factory_in
from benchmarks.published.rows import TABLES, Row, cluster_of, config_of, shapes, table
from whalepy.dryrun.run import Request, run
from whalepy.errors import WhaleError
from whalepy.planner.forecast import Forecast

GIB = 2**30
OTHERS = {activations.TABLE: activations.compare, layered.TABLE: layered.compare}
"""Tables that are compared in ways of their own; the figures over all tables are without them."""


@dataclass(frozen=True)
class Compared:
    """One row beside its forecast; ratios are predicted over published."""

    row: Row
    step_s: float
    memory_gib: float
    verdict: str

    @property
    def ratio(self) -> float | None:
        return None if self.row.published is None else self.step_s / self.row.step_s(self.row.published)

    @property
    def memory_ratio(self) -> float | None:
        return None if self.row.memory_gib is None else self.memory_gib / self.row.memory_gib

    @property
    def false_fit(self) -> bool:
        return self.row.outcome == "oom" and self.verdict == "fits"

    @property
    def false_no(self) -> bool:
        return self.row.outcome == "ran" and self.verdict == "no"


def forecast_of(row: Row, folder: Path, *, sheet: bool = False) -> Forecast:
    """The dry run of a row with everything forced that its publisher states."""
    shape = shapes()[row.model]
    config, cluster = config_of(shape, row.tokens), folder / "cluster.json"
    target, fused = row.model, row.framework.startswith("llm-foundry") and config is not None
    if fused and config is not None and row.tokens is not None:
        target = factory_in(folder, config, row.batch, row.tokens)
    elif config is not None:
        (folder / "config.json").write_text(json.dumps(config))
        target = f"hf:{folder / 'config.json'}"
    cluster.write_text(json.dumps(cluster_of(row, sheet=sheet)))
    request = Request(
        target=target,
        cluster=str(cluster),
        rows=row.batch,
        length=None if fused else row.tokens,
        replicate=row.replicate,
        split=row.split,
        stages=row.stages,
        microbatches=row.microbatches,
        shares="equal",
        balance="equal" if row.stages > 1 else "exact",
        precision=row.precision,
        optimizer=row.optimizer,
        zero=row.zero,
        recompute=row.recompute,
        keeps_plan=False,
        beyond=False,
    )
    return run(request, lambda _: None)[0]


def compared(row: Row, folder: Path, *, sheet: bool = False) -> Compared:
    forecast = forecast_of(row, folder, sheet=sheet)
    device = max(forecast.devices, key=lambda one: one.peak_memory_bytes)
    runtime = sum(held.bytes for held in device.held if held.name == "runtime")
    beside = 0 if row.memory_kind == "device" else runtime
    return Compared(row, forecast.step_time_s, (device.peak_memory_bytes - beside) / GIB, forecast.verdict)


# -- figures of a table --------------------------------------------------------------------------------------------


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, ties sharing their mean rank; nan for fewer than three pairs or without any variation."""
    if len(first) < 3:
        return float("nan")
    a, b = _ranks(first), _ranks(second)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else float("nan")


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def errors(ratios: Sequence[float | None]) -> dict[str, float | int]:
    """Mean and worst of |ratio - 1|, and the median ratio, which shows a common bias."""
    known = np.array([ratio for ratio in ratios if ratio is not None])
    if not len(known):
        return {"rows": 0}
    off = np.abs(known - 1)
    figures = {"mean": off.mean(), "worst": off.max(), "median_ratio": np.median(known)}
    return {"rows": len(known), **{key: round(float(value), 4) for key, value in figures.items()}}


def summary(found: Sequence[Compared]) -> dict[str, Any]:
    timed = [one for one in found if one.row.published is not None]
    predicted = [one.row.in_unit(one.step_s) for one in timed]
    correlation = rank_correlation([one.row.published or 0.0 for one in timed], predicted)
    return {
        "time": {**errors([one.ratio for one in found]), "rank_correlation": round(correlation, 4)},
        "memory": errors([one.memory_ratio for one in found]),
        "out_of_memory": sum(one.row.outcome == "oom" for one in found),
        "ran": sum(one.row.outcome == "ran" for one in found),
        "false_fits": [one.row.row for one in found if one.false_fit],
        "false_noes": [one.row.row for one in found if one.false_no],
    }


def shown(one: Compared) -> str:
    row, parts = one.row, [f"{one.row.row[:70]:70}"]
    if row.published is not None:
        parts.append(f"{row.published:>9.4g} {row.in_unit(one.step_s):>9.4g} {row.unit:12} {one.ratio:5.2f}")
    if row.memory_gib is not None:
        parts.append(f"{row.memory_gib:6.1f} {one.memory_gib:6.1f} GiB {one.memory_ratio:5.2f}")
    return "  ".join([*parts, f"{row.outcome}: {one.verdict}{' !' if one.false_fit or one.false_no else ''}"])


def record(one: Compared) -> dict[str, Any]:
    """A row of the results file."""
    return {
        "row": one.row.row,
        "stages": one.row.stages,
        "published": one.row.published,
        "predicted": None if one.row.published is None else round(one.row.in_unit(one.step_s), 5),
        "unit": one.row.unit,
        "ratio": one.ratio and round(one.ratio, 4),
        "published_gib": one.row.memory_gib,
        "predicted_gib": round(one.memory_gib, 3),
        "memory_ratio": one.memory_ratio and round(one.memory_ratio, 4),
        "outcome": one.row.outcome,
        "verdict": one.verdict,
    }


# -- running -------------------------------------------------------------------------------------------------------


def tried_alone(row: Row, sheet: bool) -> tuple[Compared | str, float]:
    """A row compared, or why it could not be, and the seconds that this took."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            found: Compared | str = compared(row, Path(folder), sheet=sheet)
        except WhaleError as error:
            found = str(error).splitlines()[0]
    return found, time.perf_counter() - start


def compare_table(name: str, only: str, processes: Executor, *, sheet: bool = False) -> dict[str, Any]:
    """The rows and the summary of one table, printed as they come."""
    rows = [row for row in table(name) if only in row.row]
    tried = [row for row in rows if not row.left]
    print(f"\n{name}: {len(tried)} of {len(rows)} rows", flush=True)
    found: list[Compared] = []
    failed: dict[str, str] = {}
    for row, (one, seconds) in zip(tried, processes.map(tried_alone, tried, repeat(sheet)), strict=True):
        if isinstance(one, str):
            failed[row.row] = one
            print(f"{row.row[:70]:70}  failed: {one}", flush=True)
            continue
        found.append(one)
        print(f"{shown(one)}  {seconds:.0f} s", flush=True)
    left = {row.row: row.left for row in rows if row.left}
    timed = [one for one in found if one.row.published is not None]
    made = {"rows": [record(one) for one in found], "summary": summary(found), "failed": failed, "left": left}
    made["held_out"] = errors([one.ratio for one in timed[1::2]])
    print(json.dumps(made["summary"]), "held out", json.dumps(made["held_out"]), flush=True)
    return made


def over_all(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The same over the rows of all tables of runs."""
    runs = [made for name, made in tables.items() if name not in OTHERS]
    ratios = [[row["ratio"] for row in made["rows"] if row["ratio"] is not None] for made in runs]
    ran = [row["verdict"] for made in runs for row in made["rows"] if row["outcome"] == "ran"]
    oom = [row["verdict"] for made in runs for row in made["rows"] if row["outcome"] == "oom"]
    alone = [row["ratio"] for made in runs for row in made["rows"] if row["stages"] == 1]
    return {
        "time": errors([ratio for table in ratios for ratio in table]),
        "without_pipelines": errors(alone),
        "held_out": errors([ratio for table in ratios for ratio in table[1::2]]),
        "memory": errors([row["memory_ratio"] for made in runs for row in made["rows"]]),
        "out_of_memory": len(oom),
        "of_these_called_fits": oom.count("fits"),
        "ran": len(ran),
        "of_these_called_no": ran.count("no"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="append", choices=[*TABLES, *OTHERS], help="default: all")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--results", type=Path, help="write rows and summaries as JSON")
    parser.add_argument("--sheet", action="store_true", help="from data sheets alone, without the scales of types")
    parser.add_argument("--processes", type=int, default=1, help="how many rows are forecast at a time")
    options = parser.parse_args()
    tables: dict[str, Any] = {}
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as processes:
        for name in options.table or (*TABLES, *OTHERS):
            if name in OTHERS:
                tables[name] = OTHERS[name](name, options.only)
            else:
                tables[name] = compare_table(name, options.only, processes, sheet=options.sheet)
            if options.results:
                made = {**_made(), "all": over_all(tables), "tables": tables}
                options.results.write_text(json.dumps(made, indent=1) + "\n")
    print(f"\nall: {json.dumps(over_all(tables))}")


def _made() -> dict[str, str]:
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python -m benchmarks.fidelity", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, torch {torch.__version__}",
    }


if __name__ == "__main__":
    main()
