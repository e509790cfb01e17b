"""Process groups, one per level of a mesh of ranks, and flat collectives on them that take parts of unequal sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from whalepy.errors import PlanError

CPU = torch.device("cpu")


_AHEAD: ContextVar[Callable[[], None] | None] = ContextVar("ahead", default=None)


@contextmanager
def ahead_of_collectives(check: Callable[[], None]) -> Generator[None]:
    """Inside, `check` is called ahead of every collective of a group."""
    token = _AHEAD.set(check)
    try:
        yield
    finally:
        _AHEAD.reset(token)


def _check() -> None:
    check = _AHEAD.get()
    if check is not None:
        check()


def _newer(name: str, older: str) -> Any:
    return getattr(dist, name, None) or getattr(dist, older)


# torch 2.13 renamed both and warns of the older names.
_all_gather = _newer("all_gather_single", "all_gather_into_tensor")
_reduce_scatter = _newer("reduce_scatter_single", "reduce_scatter_tensor")


@dataclass(frozen=True)
class Blocks:
    """Where the part of each position lies in one flat buffer of `total` elements, perhaps with padding between."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    total: int

    @property
    def in_order(self) -> bool:
        """Whether the buffer is nothing but the parts end to end, in the order of positions."""
        return (*self.starts, self.total) == tuple(accumulate(self.sizes, initial=0))

    def parts(self, buffer: Tensor) -> list[Tensor]:
        """Flat views into `buffer`, one per position."""
        return [buffer.narrow(0, start, size) for start, size in zip(self.starts, self.sizes, strict=True)]


@dataclass(frozen=True)
class Pending:
    """A value that a collective is on its way to give; what the collective was given is not to be touched before."""

    work: dist.Work | None
    """None: nothing is on its way."""
    value: Callable[[], Tensor]

    def done(self) -> Tensor:
        """The value, once it is there. Once."""
        if self.work is not None:
            self.work.wait()
        return self.value()

    def then(self, made: Callable[[Tensor], Tensor]) -> Pending:
        """What is made of the value once it is there."""
        return Pending(self.work, lambda: made(self.value()))


