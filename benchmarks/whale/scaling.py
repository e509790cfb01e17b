"""Figures 9 and 10: how many times as fast as one GPU, under data parallelism."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from benchmarks.whale.dry import candidate, step_s, studied, v100s
from benchmarks.whale.figure import Row
from benchmarks.whale.models import Factory


def scaled(
    factory: Factory, name: str, paper: Mapping[int, float], batches: tuple[int, ...], small: bool
) -> Iterator[Row]:
    """One row per batch and number of GPUs; the batch of each GPU stays."""
    counts = (1, 2) if small else (1, 2, 4, 8, 16, 32)
    with studied(factory(rows=2, small=small)) as study:
        for each in (2,) if small else batches:
            alone = step_s(candidate(study, v100s(1), each))
            for count in counts[1:]:
                now = step_s(candidate(study, v100s(count), each * count))
                yield Row(f"{name}, {count:2} GPUs, {each:3} a GPU", paper.get(count), count * alone / now)
