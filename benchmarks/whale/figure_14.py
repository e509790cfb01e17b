"""Figure 14: ResNet-50 with a million classes, hybrid, on 8 to 32 V100; data parallel runs out of memory.

python -m benchmarks.whale.figure_14 [--results]
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.classes import BATCH, fits, rate, replicated, sizes, split
from benchmarks.whale.figure import Figure, Row, show

PAPER = {8: 1729, 16: 3397, 32: 6578}


def rows(small: bool) -> Iterator[Row]:
    counts, classes, each = sizes(small)
    for count in counts:
        parts = split(count, 10 * classes, each, small)
        yield Row(f"{count:2} GPUs, hybrid", PAPER.get(count), rate(parts), note=fits(parts))
    whole = replicated(counts[0], 10 * classes, each, small)
    note = fits(whole) or "fits"
    yield Row(f"{counts[0]:2} GPUs, data parallel", None, None, note=f"predicted: {note}; the paper: out of memory")


FIGURE = Figure(14, "ResNet-50 with a million classes", "images/s", (BATCH,), rows)

if __name__ == "__main__":
    show(FIGURE)