@dataclass(eq=False)
class Group:
    """The ranks along one level, in the order of their positions on it, as one of them sees them.

    `process_group` is None for a group of one, whose collectives return what they are given. `sent_bytes` counts what
    this rank has sent, as ring and direct algorithms would send it. Every tensor given must be contiguous.
    """

    process_group: dist.ProcessGroup | None
    size: int
    position: int
    ranks: tuple[int, ...]
    # Reduce-scatter as an exchange and a sum at the receiver. That of gloo is an all-reduce underneath: on 4 ranks
    # with 1 MB each, 17.5 ms against 4.2 ms.
    sums_by_exchange: bool = True
    sent_bytes: int = 0

    @cached_property
    def slots(self) -> tuple[int, ...]:
        """The place of each position in the process group: torch orders that by rank, a level by the plan."""
        if self.process_group is None:
            return (0,)
        return tuple(dist.get_group_rank(self.process_group, rank) for rank in self.ranks)

    def blocks(self, sizes: Sequence[int], width: int | None = None) -> Blocks:
        """How a collective lays out parts of these sizes (elements, by position), each padded to `width` if given."""
        by_slot = self._by_slot(sizes if width is None else [width] * self.size)
        starts = tuple(accumulate(by_slot, initial=0))
        return Blocks(tuple(starts[slot] for slot in self.slots), tuple(sizes), starts[-1])

    def scatter_blocks(self, sizes: Sequence[int]) -> Blocks:
        """The layout that `reduce_scatter` expects of its buffer."""
        return self.blocks(sizes, max(sizes) if self._scatters_padded(sizes) else None)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduce `x` over the group in place; the same bits on every rank."""
        self.start_all_reduce(x, op).done()

    def start_all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Pending:
        """The same on its way."""
        if self.process_group is None or x.numel() == 0:
            return Pending(None, lambda: x)
        _check()
        self.sent_bytes += 2 * (self.size - 1) * x.nbytes // self.size
        return Pending(dist.all_reduce(x, op=op, group=self.process_group, async_op=True), lambda: x)

    def all_gather(self, flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Blocks]:
        """Every position's part, of `sizes` elements, and where each lies in the buffer."""
        pending, blocks = self.start_all_gather(flat, sizes)
        return pending.done(), blocks

    def start_all_gather(self, flat: Tensor, sizes: Sequence[int]) -> tuple[Pending, Blocks]:
        """The same on its way."""
        if self.process_group is None:
            return Pending(None, lambda: flat), self.blocks(sizes)
        if not padding_pays(sizes):
            sends, receives = self.blocks([flat.numel()] * self.size), self.blocks(sizes)
            return self.start_exchange(flat.repeat(self.size), sends, receives), receives
        blocks = self.blocks(sizes, max(sizes))
        mine = torch.nn.functional.pad(flat, (0, max(sizes) - flat.numel())) if flat.numel() < max(sizes) else flat
        buffer = flat.new_empty(blocks.total)
        _check()
        work = _all_gather(as_bytes(buffer), as_bytes(mine), group=self.process_group, async_op=True)
        self.sent_bytes += (self.size - 1) * mine.nbytes
        return Pending(work, lambda: buffer), blocks

    def reduce_scatter(self, buffer: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
        """This position's part of the sum of all buffers, flat, summed in `dtype`; `blocks` from `scatter_blocks`."""
        return self.start_reduce_scatter(buffer, blocks, dtype).done()

    def start_reduce_scatter(self, buffer: Tensor, blocks: Blocks, dtype: torch.dtype) -> Pending:
        """The same on its way."""
        size = blocks.sizes[self.position]
        if not self._scatters_padded(blocks.sizes):
            parts = self.start_exchange(buffer, blocks, self.blocks([size] * self.size))
            return parts.then(lambda received: received.view(self.size, size).sum(0, dtype=dtype))
        mine = buffer.new_empty(max(blocks.sizes), dtype=dtype)
        _check()
        work = _reduce_scatter(mine, buffer.to(dtype), group=self.process_group, async_op=True)
        self.sent_bytes += (self.size - 1) * mine.nbytes
        return Pending(work, lambda: mine.narrow(0, 0, size))

    def exchange(self, buffer: Tensor, sends: Blocks, receives: Blocks) -> Tensor:
        """The buffer laid out as `receives`, after part q of every buffer, laid out as `sends`, went to position q."""
        return self.start_exchange(buffer, sends, receives).done()

    def start_exchange(self, buffer: Tensor, sends: Blocks, receives: Blocks) -> Pending:
        """The same on its way."""
        if self.process_group is None:
            return Pending(None, lambda: buffer)
        received = buffer.new_empty(receives.total)
        _check()
        work = dist.all_to_all_single(
            as_bytes(received),
            as_bytes(buffer),
            [size * buffer.itemsize for size in self._by_slot(receives.sizes)],
            [size * buffer.itemsize for size in self._by_slot(sends.sizes)],
            group=self.process_group,
            async_op=True,
        )
        self.sent_bytes += (sum(sends.sizes) - sends.sizes[self.position]) * buffer.itemsize
        return Pending(work, lambda: received)

    def _by_slot(self, sizes: Sequence[int]) -> list[int]:
        by_slot = [0] * self.size
        for slot, size in zip(self.slots, sizes, strict=True):
            by_slot[slot] = size
        return by_slot

    def _scatters_padded(self, sizes: Sequence[int]) -> bool:
        return not self.sums_by_exchange and padding_pays(sizes)


def padding_pays(sizes: Sequence[int]) -> bool:
    """Whether to pad to the longest: the ring collectives cross each link once, an exchange once per pair of ranks.

    Not beyond twice the bytes; the sender of the longest part sends as much either way.
    """
    return len(sizes) * max(sizes) <= 2 * sum(sizes)


def as_bytes(flat: Tensor) -> Tensor:
    """The bytes of a contiguous tensor of one dim: neither backend knows every dtype (bool, int16, ...)."""
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)  # one element is contiguous whatever its stride


