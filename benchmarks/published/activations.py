"""Activation memory of Megatron's GPTs by recomputation (Korthikanti et al., arXiv:2205.05198, Figures 1 and 7).

The paper counts what the blocks of the first pipeline stage keep for the backward pass: no embeddings, no head, no
weights. Here that is the mixed difference of the memory at the end of the forward pass over two depths and two
batches, which is what one block keeps for so many samples; everything else cancels. The first stage of 1F1B holds as
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

from benchmarks.published.rows import FOLDER, config_of
from whalepy.dryrun.run import Request, run
from whalepy.planner.forecast import DeviceForecast

TABLE = "sequence_parallel"
GIB = 2**30
RECOMPUTE = {"none": "none", "sel": "attention", "full": "full"}
"""Modes without the sequence axis; `split` cuts axes of parameters only, so the others cannot be forced yet."""
SHALLOW, DEEP = 2, 4


def compare(name: str, only: str) -> dict[str, Any]:
    """Predicted over published for every row without sequence parallelism, printed as they come."""
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
        known[key] = kept_by_block(entry, RECOMPUTE[mode])
    return known[key]


def kept_by_block(entry: Mapping[str, str], recompute: str) -> float:
    """Bytes that one block keeps on one device for one microbatch."""
    batch = int(entry["tp"])  # a row per device, so that data parallelism could be compared too

    def kept(layers: int, rows: int) -> int:
        return _after_forward(entry, layers, rows, recompute)

    more = kept(DEEP, 2 * batch) - kept(SHALLOW, 2 * batch) - (kept(DEEP, batch) - kept(SHALLOW, batch))
    return more / (DEEP - SHALLOW) / batch * int(entry["microbatch"])


def _after_forward(entry: Mapping[str, str], layers: int, rows: int, recompute: str) -> int:
    """Most bytes in use on the first device before the backward pass."""
    shape = {"family": "gpt", "hidden": entry["hidden"], "layers": str(layers), "heads": entry["heads"]}
    tokens, degree = int(entry["seq_len"]), int(entry["tp"])
    config = config_of({**shape, "vocab": "51200", "attention": "eager", "dropout": "0.1"}, tokens)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        request = Request(
            target=f"hf:{path}",
            cluster=f"{degree}xA100-SXM4-80GB",
            rows=rows,
            length=tokens,
            replicate=1,
            split=degree,
            microbatches=1,
            precision="fp16",
            recompute=recompute,
            keeps_plan=False,
        )
        return _before_backward(run(request, lambda _: None)[0].devices[0])


def _before_backward(device: DeviceForecast) -> int:
    start = min(span.start_s for span in device.spans if span.kind == "backward")
    return max(size for at, size in device.memory if at <= start)
