"""Figure 11: BERT-large as a pipeline, backward first, against GPipe.

    python -m benchmarks.whale.figure_11 [--results]

One GPU a stage, the same cut for both. Whale runs the backward of a microbatch as soon as it can (1F1B); GPipe runs all
forwards first and, as published, computes every stage's activations again in the backward pass: that costs time, and
is what holds its memory down. Both are predicted, with that and without.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.dry import in_stages, v100s
from benchmarks.whale.figure import Figure, Row, measured_in, show
from benchmarks.whale.models import bert_large

PAPER = {4: 1.45, 8: 1.14}
PER_MICROBATCH, PER_STAGE = 8, 4


def rows(small: bool) -> Iterator[Row]:
    for stages in (2,) if small else (4, 8):
        count = PER_STAGE * stages
        batch = (1 if small else PER_MICROBATCH) * count
        seconds = {
            (schedule, again): in_stages(
                bert_large(batch, small=small),
                v100s(stages),
                stages=stages,
                replicate=1,
                microbatches=count,
                schedule=schedule,
                recompute=again,
            ).step_s
            for schedule, again in (("1f1b", "none"), ("gpipe", "none"), ("gpipe", "full"))
        }
        own = seconds["1f1b", "none"]
        yield Row(f"{stages} stages, GPipe recomputes", PAPER.get(stages), seconds["gpipe", "full"] / own)
        yield Row(f"{stages} stages, GPipe keeps all", None, seconds["gpipe", "none"] / own)
    found = measured_in("pipeline")
    if found is not None:
        times = {row["schedule"]: row["even"]["own_ms"] for row in found["rows"]}
        note = f"4 small blocks, 8 microbatches, CPU ranks, {found['date']}"
        yield Row("2 stages, both keep all", None, None, times["gpipe"] / times["1f1b"], note)


FIGURE = Figure(
    11,
    "pipeline of BERT-large, 1F1B against GPipe",
    "times as fast",
    ("microbatches of 8 sequences of 128 tokens, 4 for each stage",),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