def start_process_group(device: torch.device = CPU) -> Group:
    """All ranks, for small messages between hosts (a gloo group); opens the default group if a launcher wants one.

    The launcher speaks through the environment, as torchrun does. Without one, and without a default group that the
    user has opened, this is a group of one and no process group exists.
    """
    if not dist.is_initialized() and {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        if device.type == "cuda" and device != torch.device("cuda"):  # "cuda" alone: the user has chosen
            torch.cuda.set_device(device)
        dist.init_process_group(_backend(device))
    if not dist.is_initialized():
        return Group(None, 1, 0, (0,))
    rank, ranks = dist.get_rank(), tuple(range(dist.get_world_size()))
    if len(ranks) == 1:
        return Group(None, 1, 0, ranks)
    host: Any = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(ranks, backend="gloo")
    return Group(host, len(ranks), rank, ranks)


def host_group(ranks: Sequence[int], host: Group) -> Group | None:
    """Some of the ranks of the host group as a host group; None on others. Collective over all ranks."""
    if len(ranks) == host.size:
        return host
    opened: Any = dist.new_group(sorted(ranks), backend="gloo") if len(ranks) > 1 else None
    if host.position not in ranks:
        return None
    return Group(opened, len(ranks), list(ranks).index(host.position), tuple(ranks))


def make_groups(
    mesh_shape: tuple[int, ...], rank_of: Sequence[int], rank: int, device: torch.device = CPU
) -> tuple[Group, ...]:
    """The group of `rank` on each level of the mesh; an empty tuple for a rank that is not on it.

    `rank_of` lists the ranks of the mesh, last level fastest. The members of a group share all other coordinates.
    Collective over *all* ranks of the default group, on the mesh or not: each creates every group, in one order, and
    warms up its own. Raises PlanError where the mesh and the ranks do not fit.
    """
    _check_mesh(mesh_shape, rank_of)
    groups = [_open(ranks, rank, device) for ranks in _lines(mesh_shape, rank_of)]
    return tuple(group for group in groups if group)


def _check_mesh(mesh_shape: tuple[int, ...], rank_of: Sequence[int]) -> None:
    if len(rank_of) != prod(mesh_shape) or len(set(rank_of)) != len(rank_of):
        raise PlanError(f"a mesh of shape {mesh_shape} needs {prod(mesh_shape)} different ranks, not {list(rank_of)}")
    world = dist.get_world_size() if dist.is_initialized() else 1
    if max(rank_of) >= world:
        raise PlanError(
            f"the plan uses rank {max(rank_of)}, but only {world} {'rank' if world == 1 else 'ranks'} started",
            fix=f"start {max(rank_of) + 1} ranks, for example: torchrun --nproc-per-node={max(rank_of) + 1} train.py",
        )


def _lines(mesh_shape: tuple[int, ...], rank_of: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """The ranks of every group of the mesh: level by level, then in row-major order of the other coordinates."""
    mesh = np.asarray(rank_of).reshape(mesh_shape)
    for level, size in enumerate(mesh_shape):
        for line in np.moveaxis(mesh, level, -1).reshape(-1, size):
            yield tuple(int(rank) for rank in line)


def _open(ranks: tuple[int, ...], rank: int, device: torch.device) -> Group | None:
    backend = _backend(device)
    opened: Any = dist.new_group(ranks, backend=backend) if len(ranks) > 1 else None
    if rank not in ranks:
        return None
    group = Group(opened, len(ranks), ranks.index(rank), ranks, sums_by_exchange=backend == "gloo")
    # The first collective opens the connections: now, in the one order all ranks share, not in the middle of a step.
    group.all_reduce(torch.zeros(1, device=device))
    group.sent_bytes = 0
    return group


def _backend(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"
