"""Small models outside transformers: U-Net, LSTM translator, recommender, convolutions. Each returns its loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class WithLoss:
    """What a model returns."""

    loss: Tensor


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(2, outputs), nn.SiLU())


class UNet(nn.Module):
    """Predicts the noise of an image: down twice, up twice, the steps of the way down joined on the way up."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, channels), nn.SiLU(), nn.Linear(channels, channels))
        self.first = conv_block(3, channels)
        self.down = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1)
        self.middle = conv_block(2 * channels, 2 * channels)
        self.attention = nn.MultiheadAttention(2 * channels, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.last = conv_block(2 * channels, channels)
        self.out = nn.Conv2d(channels, 3, 1)

    def forward(self, images: Tensor, times: Tensor, noise: Tensor) -> WithLoss:
        first = self.first(images) + self.time(times)[:, :, None, None]
        low = self.middle(self.down(first))
        flat = low.flatten(2).transpose(1, 2)
        attended = self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).reshape(low.shape)
        wide = F.interpolate(self.up(low + attended), size=first.shape[-2:], mode="nearest")
        return WithLoss(F.mse_loss(self.out(self.last(torch.cat([wide, first], dim=1))), noise))


class Recommender(nn.Module):
    """Embedding tables of unequal size, an MLP over the numbers, and the products of every pair of vectors (DLRM)."""

    def __init__(self, tables: tuple[int, ...] = (50, 31, 7), width: int = 8) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(rows, width, mode="sum") for rows in tables[:1]])
        self.tables = nn.ModuleList([nn.Embedding(rows, width) for rows in tables[1:]])
        self.bottom = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, width), nn.ReLU())
        count = len(tables) + 1
        self.top = nn.Sequential(nn.Linear(width + count * (count - 1) // 2, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, numbers: Tensor, bags: Tensor, kinds: Tensor, clicked: Tensor) -> WithLoss:
        dense = self.bottom(numbers)
        vectors = [dense, self.bags[0](bags)]
        vectors += [table(kinds[:, position]) for position, table in enumerate(self.tables)]
        stacked = torch.stack(vectors, dim=1)
        products = torch.bmm(stacked, stacked.transpose(1, 2))
        row, column = torch.tril_indices(stacked.shape[1], stacked.shape[1], offset=-1)
        score = self.top(torch.cat([dense, products[:, row, column]], dim=1)).squeeze(1)
        return WithLoss(F.binary_cross_entropy_with_logits(score, clicked))


class Translator(nn.Module):
    """Two LSTMs and attention over what the first one read (GNMT)."""

    def __init__(self, vocabulary: int = 96, width: int = 16) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.reader = nn.LSTM(width, width // 2, num_layers=2, bidirectional=True, batch_first=True)
        self.writer = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(2 * width, vocabulary)

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor, labels: Tensor) -> WithLoss:
        read, _ = self.reader(self.source(input_ids))
        written, _ = self.writer(self.target(decoder_input_ids))
        weights = torch.softmax(written @ read.transpose(1, 2) / read.shape[-1] ** 0.5, dim=-1)
        logits = self.head(torch.cat([written, weights @ read], dim=-1))
        return WithLoss(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100))


class Classifier(nn.Module):
    """An image classifier of another library's kind: strided convolutions, BatchNorm, pooling, two linear layers."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU6(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), nn.AvgPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(16 * 16, 32), nn.PReLU(), nn.Linear(32, classes))

    def forward(self, pixel_values: Tensor, labels: Tensor) -> WithLoss:
        hidden = F.adaptive_avg_pool2d(self.features(pixel_values), 4)
        return WithLoss(F.cross_entropy(self.head(hidden.flatten(1)), labels, label_smoothing=0.1))
