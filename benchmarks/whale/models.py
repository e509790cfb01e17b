"""The models of Whale's evaluation on the meta device, each with a batch; `small` is a few layers, to try a script."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import whalepy

Made = tuple[nn.Module, Any]
"""A model and a batch of it."""
TOKENS = 128
# GNMT as in NVIDIA's and MLPerf's version 2: https://github.com/NVIDIA/DeepLearningExamples, PyTorch/Translation/GNMT.
GNMT_WIDTH, GNMT_LAYERS, GNMT_WORDS, GNMT_TOKENS = 1024, 4, 32320, 25


def images(rows: int, side: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rows, 3, side, side), torch.zeros(rows, dtype=torch.long)


class Classifier(nn.Module):
    """ResNet-50 and a linear layer over its 2,048 features."""

    def __init__(self, classes: int, small: bool) -> None:
        super().__init__()
        import transformers

        sizes = {"depths": [1, 1], "hidden_sizes": [16, 32], "embedding_size": 8} if small else {}
        self.backbone = transformers.ResNetModel(transformers.ResNetConfig(**sizes))
        self.head = nn.Linear(self.backbone.config.hidden_sizes[-1], classes)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        features = self.backbone(pixels).pooler_output.flatten(1)
        return nn.functional.cross_entropy(self.head(features), labels)


def resnet(classes: int = 1000, rows: int = 8, *, small: bool = False) -> Made:
    """ResNet-50 on images of 224 pixels a side."""
    with torch.device("meta"):
        return Classifier(classes, small), images(rows, 32 if small else 224)


def hybrid(devices: int, classes: int, rows: int, dim: int = 0, *, small: bool = False) -> Made:
    """The same, its backbone replicated and its head split on the same devices, by classes (0) or by features (1)."""
    model, batch = resnet(classes, rows, small=small)
    head = whalepy.split(devices, on=f"head.weight:{dim}")
    whalepy.annotate(model, {"backbone": whalepy.replicate(devices), "head": head})
    return model, batch


def bert_large(rows: int = 8, *, small: bool = False) -> Made:
    """BERT-large with its language-model head."""
    import transformers

    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    if small:
        sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
        return model, _ids(rows, TOKENS)


def t5_large(rows: int = 8, *, small: bool = False) -> Made:
    """T5-large: 24 layers of 1,024 that encode and 24 that decode; attention as plain operators."""
    import transformers

    layers = 4 if small else 24
    config = transformers.T5Config(
        d_model=32 if small else 1024,
        d_kv=16 if small else 64,
        d_ff=64 if small else 4096,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=2 if small else 16,
        decoder_start_token_id=0,
    )
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
        model.set_attn_implementation("eager")
        ids = _ids(rows, TOKENS)
        return model, {**ids, "decoder_input_ids": ids["labels"].clone()}


def _ids(rows: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(rows, length, dtype=torch.long)
    return {"input_ids": ids, "labels": ids.clone()}


class Recurrent(nn.Module):
    """A layer of LSTM cells beside a residual."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.cells = nn.LSTM(inputs, width, batch_first=True)
        self.residual = inputs == width

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.cells(x)
        return x + y if self.residual else y


class Gnmt(nn.Module):
    """Translation by recurrent layers: some that encode, attention over them, some that decode."""

    def __init__(self, layers: int, width: int, words: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(words, width), nn.Embedding(words, width)
        self.encoder = nn.ModuleList(Recurrent(width, width) for _ in range(layers))
        self.first = Recurrent(width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.decoder = nn.ModuleList(Recurrent(2 * width, width) for _ in range(layers - 1))
        self.words = nn.Linear(width, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read = self.source(source)
        for layer in self.encoder:
            read = layer(read)
        x = self.first(self.target(target))
        seen = (self.query(x) @ read.transpose(1, 2)).softmax(-1) @ read
        for layer in self.decoder:
            x = layer(torch.cat([x, seen], -1))
        return nn.functional.cross_entropy(self.words(x).flatten(0, 1), target.flatten())


def gnmt(rows: int = 8, *, small: bool = False) -> Made:
    """GNMT on sentences of 25 words; torch runs its LSTM cell by cell here, cuDNN in fewer kernels."""
    sizes = (2, 32, 64) if small else (GNMT_LAYERS, GNMT_WIDTH, GNMT_WORDS)
    with torch.device("meta"):
        ids = torch.zeros(rows, 5 if small else GNMT_TOKENS, dtype=torch.long)
        return Gnmt(*sizes), (ids, ids.clone())


Factory = Callable[..., Made]
