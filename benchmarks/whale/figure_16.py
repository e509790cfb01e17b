"""Figure 16: the head of 100,000 classes split by classes against split by features, on 2 to 32 V100.

    python -m benchmarks.whale.figure_16 [--results]

The paper compares its two patterns of a split product; from memory of it, one is 1.6 times as fast at 2 GPUs and 3.75
times at 32. Split by features every GPU makes all scores in part, which are then added up: batch x classes values
instead of batch x features. Which of the two the paper calls which could not be looked up.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.classes import BATCH, fits, rate, sizes, split
from benchmarks.whale.figure import Figure, Row, show

PAPER = {2: 1.6, 32: 3.75}


def rows(small: bool) -> Iterator[Row]:
    counts, classes, each = sizes(small)
    for count in counts if small else (2, 8, 32):
        by_class, by_feature = (split(count, classes, each, small, dim) for dim in (0, 1))
        ratio = rate(by_class) / rate(by_feature)
        yield Row(f"{count:2} GPUs", PAPER.get(count), ratio, note=fits(by_feature))


FIGURE = Figure(
    16, "a split head, by classes over by features", "times as fast", (BATCH, "the paper's figures from memory"), rows
)

if __name__ == "__main__":
    show(FIGURE)
