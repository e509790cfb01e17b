"""Figure 19: M6-10B on 64 to 256 V100, eight stages and 35 microbatches under data parallelism.

    python -m benchmarks.whale.figure_19 [--results]

The text has 91 % of the throughput of a GPU kept from 64 to 256, its Figure 19 draws 100 %. The model is the stand-in
of `examples/m6.py`. Which devices make a stage is not stated, and decides: where every node has all eight stages, their
gradients cross between nodes at 64 GPUs already; where a node has one stage, only beyond 64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.whale.figure import Figure, Row, show
from examples import m6
from whalepy.dryrun.blocks import LEAST_IN_STAGES, folded
from whalepy.dryrun.staged import Staged, tried_in_stages
from whalepy.dryrun.study import Study
from whalepy.dryrun.tried import Options
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.build import Recipe

SMALL = m6.Sizes(layers=4, width=32, heads=2, words=64, tokens=8)
PLACES = {"a node has all stages": True, "a node has one stage": False}


def rows(small: bool) -> Iterator[Row]:
    counts = (1, 2) if small else (8, 16, 32)
    sizes, stages = (SMALL, 4) if small else (m6.Sizes(), m6.STAGES)
    for name, spread in PLACES.items():
        first = rate(counts[0], sizes, stages, spread)
        for nodes in counts[1:]:
            kept = rate(nodes, sizes, stages, spread) / first
            yield Row(f"{nodes * stages:3} GPUs, {name}", m6.PAPER if nodes == 4 * counts[0] else None, kept)


def rate(nodes: int, sizes: m6.Sizes, stages: int, spread: bool) -> float:
    """Rows a second and GPU, on nodes of as many GPUs as stages."""
    placement = [[stages * node + k for node in range(nodes)] for k in range(stages)] if spread else None
    with torch.device("meta"):
        model, batch = m6.annotated(sizes, stages, placement)
    cluster = f"{nodes}x{stages}xV100-SXM2-32GB @ {m6.LINK}" if nodes > 1 else f"{stages}xV100-SXM2-32GB"
    with folded(model.half(), least=LEAST_IN_STAGES) as blocks:
        study = Study.of(Recipe(model), batch, "adamw", blocks, master=True).with_rows(nodes * m6.MICROBATCHES)
        options = Options(microbatches=m6.MICROBATCHES, recompute="full")
        tried = tried_in_stages(study, ClusterSpec.load(cluster), options, Staged())
    return m6.MICROBATCHES / tried.step_s


FIGURE = Figure(
    19,
    "M6-10B, throughput of a GPU",
    "part of that on 64 GPUs",
    (
        "24 + 24 layers of width 3,840, 512 tokens each way, a microbatch of one row on every copy",
        "float16 beside float32 parameters, every layer computed again in the backward pass, AdamW",
    ),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
