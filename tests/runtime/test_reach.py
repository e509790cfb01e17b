"""Ranks that hold nothing go through the same bridges backward as the others."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import whalepy
from tests.exactness import Run, compare
from tests.pool import Pool
from whalepy.runtime.bridge import Move
from whalepy.runtime.groups import Group, Pending
from whalepy.runtime.reach import Reach, noting

WIDTH = 6


class Forgetful(nn.Module):
    """Its parameters are reached by ways that torch drops where there are no rows."""

    def __init__(self, way: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.table = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, WIDTH)
        self.unused = nn.Parameter(torch.ones(3))
        self.way = way

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return F.mse_loss(self.last(self.way(h, self.table(self.table.weight))), target)


def attended(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The mask is learned, and the same for every row."""
    q = h.view(h.shape[0], 1, 1, WIDTH)
    k = h.view(h.shape[0], 1, WIDTH, 1).expand(-1, -1, -1, WIDTH)
    return F.scaled_dot_product_attention(q, k, k, attn_mask=table[:1]).reshape(h.shape)


def picked(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return h + table[(h.sum(1) > 0).long()]


def sampled(h: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return h + F.interpolate(h[:, None] * table[0], size=WIDTH + 3, mode="linear")[:, 0, :WIDTH]


WAYS = {"attention with a learned mask": attended, "rows of a table": picked, "interpolation": sampled}


def made(way: str, rows: int) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    batches = [{"x": torch.randn(n, WIDTH), "target": torch.randn(n, WIDTH)} for n in (5, rows, 5)]
    return Forgetful(WAYS[way]), batches


def replicated() -> dict[str, Any]:
    return {"": whalepy.replicate(2, shares=[3, 1])}


def nested() -> dict[str, Any]:
    return {"": [whalepy.replicate(2, shares=[3, 1]), whalepy.split(2)]}


@pytest.mark.parametrize("way", WAYS)
def test_a_rank_without_rows(workers: Pool, way: str) -> None:
    compare(workers, Run(partial(made, way, 2), replicated, 2, steps=3))


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_without_rows_that_split(workers: Pool, way: str) -> None:
    compare(workers, Run(partial(made, way, 1), nested, 4, steps=3))


class Last(nn.Module):
    """The whole way from rows to parameters is a table, so that a loss without rows hangs on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, WIDTH)

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        return self.table(index).pow(2).mean()


def looked_up() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    return Last(), [{"index": torch.arange(n) % 4} for n in (6, 1, 2)]


def test_microbatches_without_rows(workers: Pool) -> None:
    compare(workers, Run(looked_up, replicated, 2, steps=3, options={"microbatches": 3}))


def alone() -> Group:
    return Group(None, 1, 0, (0,))


def test_a_way_that_this_rank_lacks_is_added() -> None:
    parameter, other = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    reach = Reach()
    for result in (parameter * 2, other * 3):
        reach.note(result)
    host = _Told(alone(), torch.tensor([1, 0, 1, 0]))
    loss = reach.tie([torch.zeros(())], [parameter, other], host)
    loss.backward()
    assert torch.equal(parameter.grad, torch.zeros(2)) and other.grad is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("value", [torch.ones(3, 4), torch.ones(()), torch.ones(2, dtype=torch.complex64)])
def test_what_is_noted_may_go(value: torch.Tensor) -> None:
    leaf = value.requires_grad_()
    result, reach = leaf * 2, Reach()
    reach.note(result)
    gone = weakref.ref(result)
    del result
    assert gone() is None
    ((_, nothing),) = reach.ends
    nothing.sum().abs().backward()
    assert leaf.grad is not None and not leaf.grad.any()


class _Told(Group):
    """A group of two, of which the other has said `told`."""

    def __init__(self, alone: Group, told: torch.Tensor) -> None:
        super().__init__(alone.process_group, 2, 0, (0, 1))
        self.told = told

    def start_all_gather(self, flat: torch.Tensor, sizes: Any) -> Any:
        both = torch.cat([flat, self.told])
        return Pending(None, lambda: both), self.scatter_blocks(sizes)

    @property
    def slots(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 0, 1


def test_what_cannot_learn_is_not_noted() -> None:
    reach = Reach()
    with noting(reach):
        Move(alone(), "R", "R", "P", "R", learns=False)(torch.ones(2))
    assert not reach.ends
