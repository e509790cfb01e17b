"""Pipelines for tests: models of transformers by stages, and how stages may be nested."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import whalepy
from tests import models
from whalepy.primitives import Primitive

Wrap = Callable[[int], Any]
"""The primitives of a stage, by its number."""


def plain(_: int) -> Any:
    """A stage whose devices are open."""
    return whalepy.stage()


def staged(groups: Sequence[Sequence[str]], wrap: Wrap = plain, outer: Sequence[Primitive] = ()) -> dict[str, Any]:
    """A stage per group of module patterns, inside `outer`."""
    found: dict[str, Any] = {"": list(outer)} if outer else {}
    for k, patterns in enumerate(groups):
        scope = wrap(k)
        found.update(dict.fromkeys(patterns, scope))
    return found


def blocks(pattern: str, bounds: Sequence[int]) -> list[list[str]]:
    """Groups of neighbouring blocks, cut at `bounds`: `h.*` and (0, 1, 3) give h.0 and h.1, h.2."""
    return [[pattern.replace("*", str(k)) for k in range(a, b)] for a, b in pairwise(bounds)]


def gpt2() -> models.Made:
    """Four blocks; the head is tied to the embedding."""
    return models.gpt2(models.language_batches([(8, 12), (7, 12), (8, 9)], ignored=3), layers=4)


def bert() -> models.Made:
    """Two blocks; the head is tied to the embedding."""
    return models.bert(models.language_batches([(6, 12)], ignored=3), layers=2)


def llama() -> models.Made:
    """Two blocks."""
    return models.llama(models.language_batches([(6, 12)], ignored=3), layers=2)


def t5() -> models.Made:
    """Two blocks of encoder and decoder; every block of the decoder reads the encoder's output."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    return _translating(
        T5ForConditionalGeneration, T5Config, sizes | {"dropout_rate": 0.0, "decoder_start_token_id": 0}
    )


def bart() -> models.Made:
    """Two blocks of encoder and decoder; it reads its labels, moved by one, as T5 does."""
    from transformers import BartConfig, BartForConditionalGeneration

    return _translating(BartForConditionalGeneration, BartConfig, _bart_sizes(blocks=2))


def mbart() -> models.Made:
    """One block of each; the last of the labels goes first."""
    from transformers import MBartConfig, MBartForConditionalGeneration

    return _translating(MBartForConditionalGeneration, MBartConfig, _bart_sizes(blocks=1))


def _bart_sizes(blocks: int) -> dict[str, Any]:
    found: dict[str, Any] = {"max_position_embeddings": 32, "dropout": 0.0}
    for part in ("encoder", "decoder"):
        found |= {f"{part}_layers": blocks, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 48}
    return found


def _translating(model: Callable[..., nn.Module], config: Callable[..., Any], sizes: dict[str, Any]) -> models.Made:
    configured = config(vocab_size=96, d_model=32, **sizes)
    torch.manual_seed(0)
    return model(configured), [translation()]


def translation() -> dict[str, torch.Tensor]:
    """Six rows; labels are ignored unevenly over them."""
    ids, labels = models.tokens(6, 10), models.tokens(6, 7, seed=2)
    labels[:2, 4:] = -100
    batch = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    batch["attention_mask"][:, 8:] = 0
    return batch


def vit() -> models.Made:
    """Two blocks on images of 16 x 16."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=5,
    )  # fmt: skip
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return ViTForImageClassification(config), [{"pixel_values": images, "labels": torch.arange(6) % 5}]


def convolutions() -> models.Made:
    """Blocks of convolutions with group norm, and a head of many classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000)),
    )
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    return model, [(images, torch.arange(6) * 100)]


def resnet() -> models.Made:
    """Two stages of residual layers, and a head of a hundred thousand classes, which no number of ranks divides."""
    from transformers import ResNetConfig, ResNetForImageClassification

    sizes: dict[str, Any] = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}
    labels: dict[str, Any] = {"num_labels": 100_003, "problem_type": "single_label_classification"}
    torch.manual_seed(0)
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    batch = {"pixel_values": images, "labels": torch.arange(6) * 20_000}
    return ResNetForImageClassification(ResNetConfig(**sizes, **labels)), [batch]


class Skipping(nn.Module):
    """Values that skip stages, a parameter that two stages read, a buffer that one writes and another reads."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(6, 6)
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(12, 3)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        with whalepy.stage():
            a = torch.tanh(self.first(self.shared(x)))
            self.seen += 1
        with whalepy.stage():
            b = torch.tanh(self.second(a) * weight.unsqueeze(1))
        with whalepy.stage():
            c = torch.tanh(self.shared(b)) + a / self.seen
            logits = self.third(torch.cat([a, c], 1))
            return nn.functional.cross_entropy(logits, target)


class Counting(nn.Module):
    """A buffer that is written by one stage in training, and read by another one in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("seen", torch.ones(()))
        self.seen: Tensor

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        with whalepy.stage():
            h = torch.tanh(self.first(x))
            if self.training:
                self.seen += 1
        with whalepy.stage():
            logits = self.second(h)
            return nn.functional.cross_entropy(logits if self.training else logits / self.seen, target)


