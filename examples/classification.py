"""A ResNet whose head has a hundred thousand classes: rows of images are shared out, and so are the classes.

    torchrun --nproc-per-node 2 examples/classification.py --classes 100000

The backbone holds 0.4 M values here (23 M in a ResNet-50), the head 2,048 x classes: replicating the backbone and
splitting the head on the same devices moves features instead of the head's gradient. Each device keeps its classes'
weights and computes the loss of its classes only: the whole logits exist nowhere. Source: Whale, section 2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

import whalepy

BATCH, SIZE = 16, 32  # images of the global batch, pixels per side
WIDTH = 32  # channels of the first block
CLASSES, STEPS = 1_000, 10
LEARNING_RATE, MOMENTUM = 0.05, 0.9

Batch = tuple[torch.Tensor, torch.Tensor]


class Block(nn.Module):
    """Two convolutions and a residual; the first may halve the image."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.first_norm(self.first(x)))
        return torch.relu(self.second_norm(self.second(hidden)) + self.shortcut(x))


class Classifier(nn.Module):
    """f32[images, 3, SIZE, SIZE] -> f32[images, classes]"""

    def __init__(self, classes: int) -> None:
        super().__init__()
        blocks = [Block(WIDTH, WIDTH, 1), Block(WIDTH, 2 * WIDTH, 2), Block(2 * WIDTH, 4 * WIDTH, 2)]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.backbone = nn.Sequential(nn.Conv2d(3, WIDTH, 3, 1, 1, bias=False), *blocks, *pool)
        self.head = nn.Linear(4 * WIDTH, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(images))


def loss_of(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss takes the scores as they lie: each device sums the exponentials of its own classes."""
    return nn.functional.cross_entropy(scores, labels)


def compiled(classes: int, cluster: str | None = None) -> whalepy.ParallelModel:
    """The model of this rank: the backbone replicated, the head split by classes, both over every device."""
    torch.manual_seed(0)
    model = Classifier(classes)
    whalepy.annotate(model, {"backbone": whalepy.replicate(), "head": whalepy.split(on="head.weight:0")})
    example = next(batches(1, classes))
    return whalepy.compile(model, cluster, example, loss_fn=loss_of, sync_batchnorm=True)


def train(parallel: whalepy.ParallelModel, classes: int, steps: int, watch: Callable[[int, float], None]) -> None:
    """Train for some steps; `watch` is told the loss of each."""
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    for step, batch in enumerate(batches(steps, classes)):
        optimizer.zero_grad()
        loss = parallel.train_step(*parallel.local_batch(batch))
        optimizer.step()
        watch(step, loss.item())


def batches(steps: int, classes: int) -> Iterator[Batch]:
    """Global batches (f32[BATCH, 3, SIZE, SIZE], i64[BATCH]), the same on every rank: a label is the image's tint."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        labels = torch.randint(classes, (BATCH,), generator=generator)
        tints = torch.stack([labels % 7, labels % 11, labels % 13], dim=1)[:, :, None, None] / 6 - 1
        yield tints + 0.1 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator), labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a classifier of very many classes.")
    parser.add_argument("--classes", type=int, default=CLASSES)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    parallel = compiled(options.classes)
    first = dist.get_rank() == 0
    if first:
        print(parallel.plan)
        print(parallel.explain())
    train(
        parallel, options.classes, options.steps,
        lambda step, loss: print(f"step {step}  loss {loss:.3f}") if first else None,
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
