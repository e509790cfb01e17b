"""One transformer block that carries its own scopes; golden texts name these lines."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import whalepy


class Block(nn.Module):
    """f[rows, seq, 16] -> its mean square after attention and MLP, as the loss."""

    def __init__(self, rows: whalepy.replicate, parts: whalepy.split) -> None:
        super().__init__()
        self.rows, self.parts = rows, parts
        self.norm = nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        with self.rows:
            with self.parts:
                x = x + self.attend(self.norm(x))
                x = x + self.down(torch.relu(self.up(x)))
            return x.square().mean()

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (4, 4)).transpose(1, 2) for part in self.qkv(x).split(16, dim=2))
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def block() -> tuple[Block, tuple[Tensor]]:
    """Rows 2 : 1 over two replicas, each split 3 : 1."""
    torch.manual_seed(0)
    made = Block(whalepy.replicate(2, shares=[2, 1]), whalepy.split(2, shares=[3, 1]))
    return made, (torch.randn(6, 5, 16),)


MEGATRON = {(1, 1): ("qkv.weight:0.1", "up.weight:0")}
"""Heads and hidden units on the level of the split: a text that does not depend on the search."""
