"""The arguments of a step: their structure, their rows on this rank, and their shapes for all ranks together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from whalepy.errors import BatchError
from whalepy.planner.plan import Plan
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


def global_shapes(told: Sequence[Told], dims: Sequence[int | None], plan: Plan, names: Sequence[str]) -> list[Shape]:
    """Shapes of the inputs of the whole step. Raises BatchError, the same on every rank, where ranks do not fit."""
    grid = Grid(plan.mesh, plan.cuts, plan.row_cuts)
    shapes: list[Shape] = []
    for k, dim in enumerate(dims):
        shape = told[0].shapes[k]
        if dim is not None and shape is not None:
            rows = _total_rows([other.shapes[k][dim] for other in told if other.shapes[k]], grid, plan, names[k])  # type: ignore[index]
            shape = (*shape[:dim], rows, *shape[dim + 1 :])
        _check_equal(told, k, dim, names[k])
        shapes.append(shape)
    return shapes


def _check_equal(told: Sequence[Told], k: int, dim: int | None, name: str) -> None:
    """All dims but the rows must be the same on every rank."""
    for rank, other in enumerate(told):
        mine, first = other.shapes[k], told[0].shapes[k]
        if mine is None or first is None:
            continue
        if [s for d, s in enumerate(mine) if d != dim] != [s for d, s in enumerate(first) if d != dim]:
            raise BatchError(f"{name} has shape {list(mine)} on rank {rank} and {list(first)} on rank 0")


def _total_rows(rows: Sequence[int], grid: Grid, plan: Plan, name: str) -> int:
    """Rows of the global batch, from those of every rank; BatchError where they are not the plan's shares of it."""
    by_place = {grid.row_coordinates(plan.coordinates_of(rank)): n for rank, n in enumerate(rows)}
    total = sum(by_place.values())
    expected = grid.rows(total)
    wanted = [expected[grid.row_coordinates(plan.coordinates_of(rank))] for rank in range(len(rows))]
    if list(rows) != wanted:
        raise BatchError(
            f"ranks were given {list(rows)} rows of {name}; the plan's shares of {total} rows are {wanted}",
            fix="give each rank parallel.local_batch(global_batch), or a DataLoader with parallel.sampler(dataset)",
        )
    return total


def whole_example(example: Arguments, shapes: Sequence[Shape]) -> Arguments:
    """Arguments with tensors of the global shapes; only shapes and dtypes matter to a capture."""
    leaves, spec = pytree.tree_flatten(example)
    whole = [
        torch.empty(shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, torch.Tensor) and shape else leaf
        for leaf, shape in zip(leaves, shapes, strict=True)
    ]
    return pytree.tree_unflatten(whole, spec)
