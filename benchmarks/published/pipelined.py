"""Time and memory of a pipeline under 1F1B, from what each of its stages does: a formula, until schedules are played.

Source of the formula: Narayanan et al., arXiv:2104.04473, section 2.2; here with stages of unequal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageCost:
    """One stage, per microbatch and device."""

    compute_s: float
    """Forward and backward."""
    exchange_s: float
    """With its neighbours: what it receives and sends, one after the other, while it does nothing else."""
    closing_s: float
    """Once a step, after the last microbatch: reductions that nothing hides, and the update."""
    peak: int
    """Bytes with one microbatch under way."""
    saved: int
    """Bytes that one more keeps for its backward pass."""


def step_seconds(stages: Sequence[StageCost], microbatches: int) -> float:
    """Fill and drain, in which one microbatch goes through all stages, and between them the slowest stage's pace."""
    once = sum(stage.compute_s for stage in stages) + sum(stage.exchange_s for stage in stages) / 2
    pace = max(stage.compute_s + stage.exchange_s for stage in stages)
    return once + (microbatches - 1) * pace + max(stage.closing_s for stage in stages)


def peak_bytes(stages: Sequence[StageCost], microbatches: int) -> int:
    """Of the fullest stage: a stage holds a microbatch for each stage from it to the last, at most all there are."""
    count = len(stages)
    under_way = (min(microbatches, count - k) for k in range(count))
    return max(stage.peak + (n - 1) * stage.saved for stage, n in zip(stages, under_way, strict=True))
