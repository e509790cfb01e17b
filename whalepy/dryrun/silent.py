"""A process group of one process: its collectives give results of the right shape and are counted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from whalepy.dryrun.counting import Counter
from whalepy.runtime.groups import Blocks, Group


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

    def all_reduce(self, x: Tensor, op: Any = None) -> None:
        """Leaves `x` as it is."""
        self._count("all-reduce", 2 * (self.size - 1) * x.nbytes // self.size)

    def all_gather(self, flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Blocks]:
        """A buffer of every position's part."""
        blocks = self.blocks(sizes, max(sizes)) if len(set(sizes)) > 1 else self.blocks(sizes)
        self._count("all-gather", (self.size - 1) * max(sizes) * flat.element_size())
        return flat.new_zeros(blocks.total), blocks

    def reduce_scatter(self, buffer: Tensor, blocks: Blocks, dtype: torch.dtype) -> Tensor:
        """A buffer of this position's part."""
        self._count("reduce-scatter", (self.size - 1) * buffer.nbytes // self.size)
        return buffer.new_empty(blocks.sizes[self.position], dtype=dtype)

    def exchange(self, buffer: Tensor, sends: Blocks, receives: Blocks) -> Tensor:
        """A buffer of what the others send."""
        self._count("all-to-all", buffer.nbytes - sends.sizes[self.position] * buffer.element_size())
        return buffer.new_empty(receives.total)

    def _count(self, kind: str, sent: int) -> None:
        self.sent_bytes += sent
        if self.counter is not None:
            self.counter.collective(kind, self.level, sent)
