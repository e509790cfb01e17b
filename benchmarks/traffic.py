"""Bytes that collectives move in a step, whoever calls them: this compiler or torch's ways to parallelize."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.ways import Way

NAMESPACES = ("c10d", "_c10d_functional")
SILENT = {"barrier", "monitored_barrier_", "wait_tensor", "_wrap_tensor_autograd"}


class Counted(TorchDispatchMode):
    """While it is on, adds up what this rank's collectives send; every group is taken to be the world.

    A collective reaches torch's dispatcher as an operator of `c10d` or `_c10d_functional`, be it called in Python or in
    C++. Counted is what a rank sends at least, in the mean over ranks: of n ranks an all-reduce 2 (n - 1) / n of its
    tensor, a reduce-scatter (n - 1) / n, an all-gather n - 1 times its part, an all-to-all what is for others.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if any(t is not Tensor and issubclass(t, Tensor) and "DTensor" in t.__name__ for t in types):
            return NotImplemented  # becomes collectives of plain tensors, which come here
        namespace, name = func._schema.name.split("::")
        if namespace in NAMESPACES and name not in SILENT:
            self.bytes += _sent(name, args)
        return func(*args, **(kwargs or {}))


def _sent(name: str, args: Sequence[Any]) -> float:
    """Bytes of one collective. Raises ValueError for one that is not known here."""
    world = dist.get_world_size()
    if name in ("allreduce_", "all_reduce", "all_reduce_", "broadcast_"):
        return (1 if name == "broadcast_" else 2) * (world - 1) / world * _bytes(args[0])
    if name in ("allgather_", "_allgather_base_"):
        return (world - 1) * _bytes(args[1])
    if name == "all_gather_into_tensor":
        return (world - 1) * _bytes(args[0])
    if name in ("_reduce_scatter_base_", "reduce_scatter_"):
        return (world - 1) / world * _bytes(args[1])
    if name == "reduce_scatter_tensor":
        return (world - 1) / world * _bytes(args[0])
    if name == "alltoall_base_":
        return _for_others(args[1], args[4])
    if name == "all_to_all_single":
        return _for_others(args[0], args[2])
    raise ValueError(f"no rule for what {name} sends")


def _bytes(value: Any) -> int:
    """Of a tensor or of lists of them."""
    return value.nbytes if isinstance(value, Tensor) else sum(_bytes(one) for one in value)


def _for_others(sent: Tensor, splits: Sequence[int]) -> float:
    """Bytes of the rows that go to other ranks; without splits every rank gets as many."""
    world, rank = dist.get_world_size(), dist.get_rank()
    own = splits[rank] / max(sum(splits), 1) if splits else 1 / world
    return sent.nbytes * (1 - own)


def bytes_of(way: Way) -> int:
    """Bytes that all ranks send in what is timed of a way. Collective."""
    return bytes_moved(way.train)


def bytes_moved(step: Callable[[], Any]) -> int:
    """Bytes that all ranks send in a step. Collective."""
    with Counted() as counted:
        step()
    total = torch.tensor(counted.bytes, dtype=torch.float64)
    dist.all_reduce(total)
    return round(float(total))
