"""Figure 17: data parallel on 8 V100 and 8 P100, rows shared out by the devices against equal rows.

    python -m benchmarks.whale.figure_17 [--results]

Whale's shares follow FLOP rates (`whalepy.planner.whale`), the exact ones the predicted seconds of each type of device.
Measured here are three CPU ranks of speed 2:1:1 (`benchmarks/unequal_devices.py`).

The paper's 1.45 is beyond its own algorithm on the data sheets: at 15.7 and 9.3 TFLOP/s in float32 a P100 gets 0.372 of
the rows of a pair in place of half, so a step that ends when the P100 does is 1.34 times as fast at best, however fast
the V100 is. Shares by what the types achieve (tensor cores), or a step that also ends for other reasons, go beyond.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.whale.dry import balanced, candidate, mixed, studied
from benchmarks.whale.figure import Figure, Row, measured_in, show
from benchmarks.whale.models import Factory, bert_large, gnmt, resnet

MODELS: tuple[tuple[str, Factory, float, int], ...] = (
    ("ResNet50", resnet, 1.30, 64),
    ("GNMT", gnmt, 1.27, 128),
    ("BertLarge", bert_large, 1.45, 32),
)


def rows(small: bool) -> Iterator[Row]:
    devices = 1 if small else 8
    for name, factory, paper, each in MODELS:
        with studied(factory(rows=2, small=small)) as study:
            found = balanced(candidate(study, mixed(devices), each * 2 * devices))
        for balance, theirs in (("whale", paper), ("exact", None)):
            own = found.rows[balance]
            note = f"{own[0]} rows on a V100, {own[-1]} on a P100, {each} if equal"
            yield Row(f"{name}, {balance} shares", theirs, found.gain(balance), note=note)
    here = measured_in("unequal-devices")
    if here is not None:
        note = f"GPT-2-like blocks, measured shares, CPU ranks, {here['date']}"
        yield Row("3 ranks of speed 2:1:1 here", None, 4 / 3, here["replicate"]["equal"]["gain"], note)


FIGURE = Figure(
    17,
    "data parallel on 8 V100 and 8 P100",
    "times equal rows",
    (
        "64 images, 128 pairs of sentences of 25 words, 32 sequences of 128 tokens a GPU on average",
        "LSTM cell by cell, not in cuDNN's kernels",
    ),
    rows,
)

if __name__ == "__main__":
    show(FIGURE)
