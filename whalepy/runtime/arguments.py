"""The arguments of a step: their structure, their rows on this rank, and their shapes for all ranks together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch.utils import _pytree as pytree

from whalepy.errors import BatchError
from whalepy.planner.plan import Plan, StagePlan
from whalepy.runtime.agreement import Shape, Told
from whalepy.runtime.extents import Grid

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def normal(args: Sequence[Any], kwargs: dict[str, Any]) -> Arguments:
    """Positional and keyword arguments, keywords in the order of their names."""
    return tuple(args), {name: kwargs[name] for name in sorted(kwargs)}


def as_arguments(batch: Any) -> Arguments:
    """A batch as arguments: a tuple or list is positional, a dict is keywords, anything else the one argument."""
    if isinstance(batch, dict):
        return normal((), batch)
    return normal(batch if isinstance(batch, tuple | list) else (batch,), {})


def leaf_names(arguments: Arguments) -> tuple[str, ...]:
    """`args[0]`, `kwargs['labels']`, ... per leaf."""
    paths, _ = pytree.tree_flatten_with_path(arguments)
    sides = ("args", "kwargs")
    return tuple(sides[getattr(path[0], "idx", 0)] + pytree.keystr(path[1:]) for path, _ in paths)


def leaf_shapes(arguments: Any) -> list[Shape]:
    """Shapes of the flattened arguments; None for what is no tensor."""
    return [tuple(v.shape) if isinstance(v, torch.Tensor) else None for v in pytree.tree_leaves(arguments)]


def constants_of(leaves: Sequence[Any]) -> tuple[str, ...]:
    """What is no tensor is part of the program: its text, per leaf; tensors by their dtype."""
    return tuple(str(leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in leaves)


def structure_of(key: tuple[Any, ...]) -> int:
    """A number that two ranks share exactly if they were given arguments of the same structure."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=7).digest(), "big")


def missing_rows(names: Sequence[str], leaves: Sequence[Any], dims: Sequence[int | None]) -> str | None:
    """What is wrong with this rank's rows on its own: inputs that disagree."""
    rows = {
        name: int(leaf.shape[dim])
        for name, leaf, dim in zip(names, leaves, dims, strict=True)
        if dim is not None and leaf.ndim > dim
    }
    if len(set(rows.values())) > 1:
        return "inputs disagree on their rows: " + ", ".join(f"{name} has {n}" for name, n in rows.items())
    return None


def global_shapes(
    told: Sequence[Told], dims: Sequence[int | None], grids: Sequence[Grid], plan: Plan, names: Sequence[str]
) -> list[Shape]:
    """Shapes of the inputs of the whole step, from the ranks that were given any.

    Raises BatchError, the same on every rank, where ranks do not fit.
    """
    given = {rank: other for rank, other in enumerate(told) if other.structure}
    first = min(given)
    shapes: list[Shape] = []
    for k, dim in enumerate(dims):
        shape = given[first].shapes[k]
        if dim is not None and shape is not None:
            by_rank = {rank: own[dim] for rank, other in given.items() if (own := other.shapes[k]) is not None}
            rows = _total_rows(by_rank, grids, plan, names[k])
            shape = (*shape[:dim], rows, *shape[dim + 1 :])
        _check_equal(given, k, dim, names[k])
        shapes.append(shape)
    return shapes


def _check_equal(given: Mapping[int, Told], k: int, dim: int | None, name: str) -> None:
    """All dims but the rows must be the same on every rank."""
    one = min(given)
    for rank, other in given.items():
        mine, first = other.shapes[k], given[one].shapes[k]
        if mine is None or first is None:
            continue
        if [s for d, s in enumerate(mine) if d != dim] != [s for d, s in enumerate(first) if d != dim]:
            raise BatchError(f"{name} has shape {list(mine)} on rank {rank} and {list(first)} on rank {one}")


def _total_rows(rows: Mapping[int, int], grids: Sequence[Grid], plan: Plan, name: str) -> int:
    """Rows of the global batch, from those of every rank; BatchError where they are not the plan's shares of it."""
    total = max(_rows_of_stage(rows, grid, stage) for grid, stage in zip(grids, plan.stages, strict=True))
    expected = dict.fromkeys(rows, 0)
    for grid, stage in zip(grids, plan.stages, strict=True):
        table = grid.rows(total)
        for rank, at in zip(stage.rank_of, product(*map(range, stage.mesh)), strict=True):
            expected[rank] = table[grid.row_coordinates(at)]
    wanted = [expected[rank] for rank in rows]
    if list(rows.values()) != wanted:
        raise BatchError(
            f"ranks were given {list(rows.values())} rows of {name}; the plan's shares of {total} rows are {wanted}",
            fix="give each rank parallel.local_batch(global_batch), or a DataLoader with parallel.sampler(dataset)",
        )
    return total


def _rows_of_stage(rows: Mapping[int, int], grid: Grid, stage: StagePlan) -> int:
    """Rows that the ranks of a stage were given, those that share rows counted once."""
    places = zip(stage.rank_of, product(*map(range, stage.mesh)), strict=True)
    return sum({grid.row_coordinates(at): rows.get(rank, 0) for rank, at in places}.values())


def whole_example(example: Arguments, shapes: Sequence[Shape]) -> Arguments:
    """Arguments with tensors of the global shapes; only shapes and dtypes matter to a capture."""
    leaves, spec = pytree.tree_flatten(example)
    whole = [
        torch.empty(shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, torch.Tensor) and shape else leaf
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    return pytree.tree_unflatten(whole, spec)
