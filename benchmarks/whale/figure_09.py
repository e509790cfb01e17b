"""Figure 9: ResNet-50 under data parallelism on up to 32 V100, against one.

    python -m benchmarks.whale.figure_09 [--results]

The paper's point at 32 GPUs is read off its plot. It states no batch: predictions are for two.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.figure import Figure, Row, show
from benchmarks.whale.models import resnet
from benchmarks.whale.scaling import scaled


def rows(small: bool) -> Iterator[Row]:
    return scaled(resnet, "ResNet-50", {32: 25.3}, (32, 64), small)


FIGURE = Figure(9, "data parallel, ResNet-50", "times one GPU", ("32 or 64 images of 224 pixels a GPU",), rows)

if __name__ == "__main__":
    show(FIGURE)
