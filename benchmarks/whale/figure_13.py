"""Figure 13: ResNet-50 with 100,000 classes, data parallel and hybrid, on 8 to 32 V100.

    python -m benchmarks.whale.figure_13 [--results]

Hybrid: the backbone replicated, the head of 205 M values split by classes over the same GPUs. The paper has 89.7 % less
traffic than under data parallelism; that is of one step of one GPU here.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.classes import BATCH, fits, rate, replicated, sent, sizes, split
from benchmarks.whale.figure import Figure, Row, show

PAPER = {8: (2244, 2545), 16: (2842, 4729), 32: (3610, 8791)}


def rows(small: bool) -> Iterator[Row]:
    counts, classes, each = sizes(small)
    for count in counts:
        whole, parts = replicated(count, classes, each, small), split(count, classes, each, small)
        theirs = PAPER.get(count, (None, None))
        rates = rate(whole), rate(parts)
        yield Row(f"{count:2} GPUs, data parallel", theirs[0], rates[0], note=fits(whole))
        yield Row(f"{count:2} GPUs, hybrid", theirs[1], rates[1], note=fits(parts))
        ratio = None if theirs[0] is None or theirs[1] is None else theirs[1] / theirs[0]
        yield Row(f"{count:2} GPUs, hybrid over data parallel", ratio, rates[1] / rates[0])
        traffic = sent(parts) / sent(whole)
        yield Row(f"{count:2} GPUs, traffic of hybrid over data parallel", 0.103 if count == 8 else None, traffic)


FIGURE = Figure(
    13,
    "ResNet-50 with 100,000 classes",
    "images/s, and ratios",
    (BATCH, "the number of GPUs at which traffic is 89.7 % less is not stated: put at 8"),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
