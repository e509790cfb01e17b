"""torch.cond: what errors advise for a branch on values trains as the local model does."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool

WIDTH = 6


class Chosen(nn.Module):
    """The data choose between two branches, one of which may read parameters and sizes."""

    def __init__(self, first: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.first = first

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        y = torch.cond(target.sum() > 0, lambda v: self.first(self, v), lambda v: v.sin(), (y,))
        return F.mse_loss(y, target)


def doubled(_: nn.Module, v: Tensor) -> Tensor:
    return 2 * v


def averaged(_: nn.Module, v: Tensor) -> Tensor:
    return v - v.sum(0) / v.shape[0]


def learned(model: Any, v: Tensor) -> Tensor:
    return model.b(model.a(v))


def made(first: Callable[[nn.Module, Tensor], Tensor]) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    signs = (1, -1, 1)
    batches = [(torch.randn(n, WIDTH), sign * torch.rand(n, WIDTH)) for n, sign in zip((5, 4, 1), signs, strict=True)]
    return Chosen(first), batches


PRIMITIVES = {"replicate": partial(whalepy.replicate, 2, shares=(3, 1)), "split": partial(whalepy.split, 2)}


@pytest.mark.parametrize(("first", "primitive"), [(averaged, "replicate"), (learned, "replicate"), (learned, "split")])
def test_branches_train_as_locally(workers: Pool, first: Callable[..., Tensor], primitive: str) -> None:
    compare(workers, Run(partial(made, first), lambda: {"": PRIMITIVES[primitive]()}, 2, evaluate=True))


def test_its_program_is_printed() -> None:
    model, batches = made(doubled)
    whalepy.annotate(model, {"": PRIMITIVES["replicate"]()})
    plan = whalepy.plan(model, "2xcpu", batches[0])
    assert "cond" in str(plan.program(1))
