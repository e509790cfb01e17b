"""Figure 12: BERT-large on 32 V100, pipelines of 2, 4 and 8 stages under data parallelism, against one GPU.

    python -m benchmarks.whale.figure_12 [--results]

The paper's points are read off its plot.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.dry import candidate, in_stages, step_s, studied, v100s
from benchmarks.whale.figure import Figure, Row, show
from benchmarks.whale.models import bert_large

PAPER = {2: 23.0, 4: 23.3, 8: 18.6}
PER_GPU, PER_STAGE = 32, 4


def rows(small: bool) -> Iterator[Row]:
    count = 4 if small else 32
    each = 4 if small else PER_GPU
    with studied(bert_large(each, small=small)) as study:
        alone = step_s(candidate(study, v100s(1), each))
    for stages in (2,) if small else PAPER:
        model = bert_large(each * count, small=small)
        copies = count // stages
        pipeline = in_stages(model, v100s(count), stages=stages, replicate=copies, microbatches=PER_STAGE * stages)
        yield Row(f"{count} GPUs, {stages} stages", PAPER.get(stages), count * alone / pipeline.step_s)


FIGURE = Figure(
    12,
    "pipelines of BERT-large under data parallelism",
    "times one GPU",
    (
        f"{PER_GPU} sequences of 128 tokens a GPU",
        f"{PER_STAGE} microbatches a stage",
        "the planner's choice of devices for each stage",
    ),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
