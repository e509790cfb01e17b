"""The norm of the whole gradient: every element once, whoever keeps it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import whalepy
from tests import models
from tests.pool import Pool


def split() -> dict[str, Any]:
    return {"mlp": whalepy.split(2, shares=(3, 1))}


def nested() -> dict[str, Any]:
    return {"": whalepy.replicate(2), "mlp": whalepy.split(2, shares=(3, 1))}


def norms(scopes: Any, world: int, max_norm: float) -> list[tuple[str, float, bool]]:
    """Per norm type: the bits here, the local norm, and whether the clipped gradients are the local ones."""
    model, batches = models.scaled_twice()
    local, _ = models.scaled_twice()
    parallel = whalepy.compile(whalepy.annotate(model, scopes()), f"{world}xcpu", batches[0])
    found: list[tuple[str, float, bool]] = []
    for kind in (1.0, 2.0, 3.0, float("inf")):
        for one in (parallel, local):
            one.zero_grad()
        parallel.train_step(*parallel.local_batch(batches[0]))
        local(*batches[0]).backward()
        norm = parallel.clip_grad_norm_(max_norm, kind)
        expected = nn.utils.clip_grad_norm_(local.parameters(), max_norm, kind)
        gradients = parallel.full_gradients()
        close = all(torch.allclose(gradients[name], p.grad) for name, p in local.named_parameters())
        found.append((float(norm).hex(), float(expected), close))
    return found


@pytest.mark.parametrize(("scopes", "world"), [(split, 2), (nested, 4)])
@pytest.mark.parametrize("max_norm", [0.01, 1e6])  # clipped, left as it is
def test_norms_and_clipped_gradients(workers: Pool, scopes: Any, world: int, max_norm: float) -> None:
    ranks = workers.run(world, norms, scopes, world, max_norm)
    for by_rank in zip(*ranks, strict=True):
        assert len({bits for bits, _, _ in by_rank}) == 1
        bits, expected, _ = by_rank[0]
        assert float.fromhex(bits) == pytest.approx(expected, rel=1e-5)
        assert all(close for _, _, close in by_rank)


def without_gradients() -> float:
    model, batches = models.scaled_twice()
    parallel = whalepy.compile(whalepy.annotate(model, split()), "2xcpu", batches[0])
    return float(parallel.clip_grad_norm_(1.0))


def test_no_gradient_has_norm_zero(workers: Pool) -> None:
    assert workers.run(2, without_gradients) == [0.0, 0.0]
