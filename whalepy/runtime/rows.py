"""Which rows of the global batch a rank gets: slices of a batch, and a batch sampler for any DataLoader."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import Sampler

from whalepy.errors import BatchError
from whalepy.runtime.extents import Coordinates, Grid


def local_rows(arguments: Any, batch_dims: Sequence[int | None], grid: Grid, coordinates: Coordinates) -> Any:
    """This rank's rows of every input that has them; the same structure. Unread inputs are cut too."""
    leaves, spec = pytree.tree_flatten(arguments)
    total = rows_of(leaves, batch_dims)
    start, count = grid.row_interval(total, coordinates)
    cut = [
        leaf.narrow(dim, start, count) if isinstance(leaf, torch.Tensor) and dim is not None else leaf
        for leaf, dim in zip(leaves, batch_dims, strict=True)
    ]
    return pytree.tree_unflatten(cut, spec)


def rows_of(leaves: Sequence[Any], batch_dims: Sequence[int | None]) -> int:
    """Rows of a batch. Raises BatchError where inputs disagree or none has rows."""
    sizes = {
        int(leaf.shape[dim])
        for leaf, dim in zip(leaves, batch_dims, strict=True)
        if isinstance(leaf, torch.Tensor) and dim is not None
    }
    if len(sizes) != 1:
        raise BatchError(
            f"inputs disagree on the number of rows: {sorted(sizes)}" if sizes else "no input has a batch dim",
            fix="give every input its rows, or say with batch_dim= which dim counts them",
        )
    return sizes.pop()


class RowSampler(Sampler[list[int]]):
    """A batch sampler: per step, the indices of this rank's rows; all ranks see one order.

    A last short batch is cut by the same shares; it is left out, with a warning, only where some rank would get no row
    of it (a DataLoader cannot collate nothing). Every iteration reshuffles; `set_epoch` chooses the order.
    """

    def __init__(
        self, dataset: Sized, grid: Grid, coordinates: Coordinates, batch_size: int, shuffle: bool, seed: int
    ) -> None:
        if batch_size < 1:
            raise BatchError(f"batch_size must be at least 1, not {batch_size}")
        self.length = len(dataset)
        self.grid = grid
        self.coordinates = coordinates
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def _batches(self) -> list[tuple[int, int]]:
        edges = [(at, min(self.batch_size, self.length - at)) for at in range(0, self.length, self.batch_size)]
        if edges and 0 in self.grid.rows(edges[-1][1]).values() and 0 not in self.grid.rows(self.batch_size).values():
            warnings.warn(f"the last {edges[-1][1]} rows are too few for every rank and are left out", stacklevel=3)
            edges.pop()
        return edges

    def __len__(self) -> int:
        return len(self._batches())

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.length))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        self.epoch += 1
        for at, size in self._batches():
            start, count = self.grid.row_interval(size, self.coordinates)
            yield order[at + start : at + start + count]
