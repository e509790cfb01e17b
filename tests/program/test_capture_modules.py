"""A module that casts its own modules in the forward is captured where the cast changes nothing."""

from __future__ import annotations

import pytest
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


class Encoding(nn.Module):
    """As PyTorch's tutorials have it: a mask, and no word of its being causal."""

    def __init__(self, *, hint: bool | None) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder, self.hint = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), hint

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.encoder(x, mask=mask, is_causal=self.hint).square().mean()


@pytest.mark.parametrize("hint", [None, True])
def test_a_mask_of_an_encoder_is_not_looked_at(hint: bool | None) -> None:
    torch.manual_seed(0)
    model, x = Encoding(hint=hint), torch.randn(6, 5, 8)
    captured = capture(model, (x,))
    given = [x if place.value is None else place.value for place in captured.placeholders]
    torch.testing.assert_close(captured.graph(*given)[0], model(x))


class Routing(nn.Module):
    """Rows go to the experts that are chosen for them, one expert after the other, and are added up in place."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.router(x).argmax(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == k)
            out.index_add_(0, rows, expert(x[rows]))
        return out.square().mean()


def test_rows_that_a_condition_names_lie_in_memory_of_their_own() -> None:
    torch.manual_seed(0)
    model, x = Routing(), torch.randn(6, 8)
    captured = capture(model, (x,))
    given = [x if place.value is None else place.value for place in captured.placeholders]
    torch.testing.assert_close(captured.graph(*given)[0], model(x))
