"""OPT-350M on GH200 (Sailor), forecast from the published profiles of its layers; half of the runs set two constants.

The first, third, fifth ... run set one factor for all times and the bytes that a process holds beside the tensors of
the profiles; the others are held out. Runs with pipelines are `pipelined`; the transfers between stages block both
sides, and gradients are reduced after the last microbatch, as in DeepSpeed's pipeline engine, on which the runs were
made; each transfer crosses the link of one device.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

from benchmarks.published.pipelined import StageCost, peak_bytes, step_seconds
from benchmarks.published.rows import FOLDER, Row, table
from whalepy.dryrun.described import DescribedCandidate, DescribedStudy
from whalepy.dryrun.strategies import levels_of
from whalepy.hardware.cluster import ClusterSpec
from whalepy.hardware.layer_profile import LayerEntry, LayerFile, read_layers

TABLE = "sailor_gh200_layers"
RUNS = "sailor_gh200"
LAYERS = Path(__file__).parents[2] / "examples" / "opt-350m.yaml"
GIB = 2**30
# GB/s between two GH200 of different nodes as a polynomial of log2(MiB); the most that four together reach, bytes/s.
# Source: eth-easl/sailor@cf2c8e3, sailor/providers/network_coeffs_all_homo.json, inter GH-96, 1 and 4 devices.
BETWEEN = (-0.16570216, 2.79431173, 11.74409677)
NODE_BANDWIDTH = 92551901043.9898


class Closing(DescribedCandidate):
    """Reduces gradients after the last microbatch."""

    @property
    def overlaps(self) -> bool:
        return False


@dataclass(frozen=True)
class Compared:
    """A run beside what is predicted before any constant is set; seconds and bytes."""

    row: Row
    step_s: float
    peak: int

    @property
    def published_s(self) -> float:
        return self.row.published or math.nan

    @property
    def published_bytes(self) -> float:
        return (self.row.memory_gib or math.nan) * GIB


@dataclass(frozen=True)
class Constants:
    """What is set on half of the runs."""

    time: float = 1.0
    """Factor of all times."""
    process_bytes: float = 0.0

    def ratios(self, one: Compared) -> tuple[float, float]:
        """Predicted over published: time, memory."""
        return self.time * one.step_s / one.published_s, (one.peak + self.process_bytes) / one.published_bytes


def fitted(runs: Sequence[Compared]) -> Constants:
    """The constants with the least mean error: one run is met exactly by each, and tried are those of every run."""
    times = [Constants(one.published_s / one.step_s) for one in runs]
    best = min(times, key=lambda tried: sum(abs(tried.ratios(one)[0] - 1) for one in runs))
    held = [replace(best, process_bytes=one.published_bytes - one.peak) for one in runs]
    return min(held, key=lambda tried: sum(abs(tried.ratios(one)[1] - 1) for one in runs))


# -- one run


def forecast(row: Row, layers_per_stage: Sequence[int], file: LayerFile) -> Compared:
    """Time and memory of a run without any constant."""
    each = [layer for layer in file.layers for _ in range(layer.repeat)]
    parts = [each[a:b] for a, b in pairwise([0, *accumulate(layers_per_stage)])]
    stages = [_stage(row, file, part, first=k == 0, last=k == len(parts) - 1) for k, part in enumerate(parts)]
    return Compared(row, step_seconds(stages, row.microbatches), peak_bytes(stages, row.microbatches))


def _stage(row: Row, file: LayerFile, part: Sequence[LayerEntry], *, first: bool, last: bool) -> StageCost:
    """One stage as a model of its own on its devices: replicas on nodes of their own, split inside each."""
    layers = tuple(_again(own) for own in _runs(part))
    study = DescribedStudy.of_file(file.model_copy(update={"layers": layers}), row.optimizer, row.batch)
    node = {"devices": f"{row.split}xGH200", "count": row.replicate}
    link = {"bandwidth": NODE_BANDWIDTH, "origin": "measured"}
    cluster = ClusterSpec.load({"nodes": [node], **({"link": link} if row.replicate > 1 else {})})
    levels = levels_of(row.replicate, row.split)
    cut = study.candidate(levels, cluster, cluster.speeds(), row.microbatches).cut
    candidate = Closing(study, cluster, cut, levels, row.microbatches)
    rows = row.batch // row.replicate
    step_s, work, cost = candidate.played([rows] * row.replicate).step_s, candidate.work(0, rows), candidate.cost(0)
    micro = rows // row.microbatches
    computing = (
        cost.seconds(e) * n for e, n in work.weighted if e.phase in ("forward", "backward") and not e.collective
    )
    compute_s = sum(computing) / row.microbatches
    handed = sum(_transfer(row, micro, one) for one in _neighbours(file, part, first=first, last=last))
    saved = sum((layer.on(layer.saved_bytes, row.split) or 0.0) * micro for layer in part)
    return StageCost(compute_s, handed, step_s - row.microbatches * compute_s, work.peak, round(saved))


def _neighbours(file: LayerFile, part: Sequence[LayerEntry], *, first: bool, last: bool) -> Iterator[LayerEntry]:
    """The layers whose outputs cross into the stage and out of it; their gradients cross as well."""
    if not first:
        yield file.layers[1]  # the output of a block, as large as any other
    if not last:
        yield part[-1]


def _transfer(row: Row, rows: int, layer: LayerEntry) -> float:
    """Seconds for the output of a layer to cross, and its gradient to come back."""
    size = (layer.on(layer.output_bytes, row.split) or 0.0) * rows
    at = math.log2(max(size / 2**20, 1.0))
    a, b, c = BETWEEN
    return 2 * size / ((a * at * at + b * at + c) * 1e9)


def _runs(part: Sequence[LayerEntry]) -> Iterator[list[LayerEntry]]:
    for _, own in groupby(part, key=lambda layer: layer.name):
        yield list(own)


def _again(own: Sequence[LayerEntry]) -> LayerEntry:
    return own[0].model_copy(update={"repeat": len(own)})


# -- the table


def compare(_: str, only: str) -> dict[str, Any]:
    """Predicted over published for every run, printed; the constants and the errors of both halves."""
    file, cuts = read_layers(LAYERS), _stages()
    found = [forecast(row, cuts[row.row], file) for row in table(RUNS)]
    constants = fitted(found[::2])
    print(
        f"\n{TABLE}: {len(found)} rows; time x {constants.time:.4g}, {constants.process_bytes / GIB:.2f} GiB a process"
    )
    rows = [_record(one, constants, held_out=k % 2 == 1) for k, one in enumerate(found)]
    for row in rows:
        if only in row["row"]:
            print(_shown(row), flush=True)
    halves = {"fitted": rows[::2], "held_out": rows[1::2]}
    summary = {half: {kind: _errors(own, kind) for kind in ("ratio", "memory_ratio")} for half, own in halves.items()}
    print(json.dumps(summary), flush=True)
    made = {"time": round(constants.time, 4), "process_gib": round(constants.process_bytes / GIB, 3)}
    return {"rows": rows, "constants": made, "summary": summary}


def _stages() -> dict[str, tuple[int, ...]]:
    """Layers of each stage, by run."""
    with (FOLDER / "sailor_gh200_stages.csv").open(newline="") as file:
        return {entry["row"]: tuple(map(int, entry["layers"].split(";"))) for entry in csv.DictReader(file)}


def _record(one: Compared, constants: Constants, *, held_out: bool) -> dict[str, Any]:
    time, memory = constants.ratios(one)
    return {
        "row": one.row.row,
        "held_out": held_out,
        "published": one.row.published,
        "predicted": round(constants.time * one.step_s, 5),
        "unit": "s",
        "ratio": round(time, 4),
        "published_gib": one.row.memory_gib,
        "predicted_gib": round((one.peak + constants.process_bytes) / GIB, 3),
        "memory_ratio": round(memory, 4),
    }


def _errors(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, float | int]:
    off = [abs(row[kind] - 1) for row in rows]
    return {"rows": len(off), "mean": round(sum(off) / len(off), 4), "worst": round(max(off), 4)}


def _shown(row: dict[str, Any]) -> str:
    half = "held out" if row["held_out"] else "fitted"
    times = f"{row['published']:8.4f} {row['predicted']:8.4f} s {row['ratio']:5.2f}"
    memory = f"{row['published_gib']:6.2f} {row['predicted_gib']:6.2f} GiB {row['memory_ratio']:5.2f}"
    return f"{row['row']:14}  {times}  {memory}  {half}"