def counting() -> models.Made:
    """The model above."""
    torch.manual_seed(0)
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    return Counting(), [(rows, torch.arange(6) % 3)]


def skipping() -> models.Made:
    """The model above."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    batches = [(torch.randn(n, 6, generator=draw), torch.rand(n, generator=draw), torch.arange(n) % 3) for n in (7, 9)]
    return Skipping(), batches


class Towers(nn.Module):
    """Two towers; the second one is read by what follows the first."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.words, self.read, self.both = (
            nn.Linear(6, 6),
            nn.Embedding(9, 6),
            nn.Linear(6, 6),
            nn.Linear(6, 3),
        )

    def forward(self, x: Tensor, words: Tensor, target: Tensor) -> Tensor:
        seen = torch.tanh(self.seen(x))
        read = torch.tanh(self.read(self.words(words)))
        return nn.functional.cross_entropy(self.both(seen * read), target)


def towers() -> models.Made:
    """The model above."""
    torch.manual_seed(0)
    rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    return Towers(), [(rows, torch.arange(6), torch.arange(6) % 3)]


def towers_from_behind() -> dict[str, Any]:
    """The stage that the model enters first reads what the other one gives."""
    return staged([["read"], ["seen", "both"]])


class Feeding(nn.Module):
    """Products alone: what leaves a stage is a partial sum, as is the gradient of what the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 128), nn.Tanh(), nn.Linear(128, 66))
        self.second = nn.Sequential(nn.Linear(66, 128), nn.Tanh(), nn.Linear(128, 48))
        self.third = nn.Linear(48, 5)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.third(self.second(self.first(x))), target)


def feeding() -> models.Made:
    """Eight rows."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    return Feeding(), [(torch.randn(8, 6, generator=draw), torch.randint(5, (8,), generator=draw))]


def fed(*shares: tuple[int, ...], on: str | None = None) -> dict[str, Any]:
    """Two stages of these split shares; `on`: what the second one cuts."""
    axes = (None, on)
    wide = zip(shares, axes, strict=True)
    first, second = ([whalepy.stage(len(own)), whalepy.split(len(own), shares=own, on=cut)] for own, cut in wide)
    return {"first": first, "second": second, "third": second}


class Scoring(nn.Module):
    """What crosses has rows and words, which no step fixes: one number of each word."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.tell = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 5))

    def forward(self, words: Tensor, target: Tensor) -> Tensor:
        scores = self.read(words).squeeze(-1)
        return nn.functional.cross_entropy(self.tell(torch.tanh(scores).unsqueeze(-1)).flatten(0, 1), target.flatten())


def scoring() -> models.Made:
    """Rows of twelve words, of one, which is less than a word for each of two ranks, and of three."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    batches = [[torch.randint(k, (4, words), generator=draw) for k in (50, 5)] for words in (12, 1, 3)]
    return Scoring(), [(words, target) for words, target in batches]


def scored() -> dict[str, Any]:
    """Two stages that are split twice each."""
    return {path: [whalepy.stage(2), whalepy.split(2)] for path in ("read", "tell")}


class Masking(nn.Module):
    """The second stage reads of the first a mask of the words alone, and one number of each row, which is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Tanh())
        self.tell = nn.Linear(8, 5)
        self.first, self.second = self.stages()

    def stages(self) -> tuple[list[Primitive], list[Primitive]]:
        """The scopes of the two."""
        return [whalepy.stage(2), whalepy.replicate(shares=(3, 1))], [whalepy.stage(1)]

    def forward(self, words: Tensor, target: Tensor) -> Tensor:
        with nested(self.first):
            read, known = self.read(words), words > 3
            one = read[:, :1, :1].squeeze(-1)
        with nested(self.second):
            kept = torch.where(known.unsqueeze(-1), read, read * 0.5).mean(1)
            return nn.functional.cross_entropy(self.tell(kept * one), target)


class MaskingOfShards(Masking):
    """As above, from one cut to another one of the same stage size."""

    def stages(self) -> tuple[list[Primitive], list[Primitive]]:
        return [whalepy.stage(2), whalepy.split(2)], [whalepy.stage(2), whalepy.replicate(shares=(3, 1))]


@contextlib.contextmanager
def nested(scopes: Sequence[Primitive]) -> Iterator[None]:
    """All of them, outermost first."""
    with contextlib.ExitStack() as stack:
        for scope in scopes:
            stack.enter_context(scope)
        yield


def masking(model: type[Masking] = Masking) -> models.Made:
    """Six rows, five, and four."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    sizes = [(6, 4), (5, 1), (4, 7)]
    batches = [(torch.randint(11, size, generator=draw), torch.randint(5, size[:1], generator=draw)) for size in sizes]
    return model(), batches
