"""Parameters of which every replica keeps a part of its own are reduced by nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import whalepy
from whalepy.dryrun.blocks import folded
from whalepy.dryrun.study import Study
from whalepy.hardware.cluster import ClusterSpec
from whalepy.runtime.build import Recipe

DEVICES, WIDTH, CLASSES = 4, 16, 400


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.head(torch.relu(self.backbone(x))), classes)


def reduced_bytes(*, split: bool) -> int:
    """What a rank sends of gradients that are reduced beside the backward pass."""
    with torch.device("meta"):
        model, batch = Classifier(), (torch.empty(8, WIDTH), torch.zeros(8, dtype=torch.long))
    head = whalepy.split(DEVICES, on="head.weight:0") if split else whalepy.replicate(DEVICES)
    whalepy.annotate(model, {"backbone": whalepy.replicate(DEVICES), "head": head})
    spec = ClusterSpec.load(f"{DEVICES}xV100-SXM2-32GB")
    with folded(model, fold=False) as blocks:
        study = Study.of(Recipe(model), batch, "sgd", blocks)
    work = study.candidate(None, spec, spec.speeds()).work(0, 2)
    return sum(event.bytes for event in work.events if event.collective == "all-reduce" and event.beside)


def test_a_split_head_beside_replicas_is_not_reduced() -> None:
    backbone, head = 4 * (WIDTH * WIDTH + WIDTH), 4 * CLASSES * (WIDTH + 1)
    part = 2 * (DEVICES - 1) / DEVICES  # of an all-reduce, one rank
    assert reduced_bytes(split=True) == part * backbone
    assert reduced_bytes(split=False) == part * (backbone + head)
