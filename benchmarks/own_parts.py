"""Small models written by hand, each around a few layers or losses of torch that the larger ones do not use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.own import WithLoss


class Scored(nn.Module):
    """A backbone of images, and a linear head with cross entropy."""

    def __init__(self, backbone: nn.Module, features: int, classes: int = 10) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(features, classes)

    def forward(self, pixel_values: Tensor, labels: Tensor) -> WithLoss:
        hidden = self.backbone(pixel_values)
        pooled = hidden.mean(dim=(2, 3)) if hidden.dim() == 4 else hidden
        return WithLoss(F.cross_entropy(self.head(pooled), labels))


def unit(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the size of the image stays."""
    conv = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Joined(nn.Module):
    """The results of several branches side by side, with the input or without it."""

    def __init__(self, *branches: nn.Module, keep: bool = False) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.keep = keep

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([*([x] if self.keep else []), *(branch(x) for branch in self.branches)], dim=1)


class Residual(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Squeeze(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 2, 1), nn.SiLU(), nn.Conv2d(2, channels, 1), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


def vgg() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1))
    head = (nn.ReLU(True), nn.AdaptiveAvgPool2d((3, 3)), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(True))
    return Scored(nn.Sequential(*layers, *head), 32)


def alexnet() -> nn.Module:
    first = (nn.Conv2d(3, 8, 7, stride=2, padding=2), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(3, stride=2))
    return Scored(nn.Sequential(*first, nn.Conv2d(8, 16, 3, padding=1, groups=2), nn.ReLU(), nn.Flatten(1)), 16 * 49)


def densenet() -> nn.Module:
    block = (Joined(unit(8, 4), keep=True), Joined(unit(12, 4), keep=True))
    return Scored(nn.Sequential(unit(3, 8), *block, unit(16, 8, 1), nn.AvgPool2d(2)), 8)


def resnext() -> nn.Module:
    return Scored(nn.Sequential(unit(3, 16), Residual(unit(16, 8, 1), unit(8, 8, groups=4), unit(8, 16, 1))), 16)


def inception() -> nn.Module:
    pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), unit(8, 2, 1))
    return Scored(nn.Sequential(unit(3, 8), Joined(unit(8, 2, 1), unit(8, 3, 3), unit(8, 3, 5), pool)), 10)


def squeezenet() -> nn.Module:
    fire = (nn.Conv2d(8, 4, 1), nn.ReLU(), Joined(nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, 3, padding=1)))
    return Scored(nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), *fire, nn.Dropout(0.0)), 12)


def efficientnet() -> nn.Module:
    block = Residual(unit(8, 16, 1), unit(16, 16, groups=16), Squeeze(16), unit(16, 8, 1))
    return Scored(nn.Sequential(unit(3, 8, stride=2), block), 8)


class Mixer(nn.Module):
    """Linear layers over patches and over channels in turn (MLP-Mixer)."""

    def __init__(self, patches: int = 16, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, stride=8)
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.tokens = nn.Sequential(nn.Linear(patches, 24), nn.GELU(), nn.Linear(24, patches))
        self.channels = nn.Sequential(nn.Linear(width, 40), nn.GELU(), nn.Linear(40, width))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(self.norms[1](x))).mean(dim=1)


class Warped(nn.Module):
    """A spatial transformer, unfold and fold, pixel shuffle and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.where = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 6))
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.InstanceNorm2d(16, affine=True)
        self.shuffle = nn.PixelShuffle(2)
        self.mix = nn.Linear(4 * 4, 4 * 4)
        self.alpha = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        theta = self.where(x).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        hidden = self.shuffle(self.norm(self.conv(F.grid_sample(x, grid, align_corners=False))))
        patches = F.unfold(hidden, 2, stride=2).transpose(1, 2)
        folded = F.fold(self.mix(patches).transpose(1, 2), hidden.shape[-2:], 2, stride=2)
        scaled = F.interpolate(folded, scale_factor=0.5, mode="bilinear", align_corners=False)
        return F.adaptive_max_pool2d(scaled * self.alpha, 4).flatten(1)


class Discriminator(nn.Module):
    """Spectral norms, strided convolutions and leaky ReLUs (DCGAN); a weight norm in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            [parametrizations.spectral_norm(nn.Conv2d(3, 8, 4, 2, 1)), nn.Conv2d(8, 16, 4, 2, 1)]
        )
        self.norm = nn.BatchNorm2d(16)
        self.head = parametrizations.weight_norm(nn.Linear(16 * 64, 1))

    def forward(self, pixel_values: Tensor, real: Tensor) -> WithLoss:
        hidden = F.leaky_relu(self.convs[0](pixel_values), 0.2)
        hidden = F.leaky_relu(self.norm(self.convs[1](hidden)), 0.2)
        return WithLoss(F.binary_cross_entropy_with_logits(self.head(hidden.flatten(1)).squeeze(-1), real))


