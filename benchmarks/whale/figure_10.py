"""Figure 10: BERT-large under data parallelism on up to 32 V100, against one.

    python -m benchmarks.whale.figure_10 [--results]

The paper's point at 32 GPUs is read off its plot. It states no batch: predictions are for two.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.figure import Figure, Row, show
from benchmarks.whale.models import bert_large
from benchmarks.whale.scaling import scaled


def rows(small: bool) -> Iterator[Row]:
    return scaled(bert_large, "BertLarge", {32: 14.1}, (8, 32), small)


FIGURE = Figure(10, "data parallel, BERT-large", "times one GPU", ("8 or 32 sequences of 128 tokens a GPU",), rows)

if __name__ == "__main__":
    show(FIGURE)
