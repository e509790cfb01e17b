"""What collectives are counted to send."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_gather_tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.traffic import bytes_moved
from tests.pool import Pool


def _moved() -> list[int]:
    x = torch.zeros(100)  # 400 bytes
    parallel = DistributedDataParallel(nn.Linear(9, 10, bias=False))  # one bucket of 360 bytes
    splits = [30, 70] if dist.get_rank() == 0 else [70, 30]  # rank 0 keeps 30, rank 1 too
    return [
        bytes_moved(lambda: dist.all_reduce(x)),
        bytes_moved(lambda: dist.all_gather([torch.empty(100), torch.empty(100)], x)),
        bytes_moved(lambda: all_gather_tensor(x, 0, [0, 1]).sum()),
        bytes_moved(lambda: dist.all_to_all_single(torch.empty(100), x, splits, splits)),
        bytes_moved(lambda: dist.broadcast(x, src=0)),
        bytes_moved(lambda: parallel(torch.ones(2, 9)).sum().backward()),
    ]


def test_bytes_of_both_ranks(workers: Pool) -> None:
    assert workers.run(2, _moved) == [[800, 800, 800, 560, 400, 720]] * 2
