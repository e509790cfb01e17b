"""Activation memory of Megatron's GPTs by recomputation (Korthikanti et al., arXiv:2205.05198, Figures 1 and 7).

The paper counts what the blocks of the first pipeline stage keep for the backward pass: no embeddings, no head, no
weights. The first stage of 1F1B holds as
many blocks' worth of microbatches as the model has blocks, with interleaving `1 + (p - 1) / (p m)` times that (the
paper, section 4.2.3).
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.published.rows import FOLDER, config_of
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.recompute import Recompute
from whalepy.dryrun.strategies import levels_of
from whalepy.dryrun.study import Candidate, Savings, Study
from whalepy.dryrun.targets import target_of
from whalepy.hardware.cluster import ClusterSpec
from whalepy.planner.work import Stretch
from whalepy.runtime.build import Recipe

TABLE = "sequence_parallel"
GIB = 2**30
RECOMPUTE: Mapping[str, Recompute] = {
    "none": "none",
    "seq": "none",
    "sel": "attention",
    "seqsel": "attention",
    "full": "full",
}


def compare(name: str, only: str) -> dict[str, Any]:
    """Predicted over published for every row, printed as they come."""
    with (FOLDER / f"{name}.csv").open(newline="") as file:
        entries = [entry for entry in csv.DictReader(file) if only in entry["model"]]
    tried = [entry for entry in entries if entry["mode"] in RECOMPUTE]
    print(f"\n{name}: {len(tried)} of {len(entries)} rows", flush=True)
    known: dict[tuple[str, str], float] = {}
    rows = [_compared(entry, known) for entry in tried]
    off = [abs(row["ratio"] - 1) for row in rows]
    summary = {"rows": len(off), "mean": round(sum(off) / len(off), 4), "worst": round(max(off), 4)} if off else {}
    print(json.dumps(summary), flush=True)
    left = [f"{entry['figure']} {entry['model']} {entry['mode']}" for entry in entries if entry not in tried]
    return {"rows": rows, "summary": {"memory": summary}, "left": dict.fromkeys(left, "sequence parallel")}


def _compared(entry: Mapping[str, str], known: dict[tuple[str, str], float]) -> dict[str, Any]:
    """Figure 1 is in GiB, Figure 7 in per cent of what is kept without recomputation."""
    kept, plain = (_cached(entry, mode, known) for mode in (entry["mode"], "none"))
    if entry["activation_gib"]:
        published, predicted, unit = float(entry["activation_gib"]), kept * _in_flight(entry) / GIB, "GiB"
    else:
        published, predicted, unit = float(entry["activation_pct_of_none"]), 100 * kept / plain, "%"
    row = {"row": f"{entry['figure']} {entry['model']} {entry['mode']}", "published": published, "unit": unit}
    row |= {"predicted": round(predicted, 3), "ratio": round(predicted / published, 4)}
    print(f"{row['row']:30} {published:8.2f} {predicted:8.2f} {unit:4} {row['ratio']:6.3f}", flush=True)
    return row


def _in_flight(entry: Mapping[str, str]) -> float:
    """Blocks whose activations the first stage holds at once, per microbatch."""
    stages, chunks = int(entry["pp"]), int(entry["interleave_vp"])
    return int(entry["layers"]) * (1 + (stages - 1) / (stages * chunks) if chunks > 1 else 1.0)


def _cached(entry: Mapping[str, str], mode: str, known: dict[tuple[str, str], float]) -> float:
    key = entry["model"], mode
    if key not in known:
        known[key] = kept_by_block(entry, mode)
    return known[key]


def kept_by_block(entry: Mapping[str, str], mode: str) -> float:
    """Bytes that one block keeps on one device for one microbatch: by how much a forward pass grows with each block."""
    shape = {name: entry[name] for name in ("hidden", "layers", "heads")} | {"family": "gpt", "vocab": "51200"}
    tokens, degree, rows = int(entry["seq_len"]), int(entry["tp"]), int(entry["microbatch"])
    config = config_of({**shape, "attention": "eager", "dropout": "0.1"}, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        target = target_of(f"hf:{path}", rows, tokens)
    for parameter in target.model.parameters():
        parameter.data = parameter.data.to(torch.float16)
    cluster = ClusterSpec.load(f"{degree}xA100-SXM4-80GB")
    with folded(target.model) as blocks:
        study = Study.of(Recipe(target.model), target.example, "adamw", blocks, master=True)
        candidate = _cut(
            study, cluster, degree, Savings(0, RECOMPUTE[mode], regathers="seq" in mode), sequences="seq" in mode
        )
        parts = candidate.work(0, rows).parts
    return next(part.grows for part in parts if isinstance(part, Stretch))


SEQUENCE = "kwargs['input_ids']:1"


def _cut(study: Study, cluster: ClusterSpec, degree: int, savings: Savings, *, sequences: bool) -> Candidate:
    """Heads, hidden units and vocabulary cut, as Megatron-LM does; then sequences, where nothing else is."""
    levels = levels_of(1, degree)
    found = study.candidate(levels, cluster, cluster.speeds(), 1, savings)
    (level, order), *_ = found.plan.orders.items()
    cutting = tuple(name for name in order if name.endswith((".weight:0", ".attn.c_attn.weight:1.1", ".c_fc.weight:1")))
    wanted = (*cutting, SEQUENCE) if sequences else cutting
    return study.candidate(levels, cluster, cluster.speeds(), 1, savings, {level: wanted})
