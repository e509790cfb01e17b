"""Figure 15: what part of a step of ResNet-50 with 100,000 classes is communication, on 8 to 32 V100.

    python -m benchmarks.whale.figure_15 [--results]

Of hybrid the paper's part is that of its bridges. Predicted is what no operator hides, of the first GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.classes import BATCH, communication, replicated, sizes, split
from benchmarks.whale.figure import Figure, Row, show

PAPER = {8: (0.119, 0.067), 16: (0.442, 0.078), 32: (0.646, 0.098)}


def rows(small: bool) -> Iterator[Row]:
    counts, classes, each = sizes(small)
    for count in counts:
        theirs = PAPER.get(count, (None, None))
        whole = communication(replicated(count, classes, each, small))
        yield Row(f"{count:2} GPUs, data parallel", theirs[0], whole)
        parts = communication(split(count, classes, each, small))
        yield Row(f"{count:2} GPUs, hybrid", theirs[1], parts)


FIGURE = Figure(15, "communication with 100,000 classes", "part of a step", (BATCH,), rows)

if __name__ == "__main__":
    show(FIGURE)
