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
