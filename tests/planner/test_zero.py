"""What ZeRO keeps of a parameter on each rank."""

from __future__ import annotations

import pytest

from whalepy.planner.unfold import Sharding
from whalepy.planner.work import Holdings

NUMBER = 960
HALF = Holdings(4 * NUMBER, 2 * NUMBER, 2 * NUMBER, 4 * NUMBER, 8 * NUMBER)
"""Read in half precision: originals, copies, gradients as they are made and as they are read, AdamW's state."""
WHOLE = Holdings(4 * NUMBER, 0, 4 * NUMBER, 4 * NUMBER, 8 * NUMBER)


def between_steps(kept: Holdings) -> float:
    """Bytes per parameter with its gradient; where one is made in half precision, both count."""
    made = kept.first_gradients if kept.copies else 0
    return (kept.parameters + kept.copies + made + kept.gradients + kept.optimizer) / NUMBER


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_bytes_per_parameter(replicas: int) -> None:
    """As Megatron-LM's documentation has them for its distributed optimizer: 4 + 16/d, and 8 + 8/d in float32."""
    assert between_steps(Sharding(1, replicas).kept(HALF)) == 4 + 16 / replicas
    assert between_steps(Sharding(1, replicas).kept(WHOLE)) == 8 + 8 / replicas
    assert between_steps(Sharding(0, replicas).kept(HALF)) == 20
    assert between_steps(Sharding(3, replicas).kept(WHOLE)) == 16 / replicas


def test_buffers_where_a_rank_updates_a_part() -> None:
    """As Megatron-LM's documentation has bf16 parameters with float32 gradients: 6 + 12/d bytes, and two buckets.

    It keeps the gradients of the part that is updated in the buffer of all; here they are another 4/d.
    """
    replicas = 4
    kept = Sharding(1, replicas).kept(HALF)
    accumulated = Sharding(1, replicas).buffers(HALF) - 2 * HALF.first_gradients
    whole = kept.copies + kept.first_gradients + accumulated
    assert whole / NUMBER == 6
    assert (kept.parameters + kept.gradients + kept.optimizer) / NUMBER == 16 / replicas


def test_buffers_of_gradients_in_parts() -> None:
    assert Sharding(2, 4).buffers(HALF) == 2 * NUMBER / 4 + 2 * HALF.first_gradients


def test_buckets_are_no_larger_than_half_a_billion_elements() -> None:
    size = 10**10
    large = Holdings(4 * size, 2 * size, 2 * size, 4 * size, 8 * size)
    assert Sharding(1, 4).buffers(large) == 2 * size + 2 * 2 * (10**9 // 2)


@pytest.mark.parametrize(
    ("sharding", "holdings"),
    [(Sharding(0, 4), HALF), (Sharding(3, 4), HALF), (Sharding(1, 1), HALF), (Sharding(1, 4), WHOLE)],
)
def test_no_buffers_where_nothing_is_kept_in_parts(sharding: Sharding, holdings: Holdings) -> None:
    assert sharding.buffers(holdings) == 0
