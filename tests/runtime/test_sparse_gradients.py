"""Embeddings with sparse gradients: ranks add dense ones, and say so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import whalepy
from tests.pool import Pool

ROWS, LENGTH, WIDTH, KINDS = 8, 3, 4, 7


class Looked(nn.Module):
    """Rows of a table, f32[rows, WIDTH]."""

    def __init__(self, bags: bool) -> None:
        super().__init__()
        kind: type[Any] = nn.EmbeddingBag if bags else nn.Embedding
        self.table = kind(KINDS, WIDTH, sparse=True)
        self.bags = bags

    def forward(self, ids: Tensor) -> Tensor:
        found = self.table(ids)
        return (found if self.bags else found.mean(1)).pow(2).mean()


PRIMITIVES: dict[str, Callable[[], Any]] = {
    "replicate": partial(whalepy.replicate, 2),
    "split": partial(whalepy.split, 2),
}


@pytest.mark.parametrize("bags", [False, True])
@pytest.mark.parametrize(
    ("primitive", "options"), [("replicate", {}), ("split", {}), ("replicate", {"capture": False})]
)
def test_gradients_are_those_of_the_local_model(
    workers: Pool, primitive: str, options: dict[str, Any], bags: bool
) -> None:
    def run() -> tuple[bool, bool]:
        torch.manual_seed(0)
        model, ids = Looked(bags), torch.randint(KINDS, (ROWS, LENGTH))
        weight = model.table.weight.detach().clone().requires_grad_()
        found = F.embedding(ids, weight).mean(1)
        found.pow(2).mean().backward()
        whalepy.annotate(model, {"": PRIMITIVES[primitive]()})
        parallel = whalepy.compile(model, "2xcpu", (ids,), **options)
        parallel.train_step(*parallel.local_batch((ids,)))
        gradient = parallel.full_gradients()["table.weight"]
        assert gradient is not None and weight.grad is not None
        return torch.allclose(gradient, weight.grad), "asks for sparse gradients" in parallel.explain()

    told = "capture" not in options
    assert workers.run(2, run) == [(True, told)] * 2
