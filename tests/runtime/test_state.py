"""Whole values in and out of boxes: any plan takes over the state of any other, and of the local model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import whalepy
from tests import models
from tests.pool import Pool
from whalepy.runtime.parallel import ParallelModel

Scopes = Callable[[], dict[str, Any]]


def replicated() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=(3, 1))}


def split() -> dict[str, Any]:
    return {"": whalepy.split(2, shares=(3, 1))}


def split_other_way() -> dict[str, Any]:
    return {"transformer.h.*": whalepy.split(2, shares=(1, 3))}


def compiled(scopes: Scopes, seed: int) -> tuple[ParallelModel, torch.nn.Module]:
    """A compiled model, and the local model with the same values."""
    model, batches = models.gpt2()
    local, _ = models.gpt2()
    shift = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=shift))
    local.load_state_dict(model.state_dict())
    return whalepy.compile(whalepy.annotate(model, scopes()), "2xcpu", batches[0]), local


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(one[name].equal(other[name]) for name in one)


def taken_over(source: Scopes, target: Scopes) -> list[bool]:
    first, local = compiled(source, 1)
    second, other = compiled(target, 2)
    state = first.full_state_dict()
    facts = [same(state, dict(local.state_dict())), same(second.full_state_dict(), dict(other.state_dict()))]
    second.load_full_state_dict(state)
    facts.append(same(second.full_state_dict(), state))
    (batch,) = models.language_batches()
    losses = [float(model.train_step(**model.local_batch(batch))) for model in (first, second)]
    return [*facts, abs(losses[0] - losses[1]) <= 1e-6 * abs(losses[0])]


PAIRS = [(replicated, split), (split, split_other_way), (split_other_way, replicated)]


@pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda scopes: scopes.__name__)
def test_any_plan_takes_over_the_state_of_any_other(workers: Pool, source: Scopes, target: Scopes) -> None:
    assert workers.run(2, taken_over, source, target) == [[True] * 4] * 2


def rank_0_wins() -> list[Any]:
    """Initial values and loaded ones that differ between ranks."""
    rank = torch.distributed.get_rank()
    parallel, _ = compiled(split, seed=rank)
    started = parallel.full_state_dict()
    other = {name: value + 1 + rank for name, value in started.items()}
    parallel.load_full_state_dict(other)
    loaded = parallel.full_state_dict()
    return [(value.sum().item(), loaded[name].equal(value + 1)) for name, value in started.items()]


def test_the_values_of_rank_0_win(workers: Pool) -> None:
    one, other = workers.run(2, rank_0_wins)
    assert one == other
    assert all(equal for _, equal in one)


def boxes() -> tuple[int, int, int]:
    """Elements on this rank, of the whole model, and the fewest of any parameter."""
    parallel, local = compiled(split, seed=0)
    mine = [p.numel() for p in parallel.parameters()]
    return sum(mine), sum(p.numel() for p in local.parameters()), min(mine)


def test_a_rank_holds_its_boxes_alone(workers: Pool) -> None:
    (first, whole, _), (second, _, least) = workers.run(2, boxes)
    assert whole <= first + second < 2 * whole
    assert second < first < whole  # shares 3:1
    assert least > 0


def optimizer_state() -> bool:
    """AdamW keeps state of the boxes' shapes only."""
    parallel, _ = compiled(split, seed=0)
    (batch,) = models.language_batches()
    parallel.train_step(**parallel.local_batch(batch))
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    optimizer.step()
    moments = [state["exp_avg"].shape for state in optimizer.state.values()]
    return moments == [p.shape for p in parallel.parameters()]


def test_optimizer_state_has_the_shape_of_the_boxes(workers: Pool) -> None:
    assert workers.run(2, optimizer_state) == [True, True]
