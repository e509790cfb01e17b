"""Figure 19: M6-10B on 64 to 256 V100, eight stages and 35 microbatches under data parallelism.

    python -m benchmarks.whale.figure_19 [--results]

The text has 91 % of the throughput of a GPU kept from 64 to 256, its Figure 19 draws 100 %. The model is the stand-in
of `examples/m6.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.whale.dry import LINK, studied
from benchmarks.whale.figure import Figure, Row, show
from examples import m6
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec

SMALL = m6.Sizes(layers=2, width=32, heads=2, words=64, tokens=8)


def rows(small: bool) -> Iterator[Row]:
    rates: dict[int, float] = {}
    for nodes in (1, 2) if small else (8, 16, 32):
        rates[nodes] = _few_layers(nodes) if small else nodes * m6.MICROBATCHES / m6.forecast(nodes).step_time_s
        first = min(rates)
        if nodes > first:
            kept = rates[nodes] / nodes / (rates[first] / first)
            yield Row(f"{8 * nodes:3} GPUs", 0.91 if nodes == 4 * first else None, kept)


def _few_layers(nodes: int) -> float:
    with torch.device("meta"):
        made = m6.annotated(SMALL, 4)
    spec = ClusterSpec.load(f"{nodes}x4xV100-SXM2-32GB @ {LINK}" if nodes > 1 else "4xV100-SXM2-32GB")
    with studied(made, fold=False) as study:
        study = study.with_rows(nodes * m6.MICROBATCHES)
        tried = tried_in_stages(study, spec, Options(microbatches=m6.MICROBATCHES), Staged())
    return nodes * m6.MICROBATCHES / tried.step_s


FIGURE = Figure(
    19,
    "M6-10B, throughput of a GPU",
    "part of that on 64 GPUs",
    (
        "24 + 24 layers of width 3,840, 512 tokens each way, a microbatch of one row on every copy",
        "float16 beside float32 parameters, every layer computed again in the backward pass, AdamW",
        "a copy of each stage on every node: gradients are reduced inside nodes of eight, and between them",
    ),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
