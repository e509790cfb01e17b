"""Ways of training that are timed in processes of their own."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.apart import timed_ways
from benchmarks.ways import Limits, Local, Way
from tests.pool import Pool


def made() -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.randn(4, 3)


def local() -> Local:
    model, x = made()
    loss = model(x).square().mean()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def own_rows(scale: float) -> Way:
    """Half the rows on each rank; gradients and loss are means, off by `scale`."""
    model, x = made()
    mine = x.chunk(2)[dist.get_rank()]

    def step() -> Tensor:
        loss = model(mine).square().mean()
        loss.backward()
        found = loss.detach().clone()
        for tensor in (found, *(p.grad for p in model.parameters() if p.grad is not None)):
            dist.all_reduce(tensor)
            tensor *= scale / 2
        return found

    return Way(step, {"": model})


def about(way: Way) -> tuple[int, int]:
    return os.getpid(), dist.get_rank()


def on_rank(scales: dict[str, float]) -> tuple[int, list[int], dict[str, Any]]:
    """How many times there are, and what is known."""
    makes = {name: partial(own_rows, scale) for name, scale in scales.items()}
    found = timed_ways(makes, local, Limits(3, others=2.0, limit_s=60.0), about)
    return os.getpid(), [len(each) for each in found.seconds.values()], found.known


def test_each_way_of_each_rank_has_a_process(workers: Pool) -> None:
    found = workers.run(2, on_rank, {"one": 1.0, "other": 1.0})
    assert [counts for _, counts, _ in found] == [[3, 3]] * 2
    assert [{known[1] for known in ways.values()} for _, _, ways in found] == [{0}, {1}]
    processes = {pid for pid, _, _ in found} | {known[0] for _, _, ways in found for known in ways.values()}
    assert len(processes) == 6


def test_a_wrong_way_is_not_timed(workers: Pool) -> None:
    with pytest.raises(ValueError, match=r"twice: not the same loss and gradients: .*gradient of weight is off"):
        workers.run(2, on_rank, {"twice": 2.0})
