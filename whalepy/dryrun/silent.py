"""Groups and boundaries of one process: what they give has the right shape; nothing is sent, and all is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from whalepy.dryrun.counting import Counter
from whalepy.runtime.boundary import Boundary, Receiving, Sending, Traffic, packed
from whalepy.runtime.groups import Blocks, Group, Pending, padding_pays


class SilentGroup(Group):
    """The group of one level as one of its ranks sees it; nothing is sent."""

    def __init__(self, level: int, size: int, position: int, counter: Counter | None) -> None:
        super().__init__(None, size, position, tuple(range(size)), sums_by_exchange=False)
        self.level = level
        self.counter = counter

    @property
    def slots(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Positions are their own slots."""
        return tuple(range(self.size))

    def start_all_reduce(self, x: Tensor, op: Any = None) -> Pending:
        """Leaves `x` as it is."""
        self._count("all-reduce", 2 * (self.size - 1) * x.nbytes // self.size)
        return Pending(None, lambda: x)

    def start_all_gather(self, flat: Tensor, sizes: Sequence[int]) -> tuple[Pending, Blocks]:
        """A buffer of every position's part."""
        padded = padding_pays(sizes)
        blocks = self.blocks(sizes, max(sizes)) if padded else self.blocks(sizes)
        sent = max(sizes) if padded else flat.numel()
        self._count("all-gather", (self.size - 1) * sent * flat.element_size())
        gathered = flat.new_zeros(blocks.total)
        return Pending(None, lambda: gathered), blocks

    def start_reduce_scatter(self, buffer: Tensor, blocks: Blocks, dtype: torch.dtype) -> Pending:
        """A buffer of this position's part."""
        own = blocks.sizes[self.position]
        self._count("reduce-scatter", (sum(blocks.sizes) - own) * buffer.element_size())
        part = buffer.new_empty(own, dtype=dtype)
        return Pending(None, lambda: part)

    def start_exchange(self, buffer: Tensor, sends: Blocks, receives: Blocks) -> Pending:
        """A buffer of what the others send."""
        self._count("all-to-all", (sum(sends.sizes) - sends.sizes[self.position]) * buffer.element_size())
        received = buffer.new_empty(receives.total)
        return Pending(None, lambda: received)

    def _count(self, kind: str, sent: int) -> None:
        self.sent_bytes += sent
        if self.counter is not None:
            self.counter.collective(kind, self.level, sent)


class SilentBoundary(Boundary):
    """What crosses between two stages as one rank of either sees it; nothing is sent."""

    @classmethod
    def of(cls, boundary: Boundary) -> SilentBoundary:
        """The same, silent."""
        return cls(**{each.name: getattr(boundary, each.name) for each in fields(boundary) if each.init})

    def send(self, traffic: Traffic, values: Sequence[Tensor], *, backward: bool) -> Sending:
        """Packs what would be sent, and counts it."""
        buffers = {other: packed(values, parts) for other, parts in traffic.sends.items()}
        own = buffers.pop(self.rank, None)
        self.sent_bytes += sum(buffer.nbytes for buffer in buffers.values())
        return Sending([], list(buffers.values()), own)

    def receive(self, traffic: Traffic, *, backward: bool) -> Receiving:
        """Buffers of what others would send."""
        sizes = {other: self.size_of(parts) for other, parts in traffic.receives.items() if other != self.rank}
        buffers = {other: torch.empty(n, dtype=torch.uint8, device=self.device) for other, n in sizes.items()}
        return Receiving([], buffers)
