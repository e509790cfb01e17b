"""Small models written by hand over sequences, graphs, sets and tables of ids; recurrent ones loop in Python too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.own import WithLoss

ROWS, LENGTH, WORDS = 8, 9, 40


class Tagger(nn.Module):
    """A bidirectional LSTM with a class for each word."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12, padding_idx=0)
        self.reader = nn.LSTM(12, 8, bidirectional=True, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        logits = self.head(self.reader(self.words(tokens))[0])
        return WithLoss(F.cross_entropy(logits.view(-1, 5), tags.view(-1), ignore_index=-100))


class Recurrent(nn.Module):
    """A cell by hand, in a loop over time; the last state is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.gates = nn.Linear(24, 36)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        x = self.words(tokens)
        state = torch.zeros(x.shape[0], 12, dtype=x.dtype)
        for step in range(x.shape[1]):
            keep, new, out = self.gates(torch.cat([x[:, step], state], dim=-1)).chunk(3, dim=-1)
            state = torch.sigmoid(keep) * state + torch.sigmoid(out) * torch.tanh(new)
        return WithLoss(F.cross_entropy(self.head(state), tags[:, 0].clamp(min=0)))


class Attentive(nn.Module):
    """A GRU cell writes word after word, looking at what a GRU read."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.reader = nn.GRU(12, 12, batch_first=True)
        self.writer = nn.GRUCell(24, 12)
        self.query = nn.Linear(12, 12, bias=False)
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        x = self.words(tokens)
        read, last = self.reader(x)
        state, outputs = last[0], []
        for step in range(tokens.shape[1]):
            weights = torch.softmax(torch.einsum("bd,btd->bt", self.query(state), read), dim=-1)
            context = torch.bmm(weights.unsqueeze(1), read).squeeze(1)
            state = self.writer(torch.cat([x[:, step], context], dim=-1), state)
            outputs.append(self.head(state))
        logits = torch.stack(outputs, dim=1)
        return WithLoss(F.cross_entropy(logits.transpose(1, 2), tags))


class Causal(nn.Module):
    """Dilated causal convolutions over time with residuals (TCN)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.convs = nn.ModuleList(
            [nn.utils.parametrizations.weight_norm(nn.Conv1d(12, 12, 3, dilation=d)) for d in (1, 2)]
        )
        self.head = nn.Linear(12, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        x = self.words(tokens).transpose(1, 2)
        for conv, dilation in zip(self.convs, (1, 2), strict=True):
            x = F.relu(x + F.dropout(conv(F.pad(x, (2 * dilation, 0))), 0.0, self.training))
        return WithLoss(F.cross_entropy(self.head(x.transpose(1, 2)).flatten(0, 1), tags.flatten()))


class Encoder(nn.Module):
    """torch's own encoder layers, with a padding mask."""

    def __init__(self, *, first: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.places = nn.Parameter(torch.randn(LENGTH, 16) / 4)
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=first)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        hidden = self.encoder(self.words(tokens) + self.places, src_key_padding_mask=tokens == 1)
        return WithLoss(F.cross_entropy(self.head(hidden).flatten(0, 1), tags.flatten()))


class Transformer(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.both = nn.Transformer(16, 4, 1, 1, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1]).to(self.head.weight.dtype)
        hidden = self.both(self.words(tokens), self.words(tokens.flip(1)), tgt_mask=mask, tgt_is_causal=True)
        return WithLoss(F.cross_entropy(self.head(hidden).flatten(0, 1), tags.flatten()))


class Checkpointed(Encoder):
    """The layers run again in the backward pass."""

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        hidden: Any = self.words(tokens) + self.places
        for layer in self.encoder.layers:
            hidden = checkpoint(layer, hidden, use_reentrant=False)
        return WithLoss(F.cross_entropy(self.head(hidden).flatten(0, 1), tags.flatten()))


class Speech(nn.Module):
    """Connectionist temporal classification over the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.head = nn.Linear(12, 6)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        log = F.log_softmax(self.head(self.words(tokens)), dim=-1).transpose(0, 1)
        rows = tokens.shape[0]
        lengths = torch.full((rows,), tokens.shape[1], dtype=torch.long)
        wanted = torch.full((rows,), 3, dtype=torch.long)
        return WithLoss(F.ctc_loss(log, tags[:, :3].clamp(min=0) + 1, lengths, wanted, zero_infinity=True))


class Adaptive(nn.Module):
    """A softmax in clusters of words."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.head = nn.AdaptiveLogSoftmaxWithLoss(12, WORDS, cutoffs=[10, 25], div_value=2.0)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        return WithLoss(self.head(self.words(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).loss)


class Sets(nn.Module):
    """Attention of a set to learned points and back, and pooling by attention (set transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 16)
        self.points = nn.Parameter(torch.randn(1, 4, 16))
        self.seed = nn.Parameter(torch.randn(1, 1, 16))
        self.attend = nn.ModuleList([nn.MultiheadAttention(16, 4, batch_first=True) for _ in range(3)])
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor, tags: Tensor) -> WithLoss:
        x = self.words(tokens)
        points = self.points.expand(x.shape[0], -1, -1)
        points = points + self.attend[0](points, x, x)[0]
        x = x + self.attend[1](x, points, points)[0]
        pooled = self.attend[2](self.seed.repeat(x.shape[0], 1, 1), x, x, need_weights=False)[0]
        return WithLoss(F.cross_entropy(self.head(pooled.squeeze(1)), tags[:, 0].clamp(min=0)))


class Flow(nn.Module):
    """Euler and Runge-Kutta steps of a learned field."""

    def __init__(self) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))

    def forward(self, start: Tensor, end: Tensor) -> WithLoss:
        x, h = start, 0.25
        for _ in range(4):
            one = self.field(x)
            two = self.field(x + h / 2 * one)
            x = x + h * two
        return WithLoss((x - end).square().sum(-1).mean() + (x - end).abs().amax(dim=-1).mean())


class ConvRecurrent(nn.Module):
    """Convolutional LSTM over frames."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Conv2d(3 + 4, 16, 3, padding=1)
        self.out = nn.Conv2d(4, 3, 1)

    def forward(self, frames: Tensor) -> WithLoss:
        state = frames.new_zeros(frames.size(0), 4, *frames.shape[-2:])
        cell, loss = torch.zeros_like(state), 0.0
        for step in range(frames.size(1) - 1):
            i, f, o, g = self.gates(torch.cat([frames[:, step], state], dim=1)).chunk(4, dim=1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            state = o.sigmoid() * cell.tanh()
            loss = loss + F.l1_loss(self.out(state), frames[:, step + 1])
        return WithLoss(loss / (frames.size(1) - 1))  # type: ignore[arg-type]


class Graphs(nn.Module):
    """Messages along a dense adjacency, normalised by degree (GCN), then attention between neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 1)

    def forward(self, nodes: Tensor, edges: Tensor, value: Tensor) -> WithLoss:
        near = edges + torch.eye(edges.shape[-1], dtype=edges.dtype)
        degree = near.sum(-1).rsqrt()
        near = degree.unsqueeze(-1) * near * degree.unsqueeze(-2)
        hidden = torch.relu(near @ self.first(nodes))
        scores = (hidden @ hidden.mT).masked_fill(edges == 0, -1e9)
        hidden = F.elu(torch.softmax(scores, -1) @ self.second(hidden))
        return WithLoss(F.mse_loss(self.head(hidden.sum(dim=1)).squeeze(-1), value))


class Scattered(nn.Module):
    """Messages along lists of edges of each graph: gather, scatter_add (message passing)."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(12, 10), nn.Linear(16, 6)
        self.head = nn.Linear(6, 1)

    def forward(self, nodes: Tensor, sources: Tensor, targets: Tensor, value: Tensor) -> WithLoss:
        def of(index: Tensor) -> Tensor:
            return nodes.gather(1, index.unsqueeze(-1).expand(-1, -1, nodes.shape[-1]))

        messages = torch.relu(self.message(torch.cat([of(sources), of(targets)], dim=-1)))
        start = messages.new_zeros(nodes.shape[0], nodes.shape[1], messages.shape[-1])
        summed = start.scatter_add(1, targets.unsqueeze(-1).expand_as(messages), messages)
        hidden = torch.relu(self.update(torch.cat([nodes, summed], dim=-1)))
        return WithLoss(F.mse_loss(self.head(hidden.mean(1)).squeeze(-1), value))


class Factors(nn.Module):
    """A wide, a deep and a pairwise part over ids (Wide & Deep, DeepFM)."""

    def __init__(self, kinds: tuple[int, ...] = (30, 20, 10)) -> None:
        super().__init__()
        self.register_buffer("offsets", torch.tensor([0, *kinds[:-1]]).cumsum(0))
        self.wide = nn.EmbeddingBag(sum(kinds), 1, mode="sum")
        self.factors = nn.Embedding(sum(kinds), 8)
        self.bias = nn.Parameter(torch.zeros(1))
        self.deep = nn.Sequential(nn.Linear(24, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 1))

    def forward(self, kinds: Tensor, clicked: Tensor) -> WithLoss:
        kinds = kinds + self.offsets
        vectors = self.factors(kinds)
        pairs = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1)).sum(1, keepdim=True)
        score = self.wide(kinds) + self.bias + pairs + self.deep(vectors.flatten(1))
        return WithLoss(F.binary_cross_entropy(torch.sigmoid(score).squeeze(1), clicked))


