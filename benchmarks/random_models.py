"""Small models with code, as factories for `whalepy plan benchmarks.random_models:NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
WIDTH, CLASSES, ROWS = 512, 2000, 16


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Chain(nn.Module):
    """An embedding, blocks in a row, a head, which may be tied to the embedding."""

    def __init__(self, hidden: list[int], *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(CLASSES, WIDTH)
        self.blocks = nn.ModuleList(Block(size) for size in hidden)
        self.head = nn.Linear(WIDTH, CLASSES, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), ids.flatten())


def _made(model: type[nn.Module], *arguments: Any, **named: Any) -> Made:
    with torch.device("meta"):
        return model(*arguments, **named), {"ids": torch.zeros(ROWS, 64, dtype=torch.long)}


def even() -> Made:
    """Eight blocks alike."""
    return _made(Chain, [2048] * 8)


def uneven() -> Made:
    """Five blocks of four sizes."""
    return _made(Chain, [256, 8192, 1024, 1024, 4096])


def tied() -> Made:
    """A head that is the embedding."""
    return _made(Chain, [2048] * 4, tied=True)


FACTORIES = ("even", "uneven", "tied")
