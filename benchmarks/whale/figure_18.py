"""Figure 18: four stages, each on two GPUs, on 4 V100 and 4 P100: cut by the devices against even cuts.

    python -m benchmarks.whale.figure_18 [--results]

All cuts run on the devices that the planner's best stages take. Whale's cut follows FLOP rates
(`whalepy.planner.whale`), an even cut the number of blocks. Measured here are CPU ranks of unequal speed
(`benchmarks/unequal_stages.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.whale.dry import blocks_per_stage, in_stages, mixed
from benchmarks.whale.figure import Figure, Row, measured_in, show
from benchmarks.whale.models import Factory, bert_large, t5_large
from whalepy.dryrun.tried import Balance

MODELS: tuple[tuple[str, Factory, float], ...] = (("BertLarge", bert_large, 1.23), ("T5-Large", t5_large, 1.23))
STAGES, MICROBATCHES, PER_MICROBATCH = 4, 16, 8
BALANCES: tuple[Balance, ...] = ("equal", "whale", "exact")


def rows(small: bool) -> Iterator[Row]:
    stages = 2 if small else STAGES
    for name, factory, paper in MODELS[:1] if small else MODELS:
        seconds: dict[Balance, tuple[float, str]] = {}
        for balance in BALANCES:
            made = factory(2 * PER_MICROBATCH * MICROBATCHES, small=small)
            forced = {"stages": stages, "replicate": 2, "microbatches": MICROBATCHES, "balance": balance}
            tried = in_stages(made, mixed(stages), **forced)
            seconds[balance] = tried.step_s, blocks_per_stage(made[0])
        for balance, theirs in (("whale", paper), ("exact", None)):
            now, cut = seconds[balance]
            note = f"blocks {cut}, {seconds['equal'][1]} if even"
            yield Row(f"{name}, {balance} cut", theirs, seconds["equal"][0] / now, note=note)
    here: dict[str, Any] = measured_in("unequal-stages") or {"rows": []}
    for row in here["rows"]:
        note = f"blocks {row['planned_blocks']}, {row['even_blocks']} if even; CPU ranks, {here['date']}"
        yield Row(f"{row['kind']} here", None, row["bound"], row["gain"], note)


FIGURE = Figure(
    18,
    "pipelines on 4 V100 and 4 P100",
    "times an even cut",
    (
        f"{MICROBATCHES} microbatches of {PER_MICROBATCH} sequences of 128 tokens for each of two replicas",
        "of T5 the paper's four stages may be cut elsewhere: here encoder and decoder blocks count alike",
    ),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
