"""Models whose sizes only the data tell, or whose backward is their own, train as they do in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests.exactness import Run, compare


class Tenfold(torch.autograd.Function):
    """Doubles; its backward says ten times, so that a backward of the forward's own would show."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float, nothing: None) -> torch.Tensor:
        ctx.factor = factor
        return factor * x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return 10 * gradients[0], None, None


class Picking(nn.Module):
    """Keeps the tokens above a bound, and the last token of each row that is 0, as BART's classifier does."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8, 12)
        self.up = nn.Linear(12, 12)
        self.head = nn.Linear(12, 4)

    def forward(self, ids: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden = self.up(self.tokens(ids)).tanh()
        kept = hidden[ids > 4].square().sum()
        last = hidden[ids.eq(0), :].view(hidden.size(0), -1, hidden.size(-1))[:, -1, :]
        return nn.functional.cross_entropy(self.head(last), target) + 0.01 * kept


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        hidden: Any = Tenfold.apply(self.up(x), 2.0, None)
        return nn.functional.cross_entropy(self.down(hidden.relu()), target)


def picking() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    ids = torch.randint(1, 8, (8, 5))
    ids[:, 3] = 0
    return Picking(), [(ids, torch.arange(8) % 4)]


def own_backward() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return OwnBackward(), [(torch.randn(8, 6), torch.arange(8) % 4)]


ANNOTATIONS = {
    "replicate": (2, lambda: {"": whalepy.replicate(2, shares=[3, 1])}),
    "split": (2, lambda: {"": whalepy.split(2, shares=[3, 1])}),
    "both": (4, lambda: {"": [whalepy.replicate(2, shares=[3, 1]), whalepy.split(2, shares=[3, 1])]}),
}


@pytest.mark.parametrize("name", ANNOTATIONS)
@pytest.mark.parametrize("make", [picking, own_backward])
def test_trains_exactly(workers: Any, make: Any, name: str) -> None:
    world, annotations = ANNOTATIONS[name]
    compare(workers, Run(make, annotations, world))
