"""A module that casts its own modules in the forward is captured where the cast changes nothing."""

from __future__ import annotations

import torch
from torch import nn

from whalepy.program.capture import capture


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.head = self.head.to(x.dtype)
        return self.head(x).square().mean()


def test_a_cast_that_changes_nothing_leaves_the_parameters_alone() -> None:
    model, x = Casting(), torch.randn(6, 4)
    weight = model.head.weight
    captured = capture(model, (x,))
    assert model.head.weight is weight
    given = [x if place.value is None else place.value for place in captured.placeholders]
    torch.testing.assert_close(captured.graph(*given)[0], model(x))
