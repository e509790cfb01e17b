"""Which rows of the global batch a rank gets: slices of a batch, and a batch sampler for any DataLoader."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.data import Sampler

from whalepy.errors import BatchError
from whalepy.runtime.extents import Grid

Pieces = Callable[[int], Sequence[tuple[int, int]]]
"""The rows of a global batch of some size that a rank gets: (first, how many) per microbatch."""


def local_rows(arguments: Any, batch_dims: Sequence[int | None], pieces_of: Pieces) -> Any:
    """This rank's rows of every input that has them; the same structure. Unread inputs are cut too."""
    leaves, spec = pytree.tree_flatten(arguments)
    pieces = contiguous(pieces_of(rows_of(leaves, batch_dims)))
    cut = [
        rows_at(leaf, dim, pieces) if isinstance(leaf, torch.Tensor) and dim is not None else leaf
        for leaf, dim in zip(leaves, batch_dims, strict=True)
    ]
    return pytree.tree_unflatten(cut, spec)


def contiguous(pieces: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows in fewer pieces: neighbours joined, empty ones gone; one piece at least."""
    found: list[tuple[int, int]] = []
    for start, length in pieces:
        if found and found[-1][0] + found[-1][1] == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        elif length:
            found.append((start, length))
    return found or [(0, 0)]


def rows_at(value: torch.Tensor, dim: int, pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The rows of these pieces, in their order; a view where there is one piece."""
    parts = [value.narrow(dim, start, length) for start, length in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def one_row(total: int) -> list[tuple[int, int]]:
    """The first of a global batch, for a rank that never has rows: a DataLoader cannot collate nothing."""
    return [(0, min(total, 1))]


def without_row(leaves: Sequence[Any], batch_dims: Sequence[int | None]) -> list[Any]:
    """Inputs of a rank that never has rows: without such a row."""
    return [
        leaf.narrow(dim, 0, 0) if isinstance(leaf, torch.Tensor) and dim is not None and leaf.size(dim) == 1 else leaf
        for leaf, dim in zip(leaves, batch_dims, strict=True)
    ]


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
        self, dataset: Sized, grids: Sequence[Grid], pieces_of: Pieces, batch_size: int, shuffle: bool, seed: int
    ) -> None:
        if batch_size < 1:
            raise BatchError(f"batch_size must be at least 1, not {batch_size}")
        if any(grid.without_rows(batch_size) for grid in grids):
            raise BatchError(
                f"batch_size {batch_size} leaves some rank without a row, and a DataLoader cannot collate nothing",
                fix="give a larger batch_size, or more even shares; parallel.local_batch(global_batch) feeds any batch",
            )
        self.length = len(dataset)
        self.grids = grids
        self.pieces_of = pieces_of
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def _batches(self) -> list[tuple[int, int]]:
        edges = [(at, min(self.batch_size, self.length - at)) for at in range(0, self.length, self.batch_size)]
        if edges and any(grid.without_rows(edges[-1][1]) for grid in self.grids):
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
            pieces = self.pieces_of(size)
            yield [row for start, count in pieces for row in order[at + start : at + start + count]]
