"""Small models with code, as factories for `whalepy plan benchmarks.random_models:NAME`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.dryrun.studies import Chain

Made = tuple[nn.Module, dict[str, Any]]
WIDTH, CLASSES, ROWS = 512, 2000, 16


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def _made(hidden: list[int], *, tied: bool = False) -> Made:
    with torch.device("meta"):
        model = Chain(map(Block, hidden), tied=tied, width=WIDTH, vocabulary=CLASSES)
        return model, {"ids": torch.zeros(ROWS, 64, dtype=torch.long)}


def even() -> Made:
    """Eight blocks alike."""
    return _made([2048] * 8)


def uneven() -> Made:
    """Five blocks of four sizes."""
    return _made([256, 8192, 1024, 1024, 4096])


def tied() -> Made:
    """A head that is the embedding."""
    return _made([2048] * 4, tied=True)


FACTORIES = ("even", "uneven", "tied")