class WeightNormed(Discriminator):
    """The same without spectral norms, whose vectors change at each reading."""

    def __init__(self) -> None:
        super().__init__()
        self.convs[0] = parametrizations.weight_norm(nn.Conv2d(3, 8, 4, 2, 1))


class VAE(nn.Module):
    """An autoencoder of images with given noise: mean squares and a divergence."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 2 * width))
        self.start = nn.Linear(width, 8 * 64)
        self.decode = nn.Sequential(nn.ReLU(), nn.ConvTranspose2d(8, 3, 4, 4), nn.Tanh())

    def forward(self, pixel_values: Tensor, noise: Tensor) -> WithLoss:
        mean, spread = self.encode(pixel_values).chunk(2, dim=-1)
        latent = mean + noise * torch.exp(0.5 * spread)
        image = self.decode(self.start(latent).view(-1, 8, 8, 8))
        divergence = -0.5 * torch.mean(torch.sum(1 + spread - mean.pow(2) - spread.exp(), dim=1))
        return WithLoss(F.mse_loss(image, pixel_values) + 0.1 * divergence)


class Contrastive(nn.Module):
    """Two views of each row; every row of one is compared with every row of the other (SimCLR, CLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 8))
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        one, two = F.normalize(self.encoder(first), dim=-1), F.normalize(self.encoder(second), dim=-1)
        logits = self.scale.exp() * one @ two.t()
        labels = torch.arange(len(logits), device=logits.device)
        return WithLoss((F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2)


class SelfContrastive(Contrastive):
    """Both views in one matrix of similarities, without each row's own (NT-Xent)."""

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        rows = first.shape[0]
        both = F.normalize(torch.cat([self.encoder(first), self.encoder(second)]), dim=-1)
        similar = (both @ both.t() * self.scale).masked_fill(torch.eye(2 * rows, dtype=torch.bool), -1e9)
        labels = torch.cat([torch.arange(rows, 2 * rows), torch.arange(rows)])
        return WithLoss(F.cross_entropy(similar, labels))


class SigmoidPairs(Contrastive):
    """Each pair by itself (SigLIP)."""

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        one, two = F.normalize(self.encoder(first), dim=-1), F.normalize(self.encoder(second), dim=-1)
        logits = one @ two.t() * self.scale.exp()
        signs = -torch.ones_like(logits) + 2 * torch.eye(logits.size(0))
        return WithLoss(-F.logsigmoid(signs * logits).sum(dim=-1).mean())


class Triplets(Contrastive):
    """Distances between three views, and cosines (Siamese)."""

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        one, two, far = self.encoder(first), self.encoder(second), self.encoder(first.flip(0))
        margin = F.triplet_margin_loss(one, two, far, margin=2.0)
        cosine = F.cosine_embedding_loss(one, two, torch.ones(one.shape[0]))
        return WithLoss(margin + cosine + F.pairwise_distance(one, two).clamp(min=0).pow(2).mean() * self.scale)


class Losses(nn.Module):
    """Several losses over one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(12, 16), nn.ELU(), nn.LayerNorm(16))
        self.classes = nn.Linear(16, 6)
        self.tags = nn.Linear(16, 6)
        self.value = nn.Bilinear(16, 12, 1)
        self.register_buffer("positive", torch.linspace(1, 2, 6))

    def forward(self, first: Tensor, second: Tensor, labels: Tensor) -> WithLoss:
        hidden = self.trunk(first)
        logits, tags, value = self.classes(hidden), self.tags(hidden), self.value(hidden, first).squeeze(-1)
        log = F.log_softmax(logits, dim=-1)
        chance = log.gather(1, labels[:, None]).squeeze(1).exp()
        focal = (-((1 - chance) ** 2) * chance.log()).mean()
        wanted = F.one_hot(labels, 6).to(tags.dtype)
        tagged = F.binary_cross_entropy_with_logits(tags, wanted, pos_weight=self.positive)
        teacher = F.kl_div(log, F.softmax(tags.detach() / 2, dim=-1), reduction="batchmean")
        value_loss = F.huber_loss(value, second[:, 0]) + F.smooth_l1_loss(value, second[:, 1], beta=0.5)
        smooth = F.cross_entropy(logits, labels, weight=self.positive, label_smoothing=0.1)
        margin = F.multi_margin_loss(logits, labels) + F.multilabel_soft_margin_loss(tags, wanted)
        return WithLoss(focal + tagged + teacher + value_loss + smooth + margin + F.nll_loss(log, labels))


class Experts(nn.Module):
    """Every expert reads every row; a gate weighs their answers."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.gate = nn.Linear(12, count)
        self.up = nn.Parameter(torch.randn(count, 12, 20) / 4)
        self.down = nn.Parameter(torch.randn(count, 20, 12) / 4)

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        weights = torch.softmax(self.gate(first), dim=-1)
        hidden = torch.relu(torch.einsum("bd,edf->bef", first, self.up))
        mixed = torch.einsum("bef,efd,be->bd", hidden, self.down, weights)
        balance = weights.mean(0).pow(2).sum()
        return WithLoss(F.mse_loss(mixed, second) + 0.1 * balance)


class Adapted(nn.Module):
    """A frozen linear layer with an adapter of low rank beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(12, 24).requires_grad_(False)
        self.low = nn.Linear(12, 2, bias=False)
        self.high = nn.Linear(2, 24, bias=False)
        self.head = nn.Linear(24, 12)

    def forward(self, first: Tensor, second: Tensor) -> WithLoss:
        return WithLoss(F.mse_loss(self.head(torch.relu(self.base(first) + 2.0 * self.high(self.low(first)))), second))


def _batch(shape: tuple[int, ...], seed: int, rows: int = 8) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(seed))


def vectors() -> dict[str, Any]:
    return {"first": _batch((12,), 0), "second": _batch((12,), 1)}


def vectors_with_classes() -> dict[str, Any]:
    return {**vectors(), "labels": torch.arange(8) % 6}


def faces() -> dict[str, Any]:
    return {"pixel_values": _batch((3, 32, 32), 0), "real": torch.arange(8).remainder(2).float()}


def noisy() -> dict[str, Any]:
    return {"pixel_values": _batch((3, 32, 32), 0), "noise": _batch((6,), 1)}


def scored_images() -> dict[str, Any]:
    return {"pixel_values": _batch((3, 32, 32), 0), "labels": torch.arange(8)}


PARTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "vgg": (vgg, scored_images),
    "alexnet": (alexnet, scored_images),
    "densenet": (densenet, scored_images),
    "resnext": (resnext, scored_images),
    "inception": (inception, scored_images),
    "squeezenet": (squeezenet, scored_images),
    "efficientnet_own": (efficientnet, scored_images),
    "mixer": (lambda: Scored(Mixer(), 16), scored_images),
    "spatial_transformer": (lambda: Scored(Warped(), 64), scored_images),
    "discriminator": (Discriminator, faces),
    "weight_norm": (WeightNormed, faces),
    "vae": (VAE, noisy),
    "simclr": (Contrastive, vectors),
    "nt_xent": (SelfContrastive, vectors),
    "sigmoid_pairs": (SigmoidPairs, vectors),
    "siamese": (Triplets, vectors),
    "losses": (Losses, vectors_with_classes),
    "dense_experts": (Experts, vectors),
    "lora": (Adapted, vectors),
}
