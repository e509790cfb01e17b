"""Small models for tests, each with the global batches of a few steps: `(model, batches)`, the same on every rank."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, list[Any]]

VOCABULARY = 96
ROWS = 8
LENGTH = 12


def tokens(rows: int = ROWS, length: int = LENGTH, seed: int = 1) -> Tensor:
    """i64[rows, length]"""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def language_batches(sizes: Sequence[tuple[int, int]] = ((ROWS, LENGTH),), *, ignored: int = 0) -> list[Any]:
    """One batch of (rows, length) per step; labels of the first `ignored` rows, and some of the last, are -100."""
    batches: list[Any] = []
    for step, (rows, length) in enumerate(sizes):
        ids = tokens(rows, length, seed=step + 1)
        labels = ids.clone()
        if ignored:
            labels[:ignored] = -100
            labels[-1, length // 2 :] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


def gpt2(batches: list[Any] | None = None, layers: int = 1) -> Made:
    """GPT-2: the embedding tied to the head, query, key and value in one weight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    size = {"n_layer": layers, "n_head": 4, "n_embd": 32, "vocab_size": VOCABULARY, "n_positions": 64}
    config = GPT2Config(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return _made(GPT2LMHeadModel, config, batches)


def mixtral(batches: list[Any] | None = None, layers: int = 2) -> Made:
    """Four experts, two for every word; a step with fewer words than there are ranks times experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    size = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    size |= {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": VOCABULARY}
    return _made(MixtralForCausalLM, MixtralConfig(**size, max_position_embeddings=64, use_cache=False), batches)


def bert(batches: list[Any] | None = None, layers: int = 1) -> Made:
    from transformers import BertConfig, BertForMaskedLM

    size = {"num_hidden_layers": layers, "num_attention_heads": 4, "hidden_size": 32, "intermediate_size": 64}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = BertConfig(**size, **drop, vocab_size=VOCABULARY, max_position_embeddings=64)
    return _made(BertForMaskedLM, config, batches)


def llama(batches: list[Any] | None = None, layers: int = 1) -> Made:
    """Grouped queries: four heads of queries share two of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    size = {"num_hidden_layers": layers, "hidden_size": 32, "intermediate_size": 64, "vocab_size": VOCABULARY}
    return _made(LlamaForCausalLM, LlamaConfig(**size, **heads), batches)


def gptj(batches: list[Any] | None = None, layers: int = 1) -> Made:
    """Attention and MLP side by side on one residual."""
    from transformers import GPTJConfig, GPTJForCausalLM

    size = {"n_layer": layers, "n_head": 4, "n_embd": 32, "rotary_dim": 4, "vocab_size": VOCABULARY, "n_positions": 64}
    return _made(GPTJForCausalLM, GPTJConfig(**size, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0), batches)


def _made(kind: Any, config: Any, batches: list[Any] | None) -> Made:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    return kind(config), language_batches() if batches is None else batches


class Residual(nn.Module):
    """Convolutions, a residual, pooling and an MLP: f[rows, 3, 8, 8] and f[rows, 5] -> f[rows, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, bias=False))
        self.side = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8))
        self.head = nn.Linear(8, 7)

    def forward(self, image: Tensor, side: Tensor) -> Tensor:
        x = torch.relu(self.stem(image))
        x = torch.relu(x + self.block(x))
        pooled = nn.functional.adaptive_avg_pool2d(x, 1).flatten(1) + torch.tanh(self.side(side))
        return self.head(pooled + self.mlp(self.norm(pooled)))


def classes_loss(outputs: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(outputs, target, label_smoothing=0.0)


def residual(rows: Sequence[int] = (ROWS,)) -> Made:
    """Tuples (image, side, target), for `classes_loss`."""
    torch.manual_seed(0)
    batches: list[Any] = []
    for step, count in enumerate(rows):
        g = torch.Generator().manual_seed(step + 1)
        image, side = torch.randn(count, 3, 8, 8, generator=g), torch.randn(count, 5, generator=g)
        batches.append((image, side, torch.randint(7, (count,), generator=g)))
    return Residual(), batches


class Scaled(nn.Module):
    """An MLP whose hidden units are scaled by one number."""

    def __init__(self, scale: nn.Parameter) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 8)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.scale)


class ScaledTwice(nn.Module):
    """The number scales the loss too: with the MLP split by hidden units, one use gives it a partial gradient, the
    other, of a value every rank has whole, a replicated one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.mlp = Scaled(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.mlp(x).square().mean()) * self.scale


def scaled_twice() -> Made:
    torch.manual_seed(0)
    return ScaledTwice(), [(torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(1)),)]
