"""What is noted of an operator."""

from __future__ import annotations

import pytest
import torch

from whalepy.dryrun.counting import UNALIGNED, Counter
from whalepy.hardware.devices import profile_table

META = torch.device("meta")


@pytest.mark.parametrize(("width", "kind"), [(64, ""), (112, ""), (150, UNALIGNED), (108, UNALIGNED), (128, "")])
def test_heads_whose_rows_start_anywhere(width: int, kind: str) -> None:
    """Rows of 150 half-precision numbers do not all start at a multiple of 16 bytes."""
    with Counter() as counter:
        queries, keys = (torch.empty(4, 32, width, dtype=torch.float16, device=META) for _ in range(2))
        scores = queries @ keys.transpose(1, 2)
        scores @ keys
    products = [event for event in counter.events if event.flops]
    assert [event.kind for event in products] == [kind, kind]


def test_they_take_longer_on_matrix_units_alone() -> None:
    a100 = profile_table()["A100-SXM4-80GB"]
    assert a100.product_seconds(1e11, "float16", UNALIGNED) > 5 * a100.product_seconds(1e11, "float16")
    assert a100.product_seconds(1e11, "float32", UNALIGNED) == a100.product_seconds(1e11, "float32")