class Neural(nn.Module):
    """Users and items, multiplied and through layers (NCF)."""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(30, 8), nn.Embedding(20, 8)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU())
        self.head = nn.Linear(16, 1)

    def forward(self, kinds: Tensor, clicked: Tensor) -> WithLoss:
        user, item = self.users(kinds[:, 0]), self.items(kinds[:, 1])
        both = torch.cat([user * item, self.layers(torch.cat([user, item], dim=-1))], dim=-1)
        return WithLoss(nn.BCEWithLogitsLoss()(self.head(both).view(-1), clicked))


class Towers(Neural):
    """Each user is compared with the items of all rows (two towers)."""

    def forward(self, kinds: Tensor, clicked: Tensor) -> WithLoss:
        user, item = F.normalize(self.users(kinds[:, 0]), dim=1), F.normalize(self.items(kinds[:, 1]), dim=1)
        logits = torch.matmul(user, item.T) / 0.1
        labels = torch.arange(logits.shape[0], device=logits.device)
        return WithLoss(F.cross_entropy(logits, labels, reduction="none").mul(clicked + 0.5).mean())


class Denoiser(nn.Module):
    """A noise predictor with sinusoidal times and attention to words (latent diffusion)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 12)
        self.time = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 2 * width))
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.GroupNorm(4, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(12, 2 * width)
        self.down, self.up = nn.Conv2d(width, 16, 3, 2, 1), nn.Conv2d(16, width, 3, padding=1)
        self.out = nn.Conv2d(2 * width, 3, 3, padding=1)

    def forward(self, images: Tensor, times: Tensor, tokens: Tensor, noise: Tensor) -> WithLoss:
        angles = times[:, None] * torch.exp(-torch.arange(4, dtype=images.dtype))
        scale, shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1)).chunk(2, dim=-1)
        hidden = F.silu(self.norm(self.first(images)) * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
        rows, channels, height, width = hidden.shape
        query = self.query(hidden.permute(0, 2, 3, 1).reshape(rows, height * width, channels))
        key, value = self.key(self.words(tokens)).chunk(2, dim=-1)
        query, key, value = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (query, key, value))
        seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = hidden + seen.transpose(1, 2).reshape(rows, channels, height, width)
        low = F.interpolate(self.up(F.silu(self.down(hidden))), scale_factor=2.0, mode="nearest")
        return WithLoss(F.mse_loss(self.out(torch.cat([hidden, low], dim=1)), noise))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _tagged() -> dict[str, Any]:
    g = _generator()
    tags = torch.randint(5, (ROWS, LENGTH), generator=g)
    tags[0, 5:] = -100
    return {"tokens": torch.randint(2, WORDS, (ROWS, LENGTH), generator=g), "tags": tags}


def _flow() -> dict[str, Any]:
    g = _generator()
    return {"start": torch.randn(ROWS, 6, generator=g), "end": torch.randn(ROWS, 6, generator=g)}


def _frames() -> dict[str, Any]:
    return {"frames": torch.randn(ROWS, 4, 3, 8, 8, generator=_generator())}


def _graphs() -> dict[str, Any]:
    g = _generator()
    nodes, value = torch.randn(ROWS, 7, 6, generator=g), torch.randn(ROWS, generator=g)
    return {"nodes": nodes, "edges": torch.randint(2, (ROWS, 7, 7), generator=g).float(), "value": value}


def _edges() -> dict[str, Any]:
    g = _generator()
    ends = {name: torch.randint(7, (ROWS, 11), generator=g) for name in ("sources", "targets")}
    return {"nodes": torch.randn(ROWS, 7, 6, generator=g), **ends, "value": torch.randn(ROWS, generator=g)}


def _clicks() -> dict[str, Any]:
    g = _generator()
    kinds = torch.stack([torch.randint(n, (ROWS,), generator=g) for n in (30, 20, 10)], dim=1)
    return {"kinds": kinds, "clicked": torch.randint(2, (ROWS,), generator=g).float()}


def _noised() -> dict[str, Any]:
    g = _generator()
    images, noise = torch.randn(2, ROWS, 3, 8, 8, generator=g)
    return {"images": images, "times": torch.rand(ROWS, generator=g), "tokens": _tagged()["tokens"], "noise": noise}


SEQUENCES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "tagger": (Tagger, _tagged),
    "rnn_by_hand": (Recurrent, _tagged),
    "gru_attention": (Attentive, _tagged),
    "tcn": (Causal, _tagged),
    "torch_encoder": (Encoder, _tagged),
    "torch_encoder_norm_first": (lambda: Encoder(first=True), _tagged),
    "torch_transformer": (Transformer, _tagged),
    "checkpointed": (Checkpointed, _tagged),
    "ctc": (Speech, _tagged),
    "adaptive_softmax": (Adaptive, _tagged),
    "set_transformer": (Sets, _tagged),
    "neural_ode": (Flow, _flow),
    "conv_lstm": (ConvRecurrent, _frames),
    "gcn": (Graphs, _graphs),
    "message_passing": (Scattered, _edges),
    "deepfm": (Factors, _clicks),
    "ncf": (Neural, _clicks),
    "two_towers": (Towers, _clicks),
    "latent_diffusion": (Denoiser, _noised),
}
