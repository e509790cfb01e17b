"""The language models that are timed: 4 blocks of width 256 and a vocabulary of 4096, and GPT-2 of 124M parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

ROWS, LENGTH, WIDTH, HEADS, VOCABULARY, BLOCKS = 16, 128, 256, 4, 4096, 4


class Attention(nn.Module):
    """Causal attention after a norm, beside its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        return x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Hidden(nn.Module):
    """Four times as many hidden units after a norm, beside their input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(gelu(self.up(self.norm(x))))


class Embedding(nn.Module):
    """Ids and places."""

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        return self.ids(ids) + self.places


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.hidden = Attention(), Hidden()

    def forward(self, x: Tensor) -> Tensor:
        return self.hidden(self.attention(x))


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


class LanguageModel(nn.Module):
    """Ids to logits."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.embedding = Embedding()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = Head()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean over all ids."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten())


def made(rows: int = ROWS, blocks: int = BLOCKS) -> tuple[LanguageModel, tuple[Tensor, Tensor]]:
    """The same model and batch wherever it is called."""
    torch.manual_seed(0)
    model = LanguageModel(blocks)
    ids = torch.randint(VOCABULARY, (rows, LENGTH + 1))
    return model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class GPT2(nn.Module):
    """GPT-2 of transformers with 124M parameters, nothing dropped; ids to logits."""

    def __init__(self) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        self.whole = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.whole.transformer.h

    def forward(self, ids: Tensor) -> Tensor:
        return self.whole(ids).logits


def gpt2(rows: int = ROWS) -> tuple[GPT2, tuple[Tensor, Tensor]]:
    """The same model and batch wherever it is called."""
    torch.manual_seed(0)
    model = GPT2()
    ids = torch.randint(model.whole.config.vocab_size, (rows, LENGTH + 1))
    return model, (ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


MODELS = {"blocks": made, "gpt2": gpt2}
